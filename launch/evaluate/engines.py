"""The engines and the rewarder of an evaluation, for one checkpoint after another.

Decides which actors are started and when their seats are given back. What is asked of them is `sampling`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trace_rl.batch import Rollout, RolloutRequest
from trace_rl.config.evaluation import EvalConfig, EvalSet
from trace_rl.config.roles import Sync
from trace_rl.launch.evaluate.subjects import Subject
from trace_rl.launch.placement import REWARDER, engine_role, plan_evaluation
from trace_rl.launch.seats import Seats, actor_of, take_seats
from trace_rl.plain_answers import RuleGrader, chooses, ends_on
from trace_rl.protocols import Decoding, Grader
from trace_rl.workers.generator import VllmGenerator
from trace_rl.workers.generator_engine import ENGINE_THREADS, GeneratorEngine
from trace_rl.workers.rewarder import MAX_CONCURRENT_CALLS, MathRewarder, RayGrader
from trace_rl.workers.waiting import wait_for
from trace_rl.workers.weight_sender import transfer_backend


class Crew:
    """Engines that have loaded a checkpoint, and a rewarder."""

    def __init__(self, engines: Sequence[Any], grader: Grader, timeout_s: float) -> None:
        self._engines = engines
        self._graders: dict[str, Grader] = {
            "math": grader,
            "text": RuleGrader(ends_on),
            "letter": RuleGrader(chooses),
        }
        self._timeout_s = timeout_s

    def generate(self, settings: EvalSet, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        """Submit a set's requests now; iterate to receive."""
        generator = VllmGenerator(self._engines, settings.max_response_tokens, self._timeout_s, "timeout_s")
        return generator.generate(requests, decoding)

    def grader(self, settings: EvalSet) -> Grader:
        """Who grades a set."""
        return self._graders[settings.answer_form]


@contextmanager
def crew_of(subject: Subject, config: EvalConfig, max_model_len: int) -> Iterator[Crew]:
    """Start everyone for a checkpoint; at the end of the block their seats are given back.

    Raises:
        WorkerError: the resources are not there, or an actor was not ready within placement.start_timeout_s.
    """
    import ray

    seats = take_seats(plan_evaluation(config.generator, config.placement), config.placement)
    engines = [_engine(index, subject, config, max_model_len, seats) for index in range(config.generator.num_engines)]
    place = seats.place(REWARDER, {})
    rewarder = actor_of(MathRewarder, place, max_concurrency=MAX_CONCURRENT_CALLS).remote(config.rewarder)
    started = {**{engine_role(index): engine for index, engine in enumerate(engines)}, REWARDER: rewarder}
    try:
        for role, actor in started.items():
            what = f"starting for {subject.label} (placement.start_timeout_s)"
            wait_for(actor.ready.remote(), config.placement.start_timeout_s, role, what)
        yield Crew(engines, RayGrader(rewarder, config.rewarder), config.timeout_s)
    finally:
        for actor in started.values():  # at once: an engine that is asked to end would hold its memory for the next
            ray.kill(actor)
        seats.give_back()


def _engine(index: int, subject: Subject, config: EvalConfig, max_model_len: int, seats: Seats) -> Any:
    """An engine whose weights are what it has loaded; it is never synced."""
    place = seats.place(engine_role(index), {})
    return actor_of(GeneratorEngine, place, max_concurrency=ENGINE_THREADS + len(config.sets)).remote(
        index=index,
        model=subject.model,
        settings=config.generator,
        max_model_len=max_model_len,
        backend=transfer_backend(Sync(), config.placement),
        seed=config.seed,
        loaded_version=0,
    )
