"""Starts the actors of a run, each in its seat, and waits until all of them are ready.

Decides the order: actors are started together and waited for afterwards, so that their start-up overlaps; but a guest
starts behind its hosts, and where engines and learner take turns on their GPUs the engines are asleep before the
learner loads. A method without routes starts neither annotator nor teacher. Roles that die are started again by Ray in
their seats, but for the learner's ranks, and engines that take turns with them. What they are wired into is decided by
`trace_rl.launch.roles`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trace_rl.config.learner import Lora
from trace_rl.launch.annotators import AnnotatorSetting, start_annotator
from trace_rl.launch.placement import ENGINE_OF_TEACHER, REWARDER, TEACHER, engine_role, plan_placement, rank_role
from trace_rl.launch.preflight import Ready
from trace_rl.launch.seats import Place, Seats, actor_of, take_seats
from trace_rl.workers import heartbeat, life
from trace_rl.workers.generator_engine import ENGINE_THREADS, GeneratorEngine
from trace_rl.workers.learner import DeepSpeedLearner, learner_spec, rank_actors
from trace_rl.workers.revival import wait_until_ready
from trace_rl.workers.rewarder import MAX_CONCURRENT_CALLS, MathRewarder
from trace_rl.workers.teacher import TeacherModel
from trace_rl.workers.turns import Turns
from trace_rl.workers.weight_sender import transfer_backend


@dataclass(frozen=True)
class Actors:
    """Everyone who works for a run, ready."""

    handles: Mapping[str, Any]
    """By role; the learner's ranks are not among them."""
    engines: Sequence[Any]
    """The policy's, in the order of their index; by role they are among the handles too."""
    learner: DeepSpeedLearner
    turns: Turns | None
    """Of engines and learner on the same GPUs; None where each has its own."""
    board: Any
    """Where all of them give signs of life (`trace_rl.workers.heartbeat`)."""
    ranks: Mapping[str, Any]
    """The learner's, by role."""


def start_actors(ready: Ready, folder: Path) -> Actors:
    """Take the seats of all roles and start everyone.

    Raises:
        WorkerError: the cluster has not got the resources; or a role was not ready within placement.start_timeout_s:
            names it and the first cause.
    """
    config = ready.config
    board, name = heartbeat.open_board()
    seats = replace(
        take_seats(plan_placement(config), config.placement),
        signs=lambda role: life.variables(name, role, config.health.heartbeat_every_s),
    )
    places = [seats.place(rank_role(rank), {}) for rank in range(config.learner.world_size)]
    ranks = rank_actors(learner_spec(config, seats.is_one_machine), [place.options() for place in places])
    ranks_by_role = {rank_role(rank): actor for rank, actor in enumerate(ranks)}
    started: dict[str, Any] = dict(ranks_by_role)
    engines = _start_engines(ready, seats, started)
    turns = None
    if config.placement.mode == "colocated":
        _wait_until_ready(engines, config.placement.start_timeout_s)
        turns = Turns(engines, started, config.placement.step_timeout_s, config.learner.sends_adapters)
        turns.put_engines_to_sleep()
    started |= engines
    others = _start_others(ready, folder, seats, started)
    learner = DeepSpeedLearner(config, folder, ranks)
    _wait_until_ready({**engines, **others}, config.placement.start_timeout_s)
    return Actors({**engines, **others}, list(engines.values()), learner, turns, board, ranks_by_role)


def _start_engines(ready: Ready, seats: Seats, hosts: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's engines."""
    roles = [engine_role(index) for index in range(ready.config.generator.num_engines)]
    return {role: _engine(index, ready, seats.place(role, hosts)) for index, role in enumerate(roles)}


def _start_others(ready: Ready, folder: Path, seats: Seats, started: Mapping[str, Any]) -> dict[str, Any]:
    """All roles but the policy's engines and the learner's ranks, which have been started."""
    config = ready.config
    restarts = config.placement.role_restarts
    rewarder = actor_of(
        MathRewarder,
        seats.place(REWARDER, started),
        max_concurrency=MAX_CONCURRENT_CALLS,
        max_restarts=restarts,
        max_task_retries=restarts,  # grading again gives the same verdict
    )
    others = {REWARDER: rewarder.remote(config.rewarder)}
    if config.needs_teacher:
        teacher = actor_of(TeacherModel, seats.place(TEACHER, started), max_restarts=restarts)
        others[TEACHER] = teacher.remote(config.model, config.teacher, ready.vocab_size)
    if config.needs_annotator:
        setting = AnnotatorSetting(config, ready.tokenizer, ready.rule, ready.annotation_types, folder)
        engines = [started[engine_role(index)] for index in range(config.generator.num_engines)]
        others |= start_annotator(setting, engines, seats)
    if config.sampling.source == "teacher":
        others[ENGINE_OF_TEACHER] = _engine_of_teacher(ready, seats.place(ENGINE_OF_TEACHER, started))
    return others


def _engine(index: int, ready: Ready, place: Place) -> Any:
    """An engine of the policy, whose weights come with the first sync."""
    config = ready.config
    num_open = (1 + config.scheduling.max_staleness) * config.algorithm.dynamic_sampling.max_rounds
    restarts = 0 if config.placement.mode == "colocated" else config.placement.role_restarts
    return actor_of(GeneratorEngine, place, max_concurrency=ENGINE_THREADS + num_open, max_restarts=restarts).remote(
        index=index,
        model=config.model,
        settings=config.generator,
        max_model_len=ready.max_model_len,
        backend=transfer_backend(config.sync, config.placement),
        seed=config.run.seed,
        lora=config.learner.lora if config.learner.sends_adapters else Lora(),
        scheduling=config.scheduling,
        sleeps=config.placement.mode == "colocated",
    )


def _engine_of_teacher(ready: Ready, place: Place) -> Any:
    """An engine of the teacher's start weights, which are never synced: its weights are what it has loaded."""
    config = ready.config
    path = config.teacher.weights.start_path(config.model.path)
    restarts = config.placement.role_restarts
    return actor_of(GeneratorEngine, place, max_concurrency=ENGINE_THREADS, max_restarts=restarts).remote(
        index=config.generator.num_engines,
        model=config.model.model_copy(update={"path": path}),
        settings=config.generator,
        max_model_len=ready.max_model_len,
        backend=transfer_backend(config.sync, config.placement),
        seed=config.run.seed,
        loaded_version=0,
    )


def _wait_until_ready(actors: Mapping[str, Any], timeout_s: float) -> None:
    for role, actor in actors.items():
        wait_until_ready(actor, role, timeout_s, "starting (placement.start_timeout_s)")
