"""What no method's loss may depend on, for every preset: split, order and padding of a batch, tiles, devices.

The loss is that of `synthetic_step`, in float64, where equal means equal to about 1e-12, and at the end that of real
DeepSpeed engines in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from learner_harness import Group, gap
from logits_loss import autograd_loss
from synthetic_step import (
    OLD_POLICY,
    PADDED,
    POLICY,
    PRESETS,
    TEACHER,
    VOCAB,
    Case,
    RoundedModel,
    TinyModel,
    annotated_rollouts,
    evaluate,
    every_token_routed,
    head_inputs,
    make_case,
    of_older_weights,
    on_policy,
    one_token_each,
    parts_of,
    preset_config,
    stages,
    up_to_two_versions_late,
    whole,
    with_routes,
    without_spans,
)
from torch import Tensor

from trace_rl import packing
from trace_rl.actions import AdvantageAction, RoutedRows
from trace_rl.advantages import Whitened
from trace_rl.batch import AnnotatedRollout, TrainingBatch, TrainingSequence
from trace_rl.config.run import RunConfig
from trace_rl.contexts import Context
from trace_rl.head_loss import Projection, head_logprobs, head_loss, head_statistics
from trace_rl.packing import pack, plan_micro_batches
from trace_rl.schedules import Constant
from trace_rl.token_layout import Packed, Padded, TokenGrid
from trace_rl.workers.learner import learner_spec

HOMOGENEOUS = {"right", "wrong"}
"""Groups of `synthetic_step` whose rewards are equal."""
RELATIVE = 1e-12
"""Of a float64 gradient, to its norm: some hundred roundings of 1e-16, summed in another order."""

every_preset = pytest.mark.parametrize("preset", PRESETS)


def splits(case: Case) -> list[list[list[int]]]:
    """One by one; in two orders; and as ranks would get them under several budgets, empty micro-batches included."""
    count = len(case.sequences)
    shuffled = np.random.default_rng(9).permutation(count).tolist()
    lengths = [packing.num_tokens(sequence) for sequence in case.sequences]
    budgets = ((24, 2), (60, 5), (1000, 3))
    plans = [plan_micro_batches(lengths, max_tokens, ranks, PADDED) for max_tokens, ranks in budgets]
    return [
        [[index] for index in range(count)],
        [list(range(count))[::-1]],
        [shuffled[:3], shuffled[3:]],
        *([list(batch) for rank in plan for batch in rank] for plan in plans),
    ]


def assert_same(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    """Equal up to roundings."""
    size = max(1e-3, float(expected[1].norm()), abs(expected[0]))
    assert abs(found[0] - expected[0]) <= RELATIVE * size
    assert float((found[1] - expected[1]).norm()) <= RELATIVE * size


VARIANTS: dict[str, dict[str, Any]] = {
    "start": {},
    "half_of_the_ramp": {"step": 25},
    "every_token_routed": {"change": every_token_routed},
    "one_token_each": {"edit": one_token_each},
    "older_weights": {"step": 2, "change": up_to_two_versions_late, "edit": of_older_weights},
}
OLDER = VARIANTS["older_weights"]


@pytest.mark.parametrize("variant", VARIANTS)
@every_preset
def test_the_split_and_the_order_of_sequences_change_nothing(preset: str, variant: str) -> None:
    case = make_case(preset, **VARIANTS[variant])
    # a ramp without an action leaves nothing at step 0 of tokens that are all routed
    has_terms = any((s.pg_weight * s.advantages).any() or s.route_weight.any() for s in case.sequences)
    assert has_terms or preset == "trace_ramp_only"
    for old in (None, OLD_POLICY):
        expected = evaluate(case, whole(case), old)
        assert np.isfinite(expected[0]) and expected[1].isfinite().all()
        assert (expected[1].norm() > 1e-3) == has_terms
        for split in splits(case):
            assert sorted(index for indices in split for index in indices) == whole(case)[0]
            assert_same(evaluate(case, split, old), expected)


def flat_gradient(loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(POLICY.parameters()))])


@pytest.mark.parametrize("variant", VARIANTS)
@every_preset
def test_loss_and_gradient_are_those_of_autograd_through_all_logits(preset: str, variant: str) -> None:
    case = make_case(preset, **VARIANTS[variant])
    for old in (None, OLD_POLICY):
        expected = autograd_loss(*head_inputs(case, pack(case.sequences, PADDED), POLICY, old))
        assert_same(evaluate(case, whole(case), old), (expected.item(), flat_gradient(expected)))


@every_preset
def test_what_older_weights_wrote_is_corrected_where_a_method_has_a_policy_gradient(preset: str) -> None:
    step, change = OLDER["step"], OLDER["change"]
    (_, late), (_, fresh) = (
        evaluate(case, whole(case), OLD_POLICY)
        for case in (make_case(preset, **OLDER), make_case(preset, step=step, change=change))
    )
    algorithm = preset_config(preset).algorithm
    is_corrected = algorithm.has_policy_gradient and algorithm.rollout_correction.level == "stale"
    assert (float((late - fresh).norm()) > 1e-3) == is_corrected


ROWS_PER_TILE = [1, 3, 7, 20]
"""The batch of `synthetic_step` has 81 rows, which neither 7 nor 20 divide."""
ROW_BYTES = VOCAB * 8


@pytest.mark.parametrize("rows_per_tile", ROWS_PER_TILE)
@every_preset
def test_the_size_of_tiles_changes_nothing(preset: str, rows_per_tile: int) -> None:
    case = make_case(preset, **OLDER)
    tile_bytes = rows_per_tile * ROW_BYTES
    for old in (None, OLD_POLICY):
        assert_same(evaluate(case, whole(case), old, tile_bytes=tile_bytes), evaluate(case, whole(case), old))
        inputs = head_inputs(case, pack(case.sequences, PADDED), POLICY, old)
        expected, found = head_loss(*inputs)[1], head_loss(*inputs, tile_bytes)[1]
        assert {name: value.item() for name, value in found.items()} == pytest.approx(
            {name: value.item() for name, value in expected.items()}, rel=1e-11, abs=1e-11
        )


@every_preset
def test_log_probs_and_statistics_are_those_of_all_logits_at_any_size_of_tiles(preset: str) -> None:
    case = make_case(preset)
    policy, rows, objective, teacher, _ = head_inputs(case, pack(case.sequences, PADDED), POLICY, None)
    logits = (policy.hidden @ policy.head.T).detach()
    sampled = torch.log_softmax(logits / objective.sampling_temperature, -1)
    own = sampled.gather(-1, rows.targets.unsqueeze(-1)).squeeze(-1)
    for rows_per_tile in ROWS_PER_TILE:
        found = head_logprobs(policy, rows.targets, objective.sampling_temperature, rows_per_tile * ROW_BYTES)
        torch.testing.assert_close(found, own, rtol=0, atol=1e-12)
        # statistics hold several copies of a tile, so their tiles have an eighth of the rows
        statistics = dict(head_statistics(policy, rows, objective, teacher, 8 * rows_per_tile * ROW_BYTES))
        assert statistics.keys() == set(rows.route_index.tolist())
        for route in objective.routes:
            entries = rows.route_index == route.index
            if not entries.any():
                continue
            token, reads_states = rows.route_row[entries], "states" in route.action.reads | route.ranking.reads
            states = teacher.hidden[rows.teacher_row[entries]] @ teacher.head.T if reads_states else logits[:0]
            targets = rows.targets[token]
            index = targets.unsqueeze(-1)
            routed = RoutedRows(logits[token], states, targets, route.temperature, torch.ones(len(token)))
            expected = {
                "policy_entropy": -(sampled.exp() * sampled).sum(-1)[token],
                "divergence": route.ranking.terms(routed).unclipped,
                "policy_logprobs": routed.policy_logprobs.gather(-1, index).squeeze(-1),
                "teacher_logprobs": routed.teacher_logprobs.gather(-1, index[: len(states)]).squeeze(-1),
            }
            for name, value in expected.items():
                torch.testing.assert_close(statistics[route.index][name], value, rtol=0, atol=1e-12)


@every_preset
def test_accumulated_gradients_are_that_of_the_sum(preset: str) -> None:
    case = make_case(preset)
    POLICY.zero_grad()
    parts = [parts_of(case, pack([sequence], PADDED), POLICY, OLD_POLICY) for sequence in case.sequences]
    total = torch.stack([part.total for part in parts]).sum()
    total.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in POLICY.parameters()])
    assert_same(evaluate(case, [[index] for index in whole(case)[0]], OLD_POLICY), (total.item(), gradient))


@every_preset
def test_more_padding_changes_nothing(preset: str) -> None:
    case = make_case(preset)
    expected = evaluate(case, whole(case), OLD_POLICY)

    class Longer(Padded):
        def grid(self, sequences: Sequence[tuple[int, ...]], prompt_lengths: Sequence[int] = ()) -> TokenGrid:
            # one sequence more, longer than all, that is then left away
            padded = super().grid([*sequences, (0,) * 50])
            return replace(padded, input_ids=padded.input_ids[:-1], starts=padded.starts[:-1])

    assert pack(case.sequences, Longer()).grid.input_ids.shape[1] == 50
    assert_same(evaluate(case, whole(case), OLD_POLICY, layout=Longer()), expected)


@pytest.mark.parametrize("multiple_of", [1, 16])
@every_preset
def test_sequences_end_to_end_give_what_padded_rows_give(preset: str, multiple_of: int) -> None:
    case = make_case(preset, **OLDER)
    expected = evaluate(case, whole(case), OLD_POLICY)
    layout = Packed(multiple_of=multiple_of)
    assert pack(case.sequences, layout).grid.input_ids.shape[0] == 1
    for split in (whole(case), *splits(case)):
        assert_same(evaluate(case, split, OLD_POLICY, layout=layout), expected)


@every_preset
def test_the_order_of_rows_changes_nothing(preset: str) -> None:
    case = make_case(preset, **OLDER)
    packed = pack(case.sequences, PADDED)
    random = torch.Generator().manual_seed(4)
    order = torch.randperm(len(packed.row_index), generator=random)
    routed = torch.randperm(len(packed.rows.route_row), generator=random)
    states = torch.randperm(len(packed.teacher_hidden), generator=random)
    rows = packed.rows
    teacher_row = torch.argsort(states)[rows.teacher_row.clamp(min=0)] if len(states) else rows.teacher_row
    moved = replace(
        rows,
        **{name: getattr(rows, name)[order] for name in ("targets", "sequence", "advantages", "pg_weight")},
        rollout_logprobs=rows.rollout_logprobs[order],
        is_stale=rows.is_stale[order],
        route_row=torch.argsort(order)[rows.route_row][routed],
        route_index=rows.route_index[routed],
        route_weight=rows.route_weight[routed],
        teacher_row=torch.where(rows.teacher_row < 0, -1, teacher_row)[routed],
    )
    shuffled = replace(
        packed, rows=moved, row_index=packed.row_index[order], teacher_hidden=packed.teacher_hidden[states]
    )
    POLICY.zero_grad()
    loss = parts_of(case, shuffled, POLICY, OLD_POLICY).total
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in POLICY.parameters()])
    assert_same((loss.item(), gradient), evaluate(case, whole(case), OLD_POLICY))


@every_preset
def test_the_order_of_arrival_changes_no_bit_of_the_batch(preset: str) -> None:
    def shuffle(rollouts: list[AnnotatedRollout]) -> list[AnnotatedRollout]:
        return [rollouts[index] for index in np.random.default_rng(2).permutation(len(rollouts))]

    assert_equal_batches(make_case(preset).batch, make_case(preset, edit=shuffle).batch)


def assert_equal_batches(first: TrainingBatch, second: TrainingBatch) -> None:
    for one, other in zip(first.sequences, second.sequences, strict=True):
        for field in fields(TrainingSequence):
            left, right = getattr(one, field.name), getattr(other, field.name)
            if isinstance(left, np.ndarray):
                assert np.array_equal(left, right, equal_nan=True), field.name
            else:
                assert left == right, field.name


@every_preset
def test_a_live_teacher_without_a_context_teaches_nothing(preset: str) -> None:
    policy = RoundedModel(1)

    def blind(config: RunConfig) -> RunConfig:
        config = with_routes(config, lambda route: route.model_copy(update={"context": None}))
        teacher = config.teacher.model_copy(update={"context": Context(), "chat_template_kwargs": {}})
        return config.model_copy(update={"teacher": teacher})

    def sampled(rollouts: list[AnnotatedRollout]) -> list[AnnotatedRollout]:
        return [on_policy(item, policy, preset_config(preset).sampling.temperature) for item in rollouts]

    case = make_case(preset, change=blind, edit=sampled, policy=policy, teacher=policy)
    taught = tuple(route for route in case.objective.routes if "states" in route.action.reads)
    only_taught = replace(case, objective=replace(case.objective, routes=taught))
    for old in (None, OLD_POLICY):
        loss, gradient = evaluate(only_taught, whole(case), old, policy, part="routed")
        assert abs(loss) < 1e-12 and gradient.norm() < 1e-12
    if taught:  # the same tokens say something under another teacher
        told = replace(only_taught, head=TEACHER.head.detach())
        assert evaluate(told, whole(case), None, policy, part="routed")[1].norm() > 1e-4
    routes = list(case.config.algorithm.routes.values())
    for item, sequence in zip(case.routed, case.sequences, strict=True):
        for tokens in item.routed:
            route = routes[tokens.route]
            if isinstance(route.action, AdvantageAction) and route.reads:
                left = item.advantage * route.policy_weight(0)
                assert sequence.advantages[tokens.positions].tolist() == pytest.approx(
                    [left] * len(tokens.positions), abs=1e-5
                )


@every_preset
def test_no_gradient_reaches_the_teacher_or_the_sampler(preset: str) -> None:
    # `head_loss` gives gradients to the policy alone by construction; the graph of autograd shows what terms hold back.
    case = make_case(preset)
    policy, rows, objective, teacher, old = head_inputs(case, pack(case.sequences, PADDED), POLICY, OLD_POLICY)
    states, head = teacher.hidden.requires_grad_(), teacher.head.clone().requires_grad_()
    rows = replace(rows, rollout_logprobs=rows.rollout_logprobs.clone().requires_grad_())
    watched = [states, head, rows.rollout_logprobs]
    for loss in (
        autograd_loss(policy, rows, objective, Projection(states, head), old),
        head_loss(policy, rows, objective, Projection(states, head), old)[0].total,
    ):
        assert torch.autograd.grad(loss, watched, allow_unused=True, retain_graph=True) == (None,) * len(watched)
        assert loss.requires_grad


@every_preset
def test_homogeneous_groups_have_no_policy_gradient_outside_routes(preset: str) -> None:
    case = make_case(preset)
    of_batch = case.config.algorithm.advantage
    kept = []
    for item, sequence in zip(case.routed, case.sequences, strict=True):
        outside = np.ones(len(sequence.token_ids), dtype=np.float32)
        for tokens in item.routed:
            outside[tokens.positions] = 0
        if sequence.key.prompt_id in HOMOGENEOUS:
            kept.append(replace(sequence, pg_weight=sequence.pg_weight * outside))
    alone = replace(case, batch=replace(case.batch, sequences=tuple(kept)))
    for old in (None, OLD_POLICY):
        _, gradient = evaluate(alone, whole(alone), old, part="policy")
        if isinstance(of_batch, Whitened) and of_batch.baseline == "none":
            assert gradient.norm() > 1e-3  # compared with the batch, a group of equal rewards says something
        else:
            assert gradient.norm() == 0
    if sum(len(sequence.route_positions) for sequence in kept):
        assert evaluate(alone, whole(alone), None, part="routed")[1].norm() > 1e-4


def without_routes(config: RunConfig) -> RunConfig:
    return with_routes(config, lambda route: None)


def assert_is_the_plain_policy_gradient(case: Case, plain: Case) -> None:
    assert_equal_batches(case.batch, plain.batch)
    for old in (None, OLD_POLICY):
        for split in (whole(case), splits(case)[0]):
            (loss, gradient), (plain_loss, plain_gradient) = evaluate(case, split, old), evaluate(plain, split, old)
            assert loss == plain_loss and torch.equal(gradient, plain_gradient)


@every_preset
def test_without_spans_a_method_of_spans_is_its_policy_gradient_bit_for_bit(preset: str) -> None:
    def of_spans(config: RunConfig) -> RunConfig:
        return with_routes(config, lambda route: route if route.selector.tokens.span_classes else None)

    case = make_case(preset, change=of_spans, edit=without_spans)
    assert not any(item.routed for item in case.routed)
    assert_is_the_plain_policy_gradient(case, make_case(preset, change=without_routes))


@every_preset
def test_at_weight_zero_a_method_is_its_policy_gradient_bit_for_bit(preset: str) -> None:
    def ended(config: RunConfig) -> RunConfig:
        return with_routes(config, lambda route: route.model_copy(update={"schedule": Constant(value=0)}))

    assert_is_the_plain_policy_gradient(make_case(preset, change=ended), make_case(preset, change=without_routes))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("trace")])
def test_trace_ends_at_step_40(preset: str) -> None:
    plain = make_case("grpo", step=40)
    assert_is_the_plain_policy_gradient(make_case(preset, step=40), plain)


@every_preset
def test_routed_tokens_leave_the_policy_gradient_what_on_routed_says(preset: str) -> None:
    # With every token in a route that replaces the policy gradient (a ramp does at step 0) nothing of it is left.
    case = make_case(preset, change=every_token_routed)
    routes = list(case.config.algorithm.routes.values())
    taken = [routes[index] for index in {tokens.route for item in case.routed for tokens in item.routed}]
    is_replaced = any(r.on_routed != "keep" and not isinstance(r.action, AdvantageAction) for r in taken)
    _, gradient = evaluate(case, whole(case), part="policy")
    if is_replaced or not case.config.algorithm.has_policy_gradient:
        assert gradient.norm() == 0
    else:
        assert gradient.norm() > 1e-3


# Real engines. The model is built by `build_tiny_model`; its teacher is a TinyModel with as large a vocabulary.

ENGINE_TEACHER = TinyModel(6, vocab=300)
with torch.no_grad():
    ENGINE_TEACHER.head *= 0.3
TOLERANCE = 2e-6
"""Largest difference of a weight after one step that moves some weights by 1e-3 and more, in float32."""
OPTIMIZER = ("learning_rate=0.05", "epsilon=0.1", "max_grad_norm=100.0")
"""A large epsilon makes AdamW's first step nearly proportional to the gradient, which it otherwise only signs."""


