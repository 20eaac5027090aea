"""The learner on real DeepSpeed engines, against a plain torch step written here.

Processes are dear and engines are cheap, so `Host` actors each run one learner rank after another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trace_rl.batch import RolloutKey, TrainingBatch, TrainingSequence
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, TrainingError, WorkerError
from trace_rl.workers.learner import DeepSpeedLearner, learner_spec
from trace_rl.workers.learner_rank import LearnerRank, LearnerSpec, StepReport, merge_sums
from trace_rl.workers.weight_sender import GlooGroup, TransferGroup, WeightDigest, WeightManifest, plan_buckets

pytestmark = pytest.mark.engine

TEMPERATURE = 0.8
KL_TEMPERATURE = 1.5
HEAD = torch.randn(300, 64, generator=torch.Generator().manual_seed(7)) * 0.3
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
TOLERANCE = 1e-6

Weights = dict[str, torch.Tensor]


class Host:
    """A process that runs one learner rank after another in one process group."""

    def __init__(self, rank: int) -> None:
        self._number = rank
        self._store: Any = None

    def open_store(self, spec: LearnerSpec) -> tuple[str, int]:
        rank = LearnerRank(spec, self._number)
        address = rank.open_store()
        self._store = rank._store
        return address

    def build(self, spec: LearnerSpec, address: tuple[str, int]) -> WeightManifest:
        from trace_rl.workers import deepspeed_engine

        self._rank = LearnerRank(spec, self._number)
        self._store = self._rank._store = self._store or self._rank._connect_store(*address)
        manifest = self._rank.start(*address)
        deepspeed_engine.join_process_group = lambda *_: None  # the process stays in the group that it joined
        return manifest

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._rank, method)(*args)

    def weights(self) -> Weights:
        return {name: weight.clone() for bucket in self._rank._buckets() for name, weight in bucket}

    def set_nan(self) -> None:
        with torch.no_grad():
            next(self._rank._policy.parameters()).fill_(float("nan"))


class Group:
    """The hosts of one world size."""

    def __init__(self, world_size: int) -> None:
        import ray

        self._actors = [ray.remote(Host).options(num_cpus=0.5).remote(rank) for rank in range(world_size)]
        self._address: tuple[str, int] | None = None

    def all(self, method: str, *args: Any) -> list[Any]:
        import ray

        return ray.get([getattr(actor, method).remote(*args) for actor in self._actors], timeout=120)

    def build(self, spec: LearnerSpec) -> "Group":
        import ray

        self._address = self._address or ray.get(self._actors[0].open_store.remote(spec), timeout=120)
        self.all("build", spec, self._address)
        self.all("call", "set_teacher_head", HEAD)
        return self

    def train(self, batches: Sequence[TrainingBatch]) -> list[StepReport]:
        return [self.all("call", "train_step", batch)[0] for batch in batches]

    def weights(self) -> Weights:
        return self.all("weights")[0]


@pytest.fixture(scope="module")
def groups(local_ray: None) -> Iterator[dict[int, Group]]:
    import ray

    started = {1: Group(1), 2: Group(2)}
    yield started
    for group in started.values():
        for actor in group._actors:
            ray.kill(actor)


@pytest.fixture(scope="module")
def model_path(build_tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tied")
    build_tiny_model(folder, tied=True)
    return str(folder)


@pytest.fixture(scope="module")
def untied_path(build_tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("untied")
    build_tiny_model(folder, tied=False)
    return str(folder)


def run_config(
    model_path: str, routes: bool = True, dtype: str = "float32", steps: int = 10, **learner: Any
) -> RunConfig:
    """Unclipped divergences, so that the reference stays short; epsilon large enough that AdamW is smooth near 0."""
    route = {"clip": {"mode": "none"}, "temperature": KL_TEMPERATURE}
    key = {"selector": {"rollouts": "correct", "tokens": "key_spans"}, "action": "fkl"} | route
    error = {"selector": {"rollouts": "wrong", "tokens": "error_spans"}, "action": "rkl"} | route
    optimizer = {"learning_rate": 1e-3, "weight_decay": 0.1, "epsilon": 1e-4, "max_grad_norm": 0.5}
    return RunConfig.model_validate(
        {
            "model": {"path": model_path, "dtype": dtype},
            "data": {"path": "unused"},
            "sampling": {
                "max_prompt_tokens": 16,
                "max_response_tokens": 16,
                "temperature": TEMPERATURE,
                "prompts_per_step": 4,
            },
            "algorithm": {"routes": {"key": key, "error": error} if routes else {}},
            "learner": {"max_tokens_per_micro_batch": 48, "optimizer": optimizer} | learner,
            "placement": {"start_timeout_s": 120, "step_timeout_s": 60},
            "run": {"steps": steps},
        }
    )


def batch(step: int, num_sequences: int = 7, is_routed: bool = True) -> TrainingBatch:
    """Random sequences in groups of two, every other one with routed first and last tokens."""
    random = np.random.default_rng(100 + step)
    sequences = []
    for number in range(num_sequences):
        prompt, time = int(random.integers(1, 10)), int(random.integers(2, 15))
        positions = np.array([0, time - 1]) if is_routed and number % 2 else np.zeros(0, dtype=np.int64)
        sequences.append(
            TrainingSequence(
                key=RolloutKey(f"p{number // 2}", number % 2),
                prompt_token_ids=tuple(random.integers(0, 300, prompt).tolist()),
                token_ids=tuple(random.integers(0, 300, time).tolist()),
                rollout_logprobs=-8 * random.random(time),
                advantage=float(random.normal()),
                pg_weight=(random.random(time) / (time * num_sequences)).astype(np.float32),
                kl_positions=positions,
                kl_route=np.full(len(positions), number // 2 % 2),
                kl_weight=np.full(len(positions), 0.5 / (time * num_sequences), dtype=np.float32),
                teacher_hidden=random.normal(size=(len(positions), 64)).astype(np.float32),
            )
        )
    return TrainingBatch(step, step, tuple(sequences))


BATCHES = [batch(0), batch(1)]


def sequence_logits(model: Any, sequence: TrainingSequence) -> torch.Tensor:
    """Logits [time, vocab] of the response tokens: one sequence, no padding, the model's own head."""
    ids = torch.tensor([sequence.prompt_token_ids + sequence.token_ids])
    return model(input_ids=ids).logits[0, len(sequence.prompt_token_ids) - 1 : -1]


