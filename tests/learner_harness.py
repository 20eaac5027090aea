"""What the tests of the learner share: processes that run ranks, random batches, and the same step in plain torch.

Processes are dear and engines are cheap, so `Host` actors each run one learner rank after another.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trace_rl.batch import RolloutKey, TrainingBatch, TrainingSequence
from trace_rl.config.run import RunConfig
from trace_rl.objective import merge_sums
from trace_rl.workers.batch_runner import StepReport
from trace_rl.workers.learner_rank import LearnerRank, LearnerSpec
from trace_rl.workers.weight_wire import WeightManifest

TEMPERATURE = 0.8
ROUTE_TEMPERATURE = 1.5
HEAD = torch.randn(300, 64, generator=torch.Generator().manual_seed(7)) * 0.3
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
CORRECTION_CAP = 2.0

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
        self._store = self._rank._store = self._store or self._rank._open_store(*address)
        manifest = self._rank.start(*address)
        deepspeed_engine.join_process_group = lambda *_: None  # the process stays in the groups that it joined
        shared = self._rank._runner._ranks.sequence_group
        if shared is not None:
            deepspeed_engine.share_sequences = lambda *_: shared
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

        self.actors = [ray.remote(Host).options(num_cpus=0.25).remote(rank) for rank in range(world_size)]
        self._address: tuple[str, int] | None = None

    def all(self, method: str, *args: Any) -> list[Any]:
        import ray

        return ray.get([getattr(actor, method).remote(*args) for actor in self.actors], timeout=120)

    def build(self, spec: LearnerSpec, head: torch.Tensor | None = HEAD) -> "Group":
        """Put a new rank of this run on every host, with a teacher's head unless that is None."""
        import ray

        self._address = self._address or ray.get(self.actors[0].open_store.remote(spec), timeout=120)
        self.all("build", spec, self._address)
        if head is not None:
            self.all("call", "set_teacher_head", head)
        return self

    def train(self, batches: Sequence[TrainingBatch]) -> list[StepReport]:
        """Train on each batch; the reports of rank 0."""
        return [self.all("call", "train_step", batch)[0] for batch in batches]

    def loss(self, batch: TrainingBatch) -> float:
        """Train on a batch; its loss over all ranks."""
        sums: dict[str, float] = {}
        for report in self.all("call", "train_step", batch):
            merge_sums(sums, report.sums)
        return sums["loss/policy_gradient"] + sums["key/loss"] + sums["error/loss"]

    def weights(self) -> Weights:
        return self.all("weights")[0]

    def close(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)