def engine_step(preset: str, model_path: str, group: Group, world_size: int, zero_stage: int) -> dict[str, Any]:
    """Weights before and after one training step of a preset, and its gradient norm."""
    settings = [f"learner.world_size={world_size}", f"learner.zero_stage={zero_stage}", f"model.path={model_path}"]
    config = preset_config(preset, *settings, *(f"learner.optimizer.{each}" for each in OPTIMIZER))
    group.build(learner_spec(config), ENGINE_TEACHER.head.detach().float())

    def score(batch: TrainingBatch) -> list[Any]:
        return [item for rank in group.all("call", "score", batch) for item in rank]

    learner = SimpleNamespace(score=score)
    config = up_to_two_versions_late(config)
    _, batch = stages(config, 2, of_older_weights(annotated_rollouts(config, 2)), ENGINE_TEACHER, learner)
    before = group.weights()
    report = group.train([batch])[0]
    assert report.num_micro_batches > 1
    return {"before": before, "after": group.weights(), "norm": report.grad_norms[0]}


@pytest.fixture(scope="module")
def step_on_one_rank(groups: dict[int, Group], model_path: str) -> Callable[[str], dict[str, Any]]:
    """A step on one rank without ZeRO, once a preset."""
    kept: dict[str, dict[str, Any]] = {}

    def step(preset: str) -> dict[str, Any]:
        if preset not in kept:
            kept[preset] = engine_step(preset, model_path, groups[1], world_size=1, zero_stage=0)
        return kept[preset]

    return step