def sampled(logits: torch.Tensor, sequence: TrainingSequence) -> torch.Tensor:
    return (logits / TEMPERATURE).log_softmax(-1)[range(len(sequence.token_ids)), list(sequence.token_ids)]


def reference_loss(model: Any, sequence: TrainingSequence, old: torch.Tensor) -> torch.Tensor:
    logits = sequence_logits(model, sequence)
    ratio = (sampled(logits, sequence) - old).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    terms = -torch.minimum(ratio * sequence.advantage, clipped * sequence.advantage)
    loss = (terms * torch.tensor(sequence.pg_weight)).sum()
    for row, position in enumerate(sequence.kl_positions):
        p = (logits[position] / KL_TEMPERATURE).softmax(-1)
        q = (torch.tensor(sequence.teacher_hidden[row]) @ HEAD.T / KL_TEMPERATURE).softmax(-1)
        first, second = (q, p) if sequence.kl_route[row] == 0 else (p, q)
        loss = loss + float(sequence.kl_weight[row]) * (first * (first / second).log()).sum()
    return loss


def reference(
    model_path: str, batches: Sequence[TrainingBatch], num_minibatches: int = 1
) -> tuple[Weights, list[float], list[float]]:
    """Weights after plain torch steps, and the loss and gradient norm of each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
    losses, norms = [], []
    for item in batches:
        with torch.no_grad():
            old = {s.key: sampled(sequence_logits(model, s), s) for s in item.sequences}
        prompts = list(dict.fromkeys(s.key.prompt_id for s in item.sequences))
        losses.append(0.0)
        for part in np.array_split(prompts, num_minibatches):
            optimizer.zero_grad()
            loss = sum(reference_loss(model, s, old[s.key]) for s in item.sequences if s.key.prompt_id in part)
            (loss * num_minibatches).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            losses[-1] += loss.item()
    return dict(model.named_parameters()), losses, norms


def gap(first: Weights, second: Weights) -> float:
    assert list(first) == list(second)
    return max((first[name] - second[name]).abs().max().item() for name in first)


def total_loss(group: Group, item: TrainingBatch) -> float:
    sums: dict[str, float] = {}
    for report in group.all("call", "train_step", item):
        merge_sums(sums, report.sums)
    return sums["loss/policy_gradient"] + sums["key/loss"] + sums["error/loss"]


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
    found = [total_loss(group, item) for item in BATCHES[:1]]
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


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_rank_without_sequences_keeps_step(groups: dict[int, Group], model_path: str, zero_stage: int) -> None:
    single = [batch(5, num_sequences=1, is_routed=False), batch(6, num_sequences=1)]
    group = groups[2].build(learner_spec(run_config(model_path, world_size=2, zero_stage=zero_stage)))
    group.train(single)
    assert gap(group.weights(), reference(model_path, single)[0]) <= TOLERANCE


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
    assert total_loss(group, first) == pytest.approx(losses[0], abs=TOLERANCE)
    assert group.train([second])[0].grad_norms == pytest.approx(norms[2:], rel=1e-5)
    assert gap(group.weights(), weights) <= TOLERANCE


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
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
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


def with_sequence(item: TrainingBatch, index: int, **changes: Any) -> TrainingBatch:
    sequences = list(item.sequences)
    sequences[index] = replace(sequences[index], **changes)
    return replace(item, sequences=tuple(sequences))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_no_weight(
    groups: dict[int, Group], model_path: str, zero_stage: int
) -> None:
    # ratio = 1, so the loss is -1e38 times a weight: finite; its gradient, summed over ranks and tokens, is not.
    huge = with_sequence(BATCHES[1], 0, advantage=1e38, pg_weight=np.ones(len(BATCHES[1].sequences[0].token_ids)) / 8)
    huge = with_sequence(huge, 2, advantage=1e38, pg_weight=np.ones(len(BATCHES[1].sequences[2].token_ids)) / 8)
    group = groups[2].build(learner_spec(run_config(model_path, world_size=2, zero_stage=zero_stage)))
    group.train(BATCHES[:1])
    before = group.weights()
    with pytest.raises(TrainingError, match="step 1: the gradient norm is not finite"):
        group.train([huge])
    assert gap(before, group.weights()) == 0.0


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_of_them(groups: dict[int, Group], model_path: str) -> None:
    import ray

    broken = with_sequence(BATCHES[1], 0, advantage=float("nan"))
    group = groups[2].build(learner_spec(run_config(model_path, world_size=2, zero_stage=2)))
    before = group.weights()
    calls = [actor.call.remote("train_step", broken) for actor in group._actors]
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


def receive(group: TransferGroup, manifest: WeightManifest) -> tuple[Weights, str]:
    """What an engine would receive, and its digest."""
    link = GlooGroup(group.address, group.port, 1, group.world_size, group.timeout_s)
    weights, digest = {}, WeightDigest()
    for bucket in plan_buckets(manifest, group.bucket_mib * 2**20):
        buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        link.broadcast(buffer)
        for slot in bucket.slots:
            weight = bucket.view(slot, buffer, manifest)
            digest.update(manifest.names[slot.index], weight)
            weights[manifest.names[slot.index]] = weight.clone()
    return weights, digest.hexdigest()


def assert_same(weights: Weights, expected: Weights) -> None:
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def learner(
    local_ray: None, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DeepSpeedLearner, Path]]:
    import ray

    folder = tmp_path_factory.mktemp("run")
    started = DeepSpeedLearner(run_config(model_path, world_size=2, zero_stage=3), folder)
    started.set_teacher_head(ray.put(HEAD))
    yield started, folder
    started.close()


def exported(learner: DeepSpeedLearner) -> Weights:
    import ray

    return {name: weight for bucket in learner.export_state() for name, weight in ray.get(bucket).items()}


def test_driver_exports_and_sends_full_weights(learner: tuple[DeepSpeedLearner, Path], model_path: str) -> None:
    import ray
    from transformers import AutoModelForCausalLM

    source, _ = learner
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert_same(exported(source), start)
    manifest = source.describe_weights()
    assert manifest.names == tuple(start) and manifest.shapes[0] == (300, 64)
    group = TransferGroup(*source.rendezvous(), world_size=2, bucket_mib=1, timeout_s=30.0)
    joined = source.connect_sender(group)
    sent = source.send_weights(1)
    weights, digest = receive(group, manifest)
    ray.get(joined, timeout=30)
    assert ray.get(sent[0], timeout=30) == digest
    assert_same(weights, start)


def test_driver_reports_metrics_over_all_ranks(learner: tuple[DeepSpeedLearner, Path], expected: Any) -> None:
    source, _ = learner
    metrics = source.train_step(BATCHES[0])
    weights, losses, norms = expected
    assert metrics["loss/total"] == pytest.approx(losses[0], abs=TOLERANCE)
    assert metrics["learner/grad_norm"] == pytest.approx(norms[0], rel=1e-5)
    rows = [len(s.kl_positions) for s in BATCHES[0].sequences]
    assert metrics["route/key/rows"] + metrics["route/error/rows"] == sum(rows) == 6
    assert metrics["learner/learning_rate"] == 1e-3 and metrics["learner/num_micro_batches"] == 2
    assert 0 < metrics["learner/padding_frac"] < 1 and metrics["learner/duration_s"] > 0
    assert 0 < metrics["mismatch/logprob_gap_mean_nats"] < metrics["mismatch/logprob_gap_max_nats"]
    source.train_step(BATCHES[1])
    assert gap(exported(source), weights) <= TOLERANCE


def test_driver_dumps_the_batch_of_a_failed_step(learner: tuple[DeepSpeedLearner, Path]) -> None:
    source, folder = learner
    broken = with_sequence(BATCHES[1], 0, advantage=float("nan"))
    with pytest.raises(TrainingError, match=r"step 1, .* is not finite .*; the batch is in .*step_000001\.pt"):
        source.train_step(broken)
    dump = torch.load(folder / "dumps" / "step_000001.pt", weights_only=False)
    assert "not finite" in dump["reason"] and np.isnan(dump["batch"].sequences[0].advantage)
    with pytest.raises(TrainingError, match="refuses to save"):
        source.save(folder / "checkpoint")
    assert not (folder / "checkpoint").exists()


def test_driver_names_a_rank_that_died(learner: tuple[DeepSpeedLearner, Path]) -> None:
    import ray

    source, _ = learner
    ray.kill(source._ranks[1])
    with pytest.raises(WorkerError, match="learner rank 1 died while calling canary_logprobs"):
        source.canary_logprobs([(1, 2, 3)])


def test_driver_names_ranks_that_are_late(local_ray: None, model_path: str, tmp_path: Path) -> None:
    config = run_config(model_path)
    config = config.model_copy(update={"placement": config.placement.model_copy(update={"start_timeout_s": 0.05})})
    with pytest.raises(WorkerError, match=r"learner rank 0 did not finish starting within 0\.05 s"):
        DeepSpeedLearner(config, tmp_path)