def run_config(
    model_path: str, routes: bool = True, dtype: str = "float32", steps: int = 10, **learner: Any
) -> RunConfig:
    """Unclipped divergences, so that the reference stays short; epsilon large enough that AdamW is smooth near 0."""
    key = {"selector": {"rollouts": "correct", "tokens": "key_spans"}, "action": {"type": "fkl"}}
    error = {"selector": {"rollouts": "wrong", "tokens": "error_spans"}, "action": {"type": "rkl"}}
    for route in (key, error):
        route["action"]["clip"] = {"mode": "none"}
        route["temperature"] = ROUTE_TEMPERATURE
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
    """Random sequences in groups of two, every other one with routed first and last tokens.

    The last four tokens of each are fresh, those before them one version older for every four.
    """
    random = np.random.default_rng(100 + step)
    sequences = []
    for number in range(num_sequences):
        prompt, time = int(random.integers(1, 10)), int(random.integers(2, 15))
        positions = np.array([0, time - 1]) if is_routed and number % 2 else np.zeros(0, dtype=np.int64)
        rows = len(positions)
        sequences.append(
            TrainingSequence(
                key=RolloutKey(f"p{number // 2}", number % 2),
                prompt_token_ids=tuple(random.integers(0, 300, prompt).tolist()),
                token_ids=tuple(random.integers(0, 300, time).tolist()),
                rollout_logprobs=-8 * random.random(time),
                staleness=np.arange(time)[::-1] // 4,
                advantages=np.full(time, random.normal(), dtype=np.float32),
                pg_weight=(random.random(time) / (time * num_sequences)).astype(np.float32),
                route_positions=positions,
                route_index=np.full(rows, number // 2 % 2),
                route_weight=np.full(rows, 0.5 / (time * num_sequences), dtype=np.float32),
                teacher_row=np.arange(rows)[::-1].copy(),
                teacher_hidden=random.normal(size=(rows, 64)).astype(np.float32),
            )
        )
    return TrainingBatch(step, tuple(sequences))


BATCHES = [batch(0), batch(1)]


def with_advantage(item: TrainingBatch, index: int, advantage: float, weight: float = 1.0) -> TrainingBatch:
    """The batch with another advantage and another policy-gradient weight on every token of one sequence."""
    sequences = list(item.sequences)
    time = len(sequences[index].token_ids)
    sequences[index] = replace(
        sequences[index],
        advantages=np.full(time, advantage, dtype=np.float32),
        pg_weight=np.full(time, weight, dtype=np.float32),
    )
    return replace(item, sequences=tuple(sequences))


def load(model_path: str) -> Any:
    """The model as plain torch has it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


def sequence_logits(model: Any, sequence: TrainingSequence) -> torch.Tensor:
    """Logits [time, vocab] of the response tokens: one sequence, no padding, the model's own head."""
    ids = torch.tensor([sequence.prompt_token_ids + sequence.token_ids])
    return model(input_ids=ids).logits[0, len(sequence.prompt_token_ids) - 1 : -1]


def teacher_logits(sequence: TrainingSequence, row: int) -> torch.Tensor:
    """Logits [vocab] of the teacher at a row of a route."""
    return torch.tensor(sequence.teacher_hidden[sequence.teacher_row[row]]) @ HEAD.T


def of_tokens(logits: torch.Tensor, sequence: TrainingSequence, temperature: float = TEMPERATURE) -> torch.Tensor:
    """Log-probs [time] of the response tokens."""
    return (logits / temperature).log_softmax(-1)[range(len(sequence.token_ids)), list(sequence.token_ids)]


def divergence(logits: torch.Tensor, sequence: TrainingSequence, row: int) -> torch.Tensor:
    """The term of a row of a route: forward KL of route 0, reverse KL of route 1."""
    p = (logits[sequence.route_positions[row]] / ROUTE_TEMPERATURE).softmax(-1)
    q = (teacher_logits(sequence, row) / ROUTE_TEMPERATURE).softmax(-1)
    first, second = (q, p) if sequence.route_index[row] == 0 else (p, q)
    return (first * (first / second).log()).sum()


def reference_parts(
    model: Any, sequence: TrainingSequence, old: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy-gradient part and the routed part of the loss of one sequence."""
    logits = sequence_logits(model, sequence)
    own = of_tokens(logits, sequence)
    before = own.detach() if old is None else old
    ratio = (own - before).exp()
    advantages = torch.tensor(sequence.advantages)
    terms = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)
    routed = torch.zeros(())
    for row, weight in enumerate(sequence.route_weight):
        routed = routed + float(weight) * divergence(logits, sequence, row)
    weights = (before - torch.tensor(sequence.rollout_logprobs)).exp().clamp(max=CORRECTION_CAP).float()
    weights[sequence.staleness == 0] = 1.0
    return (terms * weights * torch.tensor(sequence.pg_weight)).sum(), routed


def reference(
    model_path: str,
    batches: Sequence[TrainingBatch],
    num_minibatches: int = 1,
    trained: Callable[[Any], list[torch.nn.Parameter]] = lambda model: list(model.parameters()),
) -> tuple[Weights, list[float], list[float]]:
    """Weights after plain torch steps, and the loss and gradient norm of each.

    Args:
        trained: prepares the model and returns the parameters that are trained.
    """
    model = load(model_path)
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
    losses, norms = [], []
    for item in batches:
        with torch.no_grad():
            old = {s.key: of_tokens(sequence_logits(model, s), s) for s in item.sequences}
        prompts = list(dict.fromkeys(s.key.prompt_id for s in item.sequences))
        losses.append(0.0)
        for part in np.array_split(prompts, num_minibatches):
            optimizer.zero_grad()
            mine = [s for s in item.sequences if s.key.prompt_id in part]
            loss = sum(sum(reference_parts(model, s, old[s.key])) for s in mine)
            (loss * num_minibatches).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 0.5)))
            optimizer.step()
            losses[-1] += loss.item()
    return dict(model.named_parameters()), losses, norms


def gap(first: Weights, second: Weights) -> float:
    """Largest difference between two sets of weights."""
    assert list(first) == list(second)
    return max((first[name] - second[name]).abs().max().item() for name in first)