def assert_same_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert gap(expected["before"], found["before"]) == 0
    assert gap(expected["before"], expected["after"]) > 1e-3
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    assert gap(expected["after"], found["after"]) <= TOLERANCE


@pytest.mark.engine
@every_preset
def test_the_world_size_changes_nothing(
    preset: str, groups: dict[int, Group], model_path: str, step_on_one_rank: Callable[[str], dict[str, Any]]
) -> None:
    assert_same_step(engine_step(preset, model_path, groups[2], world_size=2, zero_stage=2), step_on_one_rank(preset))


ZERO_PRESETS = ["grpo", "gspo", "opd", "scope", "sdpo", "srpo", "tip", "trace_both"]
"""A plain policy gradient; one that couples tokens; rollout correction; a likelihood beside a policy gradient; top-k
divergence with importance weights; both in one batch; tokens ranked by a scoring pass; two routes with a ramp."""


@pytest.mark.engine
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("preset", ZERO_PRESETS)
def test_the_zero_stage_changes_nothing(
    preset: str,
    zero_stage: int,
    groups: dict[int, Group],
    model_path: str,
    step_on_one_rank: Callable[[str], dict[str, Any]],
) -> None:
    """Reduced to a preset of each way in which a loss is computed; stage 2 is shown for all of them above."""
    found = engine_step(preset, model_path, groups[2], world_size=2, zero_stage=zero_stage)
    assert_same_step(found, step_on_one_rank(preset))
