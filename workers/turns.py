"""Turns of engines and learner on the same GPUs: one side sleeps, or is in CPU memory, while the other works.

Decides when a turn changes, and in which order memory is given up and taken: the side that comes never takes memory
before the other has given it up, but for the model's weights, which both hold while they are transferred. What the loop
sees are a `Learner` and a `WeightSync` like any other. Must not know how vLLM or DeepSpeed move memory.

Invariants:
* The learner computes with all of its states on the GPU and all engines asleep; engines sample with the learner's
  states and weights in CPU memory.
* An engine that dropped its weights is unproven until a sync has brought others; a checkpoint between two syncs keeps
  them.
* The learner's log-probs of the canary are taken in its turn, those of the engines in theirs: every sync is proven as
  ever.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
from jaxtyping import Float
from torch import Tensor

from trace_rl.batch import TokenFigures, TokenStatistics, TrainingBatch
from trace_rl.protocols import Metrics, StoredFile, WeightSync
from trace_rl.workers.learner import DeepSpeedLearner
from trace_rl.workers.waiting import wait_for

_KEEP, _DROP = 1, 2  # levels of vLLM's sleep


class Turns:
    """Who has the GPUs; the learner at first, whose engines must be put to sleep before it loads.

    Args:
        engines: actor handles of `GeneratorEngine` by role.
        ranks: actor handles of `LearnerRank` by role.
        timeout_s: deadline of one move.
        keeps_weights: whether a sync brings less than all weights, so that engines must never drop theirs.
    """

    def __init__(
        self, engines: Mapping[str, Any], ranks: Mapping[str, Any], timeout_s: float, keeps_weights: bool
    ) -> None:
        self._engines = dict(engines)
        self._ranks = dict(ranks)
        self._timeout_s = timeout_s
        self._level = _KEEP if keeps_weights else _DROP
        self._is_learners = False
        self.moved_s = 0.0
        """Seconds that moves have taken so far."""

    @property
    def is_learners(self) -> bool:
        """Whether the learner has the GPUs."""
        return self._is_learners

    def put_engines_to_sleep(self) -> None:
        """The start: engines have loaded, and the learner is about to."""
        self._each(self._engines, "falling asleep", "sleep", self._level)
        self._is_learners = True

    def to_learner(self) -> None:
        """Let the learner compute, before new weights go to the engines; nothing is done where it can already."""
        if not self._is_learners:
            self._take(self._level)

    def weights_to_engines(self) -> None:
        """Give the engines memory for weights, while the learner still holds its own."""
        self._each(self._ranks, "putting its states away", "put_away", "states")
        self._each(self._engines, "waking up its weights", "wake", "weights")

    def rest_to_engines(self) -> None:
        """Let the engines sample."""
        self._each(self._ranks, "putting its weights away", "put_away", "weights")
        self._each(self._engines, "waking up its cache", "wake", "kv_cache")
        self._is_learners = False

    def borrow(self) -> None:
        """Let the learner compute in the midst of the engines' turn, until `give_back`; engines keep their weights."""
        self._take(_KEEP)

    def give_back(self) -> None:
        """The end of `borrow`."""
        self.weights_to_engines()
        self.rest_to_engines()

    def _take(self, level: int) -> None:
        self._each(self._engines, "falling asleep", "sleep", level)
        self._each(self._ranks, "taking its states back", "take_back")
        self._is_learners = True

    def _each(self, actors: Mapping[str, Any], doing: str, method: str, *args: Any) -> None:
        """Call all of them at once and wait for each."""
        started = time.monotonic()
        calls = {role: getattr(actor, method).remote(*args) for role, actor in actors.items()}
        for role, call in calls.items():
            wait_for(call, max(0.0, started + self._timeout_s - time.monotonic()), role, doing)
        self.moved_s += time.monotonic() - started


class LearnerInTurns:
    """Implements `trace_rl.protocols.Learner`, and what teacher and sync need of it, in the learner's turn."""

    def __init__(self, learner: DeepSpeedLearner, turns: Turns) -> None:
        self._learner = learner
        self._turns = turns

    def train_step(self, batch: TrainingBatch) -> Metrics:
        self._turns.to_learner()
        return self._learner.train_step(batch)

    def score(self, batch: TrainingBatch) -> Sequence[TokenStatistics]:
        self._turns.to_learner()
        return self._learner.score(batch)

    def inspect(self, batch: TrainingBatch) -> Sequence[TokenFigures]:
        self._turns.to_learner()
        return self._learner.inspect(batch)

    def gradient_parts(self, batch: TrainingBatch) -> Metrics:
        self._turns.to_learner()
        return self._learner.gradient_parts(batch)

    def export_state(self) -> Iterator[ray.ObjectRef[dict[str, Tensor]]]:
        self._turns.to_learner()
        return self._learner.export_state()

    def set_teacher_head(self, head: ray.ObjectRef[Tensor]) -> None:
        self._turns.to_learner()
        self._learner.set_teacher_head(head)

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[Float[np.ndarray, " time"]]:
        self._turns.to_learner()
        return self._learner.canary_logprobs(sequences)

    def save(self, path: Path) -> Mapping[str, StoredFile]:
        """In a turn that is borrowed, because engines go on with the weights that they have."""
        if self._turns.is_learners:
            return self._learner.save(path)
        self._turns.borrow()
        written = self._learner.save(path)
        self._turns.give_back()
        return written

    def load(self, path: Path) -> None:
        self._turns.to_learner()
        self._learner.load(path)

    def close(self) -> None:
        """End the ranks."""
        self._learner.close()


class Scorer(Protocol):
    """Who knows the learner's log-probs of the canary."""

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[Float[np.ndarray, " time"]]: ...


class CanaryInTurns:
    """The learner as the proof of a sync sees it: its log-probs were taken before it gave the GPUs up.

    Asked for them, which is after the transfer, it lets the engines have the rest of the memory: their own scoring
    waits for that.
    """

    def __init__(self, learner: Scorer, turns: Turns) -> None:
        self._learner = learner
        self._turns = turns
        self._taken: list[np.ndarray] = []

    def take(self, canary: Sequence[tuple[int, ...]]) -> None:
        """Score the canary with the weights that are about to be sent."""
        self._taken = self._learner.canary_logprobs(canary)

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[Float[np.ndarray, " time"]]:
        """What was taken."""
        self._turns.rest_to_engines()
        return self._taken


class SyncInTurns:
    """Implements `trace_rl.protocols.WeightSync`: a sync that hands the GPUs from the learner to the engines.

    Args:
        sync: proves its transfers with `canary`'s log-probs of `sequences`.
    """

    def __init__(
        self, sync: WeightSync, canary: CanaryInTurns, sequences: Sequence[tuple[int, ...]], turns: Turns
    ) -> None:
        self._sync = sync
        self._canary = canary
        self._sequences = list(sequences)
        self._turns = turns

    def sync(self, version: int) -> Metrics:
        """Bring the engines to the learner's weights as `version` and prove it; then it is the engines' turn."""
        self._canary.take(self._sequences)
        self._turns.weights_to_engines()
        metrics = self._sync.sync(version)
        moved_s, self._turns.moved_s = self._turns.moved_s, 0.0
        return {**metrics, "sync/turns_s": moved_s}
