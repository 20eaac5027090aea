"""Turns on shared GPUs: nobody takes memory that the other side holds, and moving states away changes no number."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from learner_harness import BATCHES, Group, Weights, run_config

from trace_rl.errors import WorkerError
from trace_rl.workers.learner import learner_spec
from trace_rl.workers.turns import CanaryInTurns, LearnerInTurns, SyncInTurns, Turns

pytestmark = pytest.mark.engine

CANARY = [(1, 2, 3)]


class Card:
    """A GPU of 3 units: an engine has weights (1) and a cache (2), a rank weights (1) and states (2)."""

    SIZES = {"engine weights": 1, "cache": 2, "rank weights": 1, "states": 2}  # noqa: RUF012 - pickled by value

    def __init__(self) -> None:
        self._held = {"engine weights", "cache"}
        self._dropped = False
        self.peak = 3

    def sleep(self, level: int) -> None:
        self._held -= {"engine weights", "cache"}
        self._dropped = level == 2

    def wake(self, part: str) -> None:
        self._take({"weights": "engine weights", "kv_cache": "cache"}[part])

    def put_away(self, what: str) -> None:
        self._held.remove("states" if what == "states" else "rank weights")

    def take_back(self) -> None:
        for part in ("rank weights", "states"):
            self._take(part)

    def _take(self, part: str) -> None:
        self._held.add(part)
        held = sum(self.SIZES[each] for each in self._held)
        if held > 3:
            raise MemoryError(f"{held} units of 3: {sorted(self._held)}")

    def transfer(self) -> None:
        """New weights for the engine."""
        assert {"engine weights", "rank weights"} <= self._held
        self._dropped = False

    def compute(self, who: str) -> None:
        """Raise where the side does not have all that it needs."""
        needed = {"engine": {"engine weights", "cache"}, "rank": {"rank weights", "states"}}[who]
        if needed - self._held or (who == "engine" and self._dropped):
            raise RuntimeError(f"the {who} lacks {sorted(needed - self._held) or 'its weights'}")


class Ranks:
    """A learner that needs its whole memory for everything."""

    def __init__(self, card: Any) -> None:
        self._card = card
        self.done: list[str] = []

    def _work(self, what: str) -> Any:
        ray.get(self._card.compute.remote("rank"))
        self.done.append(what)

    def train_step(self, batch: Any) -> dict[str, float]:
        self._work("train")
        return {}

    def save(self, path: Path) -> None:
        self._work("save")

    def canary_logprobs(self, sequences: Any) -> list[np.ndarray]:
        self._work("canary")
        return [np.zeros(2) for _ in sequences]


class Proven:
    """A sync that transfers and then has both sides score, as the real one does."""

    def __init__(self, card: Any, canary: Any) -> None:
        self._card = card
        self._canary = canary

    def sync(self, version: int) -> dict[str, float]:
        ray.get(self._card.transfer.remote())
        scored = self._canary.canary_logprobs(CANARY)
        ray.get(self._card.compute.remote("engine"))
        return {"sync/version": float(version), "sync/scored": float(len(scored))}


@pytest.fixture
def card(local_ray: None) -> Iterator[Any]:
    actor = ray.remote(Card).options(num_cpus=0.1).remote()
    yield actor
    ray.kill(actor)


def sides(card: Any, keeps_weights: bool = False) -> tuple[LearnerInTurns, SyncInTurns, Ranks, Turns]:
    turns = Turns({"generator engine 0": card}, {"learner rank 0": card}, 20, keeps_weights)
    turns.put_engines_to_sleep()
    ray.get(card.take_back.remote())  # the learner loads
    ranks = Ranks(card)
    learner = LearnerInTurns(ranks, turns)  # type: ignore[arg-type]
    canary = CanaryInTurns(learner, turns)
    return learner, SyncInTurns(Proven(card, canary), canary, CANARY, turns), ranks, turns


def test_a_run_in_turns_never_needs_more_than_one_side_does(card: Any) -> None:
    learner, sync, ranks, turns = sides(card)
    for step in range(2):
        assert sync.sync(step)["sync/scored"] == 1
        ray.get(card.compute.remote("engine"))  # rollouts
        learner.train_step(None)  # type: ignore[arg-type]
    metrics = sync.sync(2)
    assert metrics["sync/version"] == 2 and metrics["sync/turns_s"] > 0
    assert ranks.done == ["canary", "train", "canary", "train", "canary"]
    assert not turns.is_learners


def test_a_checkpoint_between_syncs_leaves_engines_with_their_weights(card: Any) -> None:
    learner, sync, ranks, _ = sides(card)
    sync.sync(0)
    learner.save(Path("step"))
    ray.get(card.compute.remote("engine"))
    assert ranks.done == ["canary", "save"]
    learner.train_step(None)  # type: ignore[arg-type]
    learner.save(Path("step"))  # in the learner's own turn, which goes on
    assert ranks.done[2:] == ["train", "save"]
    with pytest.raises(ray.exceptions.RayTaskError, match="the engine lacks"):
        ray.get(card.compute.remote("engine"))


def test_a_sync_of_adapters_never_drops_the_weights_below_them(card: Any) -> None:
    learner, *_, turns = sides(card, keeps_weights=True)
    turns.weights_to_engines()
    turns.rest_to_engines()
    ray.get(card.compute.remote("engine"))
    learner.train_step(None)  # type: ignore[arg-type]
    turns.weights_to_engines()
    turns.rest_to_engines()
    ray.get(card.compute.remote("engine"))


def test_who_does_not_move_is_named(card: Any) -> None:
    *_, turns = sides(card)
    with pytest.raises(WorkerError, match=r"generator engine 0 failed while waking up its cache: MemoryError: 4 units"):
        turns.rest_to_engines()  # while the learner still has its states: 2 + 2


@pytest.mark.parametrize(
    ("zero_stage", "offload"), [(1, "none"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "all")]
)
def test_states_that_were_away_train_on_as_if_they_had_not_been(
    zero_stage: int, offload: str, groups: dict[int, Group], model_path: str
) -> None:
    config = run_config(model_path, world_size=2, zero_stage=zero_stage, offload=offload)

    def trained(moves: bool) -> tuple[Weights, list[float]]:
        group = groups[2].build(learner_spec(config))
        losses = []
        for batch in BATCHES[:2]:
            losses.append(group.loss(batch))
            if moves:
                group.all("call", "put_away", "states")
                between = group.weights()  # as a sync sends them
                group.all("call", "put_away", "weights")
                group.all("call", "take_back")
                assert all((between[name] == weight).all() for name, weight in group.weights().items())
        return group.weights(), losses

    (weights, losses), (expected, expected_losses) = trained(moves=True), trained(moves=False)
    assert losses == expected_losses
    assert all((weights[name] == expected[name]).all() for name in expected)
