"""Ranks of the learner on real DeepSpeed engines, against plain torch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_harness import (
    BATCHES,
    ROUTE_TEMPERATURE,
    TEMPERATURE,
    Group,
    Weights,
    batch,
    divergence,
    gap,
    load,
    of_tokens,
    reference,
    reference_parts,
    run_config,
    sequence_logits,
    teacher_logits,
    with_advantage,
)
from logits_loss import as_states

from trace_rl.batch import TrainingBatch
from trace_rl.config.algorithm import Algorithm
from trace_rl.errors import ConfigError, TrainingError
from trace_rl.objective import merge_sums, objective_of
from trace_rl.packing import MicroBatch
from trace_rl.token_layout import Padded
from trace_rl.workers.batch_runner import BatchRunner, StepReport
from trace_rl.workers.learner import learner_spec
from trace_rl.workers.ranks import Ranks

pytestmark = pytest.mark.engine

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def untied_path(build_tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("untied")
    build_tiny_model(folder, tied=False)
    return str(folder)


@pytest.fixture(scope="module")
def expected(model_path: str) -> tuple[Weights, list[float], list[float]]:
    return reference(model_path, BATCHES)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_equal_plain_torch(
    groups: dict[int, Group], model_path: str, expected: Any, world_size: int, zero_stage: int
) -> None:
    weights, losses, norms = expected
    spec = learner_spec(run_config(model_path, world_size=world_size, zero_stage=zero_stage))
    group = groups[world_size].build(spec)
    found = [group.loss(item) for item in BATCHES[:1]]
    assert found == pytest.approx(losses[:1], abs=TOLERANCE)
    report = group.train(BATCHES[1:])[0]
    assert report.grad_norms == pytest.approx(norms[1:], rel=1e-5)
    assert norms[1] > 0.5  # the clip was at work
    assert report.num_micro_batches > 1
    assert gap(group.weights(), weights) <= TOLERANCE


def test_the_split_into_micro_batches_changes_nothing(groups: dict[int, Group], model_path: str, expected: Any) -> None:
    group = groups[1].build(learner_spec(run_config(model_path, max_tokens_per_micro_batch=4000)))
    assert group.train(BATCHES)[0].num_micro_batches == 1
    assert gap(group.weights(), expected[0]) <= TOLERANCE


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_gradient_checkpointing_changes_nothing(
    groups: dict[int, Group], model_path: str, expected: Any, zero_stage: int
) -> None:
    config = run_config(model_path, world_size=2, zero_stage=zero_stage, gradient_checkpointing=True)
    group = groups[2].build(learner_spec(config))
    group.train(BATCHES)
    assert gap(group.weights(), expected[0]) <= TOLERANCE


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 2), (2, 3)])
def test_sequences_end_to_end_change_nothing(
    groups: dict[int, Group], model_path: str, expected: Any, world_size: int, zero_stage: int
) -> None:
    config = run_config(model_path, world_size=world_size, zero_stage=zero_stage, layout="packed")
    group = groups[world_size].build(learner_spec(config))
    reports = group.train(BATCHES)
    assert [report.padding_frac for report in reports] == [0, 0]
    assert gap(group.weights(), expected[0]) <= TOLERANCE


@pytest.mark.parametrize(("offload", "zero_stage"), [("optimizer", 1), ("optimizer", 2), ("all", 3)])
def test_what_waits_in_cpu_memory_changes_nothing(
    groups: dict[int, Group], model_path: str, expected: Any, offload: str, zero_stage: int
) -> None:
    config = run_config(model_path, world_size=2, zero_stage=zero_stage, offload=offload)
    group = groups[2].build(learner_spec(config))
    group.train(BATCHES)
    assert gap(group.weights(), expected[0]) <= TOLERANCE


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_rank_without_sequences_keeps_step(groups: dict[int, Group], model_path: str, zero_stage: int) -> None:
    single = [batch(5, num_sequences=1, is_routed=False), batch(6, num_sequences=1)]
    group = groups[2].build(learner_spec(run_config(model_path, world_size=2, zero_stage=zero_stage)))
    group.train(single)
    assert gap(group.weights(), reference(model_path, single)[0]) <= TOLERANCE


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_ranks_with_and_without_spans_keep_step(groups: dict[int, Group], model_path: str, zero_stage: int) -> None:
    # each rank has one sequence at a time: spans on one of them, on none, on both
    pairs = [
        TrainingBatch(step, BATCHES[0].sequences[slice(*ends)])
        for step, ends in enumerate([(1, 3), (0, 3, 2), (1, 4, 2)])
    ]
    assert [[bool(len(s.route_positions)) for s in pair.sequences] for pair in pairs] == [
        [True, False],
        [False] * 2,
        [True] * 2,
    ]
    config = run_config(model_path, world_size=2, zero_stage=zero_stage, max_tokens_per_micro_batch=32)
    group = groups[2].build(learner_spec(config))
    assert [report.num_micro_batches for report in group.train(pairs)] == [1, 1, 1]
    assert gap(group.weights(), reference(model_path, pairs)[0]) <= TOLERANCE


def test_untied_head_is_trained_under_zero_3(groups: dict[int, Group], untied_path: str) -> None:
    group = groups[2].build(learner_spec(run_config(untied_path, world_size=2, zero_stage=3)))
    group.train(BATCHES)
    weights = group.weights()
    assert "lm_head.weight" in weights
    assert gap(weights, reference(untied_path, BATCHES)[0]) <= TOLERANCE


def test_minibatches_compare_with_the_policy_before_the_first_step(groups: dict[int, Group], model_path: str) -> None:
    config = run_config(model_path, world_size=2, zero_stage=2, minibatches_per_step=2)
    group = groups[2].build(learner_spec(config))
    first, second = BATCHES
    weights, losses, norms = reference(model_path, BATCHES, num_minibatches=2)
    assert group.loss(first) == pytest.approx(losses[0], abs=TOLERANCE)
    assert group.train([second])[0].grad_norms == pytest.approx(norms[2:], rel=1e-5)
    assert gap(group.weights(), weights) <= TOLERANCE


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_sequences_without_gradient_are_read_and_change_nothing(
    groups: dict[int, Group], model_path: str, world_size: int, zero_stage: int
) -> None:
    # Sequence 0 is in no route and has no advantage now; with 2 ranks the other has no sequence of its kind.
    batch = with_advantage(BATCHES[0], 0, 0.0)
    expected, _, norms = reference(model_path, [batch])
    config = run_config(model_path, world_size=world_size, zero_stage=zero_stage)
    group = groups[world_size].build(learner_spec(config))
    (report,) = group.train([batch])
    assert gap(group.weights(), expected) <= TOLERANCE
    assert report.grad_norms[0] == pytest.approx(norms[0], rel=1e-5)
    lengths = [len(s.prompt_token_ids) + len(s.token_ids) for s in batch.sequences]
    assert report.backward_frac == pytest.approx(1 - lengths[0] / sum(lengths))


@pytest.mark.parametrize("world_size", [1, 2])
def test_sequences_without_gradient_need_not_be_read(
    groups: dict[int, Group], model_path: str, world_size: int
) -> None:
    batch = with_advantage(BATCHES[0], 0, 0.0)

    def of(measured: str) -> tuple[Weights, StepReport]:
        config = run_config(model_path, world_size=world_size, measured_sequences=measured)
        group = groups[world_size].build(learner_spec(config))
        reports = group.all("call", "train_step", batch)
        merged: dict[str, float] = {}
        for report in reports:
            merge_sums(merged, report.sums)
        return group.weights(), replace(reports[0], sums=merged)

    (weights, report), (others, fewer) = of("all"), of("trained")
    assert gap(others, weights) == 0
    assert fewer.grad_norms == report.grad_norms and fewer.backward_frac == report.backward_frac < 1
    assert fewer.num_micro_batches < report.num_micro_batches
    # its response is all of its tokens that are measured
    assert report.sums["tokens"] - fewer.sums["tokens"] == len(batch.sequences[0].token_ids)


@pytest.mark.parametrize("measured", ["all", "trained"])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_batch_without_any_gradient_is_a_step_of_zero(
    groups: dict[int, Group], model_path: str, zero_stage: int, measured: str
) -> None:
    plain = [replace(s, route_weight=0 * s.route_weight, advantages=0 * s.advantages) for s in BATCHES[0].sequences]
    group = groups[2].build(
        learner_spec(run_config(model_path, world_size=2, zero_stage=zero_stage, measured_sequences=measured))
    )
    (report,) = group.train([replace(BATCHES[0], sequences=tuple(plain))])
    assert report.grad_norms == [0.0] and report.backward_frac == 0.0
    assert report.sums["tokens"] > 0 and report.sums["entropy"] > 0


def test_without_routed_rows_a_run_is_bit_identical_to_one_without_routes(
    groups: dict[int, Group], model_path: str
) -> None:
    plain = [batch(step, is_routed=False) for step in range(3)]
    results = []
    for routes in (True, False):
        group = groups[1].build(learner_spec(run_config(model_path, routes=routes)))
        group.train(plain)
        results.append(group.weights())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    group.train([batch(3, is_routed=False)])
    assert gap(results[0], group.weights()) > 1e-5  # the comparison can fail


def test_canary_logprobs_are_the_models(groups: dict[int, Group], model_path: str) -> None:
    model = load(model_path)
    sequences = [(3, 7, 11, 200), (5, 6), (299, 1, 0, 44, 2, 9)]
    group = groups[2].build(learner_spec(run_config(model_path, world_size=2, zero_stage=3)))
    found = group.all("call", "canary_logprobs", sequences)[0]
    for ids, logprobs in zip(sequences, found, strict=True):
        with torch.no_grad():
            rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert logprobs == pytest.approx([float(rows[t, ids[t + 1]]) for t in range(len(ids) - 1)], abs=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_keeps_float32_master_weights(groups: dict[int, Group], model_path: str, zero_stage: int) -> None:
    # One update of at most 4e-4 is under half a bfloat16 ulp of weights above 0.25 (2^-9 / 2 = 1e-3): it is lost when
    # weights are kept in bfloat16, and comes through after some steps when a float32 copy adds updates up.
    optimizer = {"learning_rate": 4e-4, "epsilon": 1e-8, "max_grad_norm": 100.0}
    config = run_config(model_path, dtype="bfloat16", zero_stage=zero_stage, optimizer=optimizer)
    group = groups[1].build(learner_spec(config))
    seen = [group.weights()]
    for count in (1, 5):
        group.train([BATCHES[0]] * count)
        seen.append(group.weights())
    name = "model.embed_tokens.weight"
    large = seen[0][name].abs() > 0.26
    assert seen[0][name].dtype == torch.bfloat16 and large.sum() > 1000
    assert torch.equal(seen[0][name][large], seen[1][name][large])
    assert (seen[1][name][large] != seen[2][name][large]).float().mean() > 0.1


def test_learning_rate_follows_the_schedule(groups: dict[int, Group], model_path: str) -> None:
    # Warm-up of 2 of 4 steps to 1e-3, then linear to 0 over the remaining 2.
    schedule = {"type": "linear", "warmup_steps": 2}
    group = groups[1].build(learner_spec(run_config(model_path, steps=4, schedule=schedule)))
    rates = [report.learning_rate for report in group.train([BATCHES[0]] * 4)]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_no_weight(
    groups: dict[int, Group], model_path: str, zero_stage: int
) -> None:
    # ratio = 1, so the loss is -1e38 times a weight: finite; its gradient, summed over ranks and tokens, is not.
    huge = with_advantage(BATCHES[1], 0, 1e38, weight=1 / 8)
    huge = with_advantage(huge, 2, 1e38, weight=1 / 8)
    group = groups[2].build(learner_spec(run_config(model_path, world_size=2, zero_stage=zero_stage)))
    group.train(BATCHES[:1])
    before = group.weights()
    with pytest.raises(TrainingError, match="step 1: the gradient norm is not finite"):
        group.train([huge])
    assert gap(before, group.weights()) == 0.0


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_of_them(groups: dict[int, Group], model_path: str) -> None:
    import ray

    broken = with_advantage(BATCHES[1], 0, float("nan"))
    group = groups[2].build(learner_spec(run_config(model_path, world_size=2, zero_stage=2)))
    before = group.weights()
    calls = [actor.call.remote("train_step", broken) for actor in group.actors]
    for call in calls:
        with pytest.raises(
            TrainingError, match=r"step 1, micro-batch \d: the loss is not finite on learner rank [01];"
        ):
            ray.get(call, timeout=60)
    assert gap(before, group.weights()) == 0.0
    for method, argument in (("send_weights", 2), ("save", "unused"), ("train_step", BATCHES[0])):
        with pytest.raises(TrainingError, match="a training step failed before"):
            group.all("call", method, argument)


def test_weights_that_are_not_finite_are_noticed(groups: dict[int, Group], model_path: str) -> None:
    group = groups[1].build(learner_spec(run_config(model_path)))
    group.all("set_nan")
    with pytest.raises(TrainingError, match="loss is not finite"):
        group.train(BATCHES[:1])


def test_routed_tokens_need_a_teacher_head(groups: dict[int, Group], model_path: str) -> None:
    group = groups[1]
    group.all("build", learner_spec(run_config(model_path)), group._address)
    with pytest.raises(TrainingError, match="no teacher head"):
        group.train(BATCHES[:1])


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (2, 3)])
def test_an_interrupted_run_goes_on_bit_identically(
    groups: dict[int, Group], model_path: str, tmp_path: Path, world_size: int, zero_stage: int
) -> None:
    schedule = {"type": "cosine", "warmup_steps": 1}
    spec = learner_spec(run_config(model_path, world_size=world_size, zero_stage=zero_stage, schedule=schedule))
    group = groups[world_size].build(spec)
    group.train(BATCHES)
    group.all("call", "save", str(tmp_path))
    group.train([batch(2), batch(3)])
    uninterrupted = group.weights()
    group.build(spec)
    group.all("call", "load", str(tmp_path))
    reports = group.train([batch(2), batch(3)])
    resumed = group.weights()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in resumed)
    assert 0 < reports[0].learning_rate < 1e-3


def test_zero_0_with_bfloat16_is_refused(model_path: str) -> None:
    with pytest.raises(ConfigError, match="zero_stage to 1"):
        learner_spec(run_config(model_path, dtype="bfloat16", zero_stage=0))


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_scores_are_those_of_a_direct_computation(
    groups: dict[int, Group], model_path: str, world_size: int, zero_stage: int
) -> None:
    group = groups[world_size].build(learner_spec(run_config(model_path, world_size=world_size, zero_stage=zero_stage)))
    before = group.weights()
    found = [item for rank in group.all("call", "score", BATCHES[0]) for item in rank]
    model = load(model_path)
    expected = {s.key: s for s in BATCHES[0].sequences if len(s.route_positions)}
    assert sorted(item.key for item in found) == sorted(expected)  # each once, whichever rank had it
    for item in found:
        sequence = expected[item.key]
        assert {item.route} == set(sequence.route_index)
        rows = range(len(sequence.route_positions))
        tokens = [sequence.token_ids[position] for position in sequence.route_positions]
        with torch.no_grad():
            logits = sequence_logits(model, sequence)
            at_sampling = (logits[sequence.route_positions] / TEMPERATURE).log_softmax(-1)
            own = of_tokens(logits, sequence, ROUTE_TEMPERATURE)[sequence.route_positions]
            divergences = [float(divergence(logits, sequence, row)) for row in rows]
        taught = [(teacher_logits(sequence, row) / ROUTE_TEMPERATURE).log_softmax(-1)[tokens[row]] for row in rows]
        entropies = -(at_sampling.exp() * at_sampling).sum(-1)
        assert item.policy_entropy.tolist() == pytest.approx(entropies.tolist(), abs=1e-5)
        assert item.divergence.tolist() == pytest.approx(divergences, abs=1e-5)
        assert item.policy_logprobs.tolist() == pytest.approx(own.tolist(), abs=1e-5)
        assert item.teacher_logprobs.tolist() == pytest.approx([float(value) for value in taught], abs=1e-5)
    assert all(torch.equal(before[name], weight) for name, weight in group.weights().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_route_without_a_teacher_is_scored_without_log_probs_of_one(dtype: torch.dtype) -> None:
    # No engine: logits that favour the sampled token. The divergence of a likelihood route is -log p.
    by_entropy = {"type": "top", "score": "policy_entropy"}
    route = {"selector": {"tokens": by_entropy}, "action": "nll", "schedule": "constant"}
    config = run_config("unused")
    algorithm = Algorithm.model_validate({"routes": {"likelihood": route}})
    sequences = [
        replace(
            sequence,
            route_index=np.zeros_like(sequence.route_index),
            teacher_row=np.full_like(sequence.teacher_row, -1),
            teacher_hidden=np.zeros((0, 0)),
        )
        for sequence in BATCHES[0].sequences
    ]

    def engine(packed: MicroBatch, read: Callable[..., Any]) -> Any:
        return read(as_states(torch.eye(300)[packed.rows.targets].to(dtype)), packed)

    runner = BatchRunner(
        engine, config.learner, objective_of(algorithm, 1.0), Ranks(0, 1), Padded(), torch.device("cpu")
    )
    found = runner.score(TrainingBatch(0, tuple(sequences)))
    assert sorted(item.key for item in found) == sorted(s.key for s in sequences if len(s.route_positions))
    favoured = 1 - np.log(np.e + 299)
    for item in found:
        assert item.policy_logprobs.tolist() == pytest.approx([favoured] * 2, abs=1e-5)
        assert item.divergence.tolist() == pytest.approx([-favoured] * 2, abs=1e-5)
        assert len(item.policy_entropy) == 2 and len(item.teacher_logprobs) == 0


def test_a_rank_without_sequences_scores_nothing(groups: dict[int, Group], model_path: str) -> None:
    config = run_config(model_path, dtype="bfloat16", world_size=2, zero_stage=2)
    group = groups[2].build(learner_spec(config))
    found = group.all("call", "score", TrainingBatch(0, BATCHES[0].sequences[1:2]))
    assert [len(part) for part in found] == [1, 0]
    assert found[0][0].divergence.shape == (2,)


def reference_gradient_parts(model_path: str, item: TrainingBatch) -> dict[str, float]:
    """The two parts of the gradient by plain torch, and that of routed tokens of completions without an advantage."""
    model = load(model_path)
    parts = [sum(each) for each in zip(*(reference_parts(model, s) for s in item.sequences), strict=True)]
    parts.append(sum(reference_parts(model, s)[1] for s in item.sequences if not s.advantages.any()))
    flat = []
    for part in parts:
        model.zero_grad()
        part.backward(retain_graph=True)
        flat.append(torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]))
    norms = [float(each.norm()) for each in flat]
    cosine = float(flat[0] @ flat[1]) / (norms[0] * norms[1])
    return {
        "policy_grad_norm": norms[0],
        "routed_grad_norm": norms[1],
        "routed_grad_norm_without_advantage": norms[2],
        "cosine": cosine,
    }


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "checkpointing"),
    [(1, 0, False), (1, 2, True), (2, 0, False), (2, 1, False), (2, 2, False), (2, 2, True)],
)
def test_gradient_parts_are_those_of_plain_autograd_and_leave_no_trace(
    groups: dict[int, Group], model_path: str, world_size: int, zero_stage: int, checkpointing: bool
) -> None:
    spec = learner_spec(
        run_config(model_path, world_size=world_size, zero_stage=zero_stage, gradient_checkpointing=checkpointing)
    )
    group = groups[world_size].build(spec)
    untouched = group.train(BATCHES)
    expected_weights = group.weights()

    group.build(spec)
    silent = with_advantage(BATCHES[0], 1, 0.0)  # a routed one
    found = group.all("call", "gradient_parts", silent)
    expected = reference_gradient_parts(model_path, silent)
    assert expected["policy_grad_norm"] > 1e-3 < expected["routed_grad_norm"] and abs(expected["cosine"]) > 1e-3
    assert 1e-3 < expected["routed_grad_norm_without_advantage"] != pytest.approx(expected["routed_grad_norm"])
    for part in found:  # the same on every rank
        assert part == pytest.approx(expected, rel=1e-4, abs=1e-6)
    reports = group.train(BATCHES[:1])
    group.all("call", "gradient_parts", BATCHES[1])
    reports += group.train(BATCHES[1:])
    assert [report.grad_norms for report in reports] == [report.grad_norms for report in untouched]
    assert all(torch.equal(expected_weights[name], weight) for name, weight in group.weights().items())


def test_gradient_parts_without_routed_rows(groups: dict[int, Group], model_path: str) -> None:
    plain = batch(0, is_routed=False)
    group = groups[2].build(learner_spec(run_config(model_path, world_size=2)))
    (found, _), (report, *_) = group.all("call", "gradient_parts", plain), group.train([plain])
    assert found["policy_grad_norm"] == pytest.approx(report.grad_norms[0], rel=1e-5)
    assert found["routed_grad_norm"] == found["routed_grad_norm_without_advantage"] == 0.0
    assert "cosine" not in found  # of nothing there is no direction
