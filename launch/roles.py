"""Wires the actors of a run into the `Roles` that the loop talks to; who is started, and where, is `launch.actors`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trace_rl.absent import AbsentAnnotator, AbsentTeacher
from trace_rl.config.run import RunConfig
from trace_rl.flops import TeacherCost
from trace_rl.launch.actors import Actors, start_actors
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.placement import ANNOTATOR, ENGINE_OF_TEACHER, REWARDER, TEACHER, engine_role
from trace_rl.launch.plan.memory import checkpoint_bytes
from trace_rl.launch.plan.shapes import model_shape
from trace_rl.launch.preflight import Ready
from trace_rl.launch.run_checkpoints import RunCheckpoints
from trace_rl.launch.run_folder import RunFolder
from trace_rl.loop import Roles
from trace_rl.off_policy import MixedGenerator, SolutionGenerator, TeacherGenerator
from trace_rl.protocols import Annotator, Generator, PromptLedger, Teacher, WeightSync
from trace_rl.workers.annotator import RayAnnotator
from trace_rl.workers.generator import NoRecovery, Recovery, VllmGenerator
from trace_rl.workers.heartbeat import HeartbeatWatch
from trace_rl.workers.idle import IdleMeter, IdleShares
from trace_rl.workers.learner import DeepSpeedLearner
from trace_rl.workers.revival import Lives
from trace_rl.workers.rewarder import RayGrader
from trace_rl.workers.teacher import RayTeacher
from trace_rl.workers.turns import CanaryInTurns, LearnerInTurns, SyncInTurns
from trace_rl.workers.weight_sender import transfer_backend
from trace_rl.workers.weight_sync import ProvenWeightSync, canary_sequences
from trace_rl.workers.weight_transport import AdapterObjects, Transport, transport_of


@dataclass(frozen=True)
class Crew:
    """Everyone who takes part in a run, as its parts need them."""

    roles: Roles
    checkpoints: RunCheckpoints
    watch: HeartbeatWatch
    """To be entered for the time of the run."""
    computing: Mapping[str, Any]
    """Role -> its actor, of those that run a model."""


@dataclass(frozen=True)
class _Figures:
    """Implements `trace_rl.protocols.Utilisation`: what is counted of all roles."""

    idle: IdleShares
    watch: HeartbeatWatch

    def metrics(self) -> dict[str, float]:
        return self.idle.metrics() | self.watch.metrics()


def start_roles(ready: Ready, folder: RunFolder, journal: RunJournal, ledger: PromptLedger) -> Crew:
    """Start every role that the configured method needs, and wait until all of them are ready.

    Raises:
        WorkerError: the cluster has not got the resources; or a role was not ready within placement.start_timeout_s:
            names it and the first cause.
    """
    config = ready.config
    actors = start_actors(ready, folder.path)
    handles, engines = actors.handles, actors.engines
    learner = actors.learner if actors.turns is None else LearnerInTurns(actors.learner, actors.turns)
    annotator: Annotator = AbsentAnnotator()
    teacher: Teacher = AbsentTeacher()
    teacher_cost = TeacherCost()
    idle: dict[str, Sequence[IdleMeter]] = {}
    if config.needs_teacher:
        placement = config.placement
        teacher = RayTeacher(
            handles[TEACHER], learner, config.teacher.weights, placement.step_timeout_s, placement.start_timeout_s
        )
        teacher_cost = teacher.cost()
        idle["teacher"] = [teacher.idle]
    if config.needs_annotator:
        annotator = RayAnnotator(handles[ANNOTATOR], config.annotator)
        idle["annotator"] = [annotator.idle]
    weight_sync, recovery = _weight_sync(ready, learner, actors)
    generator = _generator(engines, config, recovery)
    sampler = _sampler(ready, generator, [handles[ENGINE_OF_TEACHER]] if config.sampling.source == "teacher" else [])
    grader = RayGrader(handles[REWARDER], config.rewarder)
    idle |= {"generator": generator.idle, "rewarder": [grader.idle], "learner": [actors.learner.idle]}
    watch = _watch(config, actors, recovery)
    shape = model_shape(config.model, config.learner, torch.device("cpu"))
    expected_bytes = checkpoint_bytes(config, shape)
    checkpoints = RunCheckpoints(folder, learner, teacher, config.run, expected_bytes, journal.score_at)
    roles = Roles(
        prompts=ready.prompts,
        encoder=ready.encoder,
        generator=generator,
        sampler=sampler,
        grader=grader,
        annotator=annotator,
        teacher=teacher,
        teacher_cost=teacher_cost,
        learner=learner,
        policy_shape=shape.transformer,
        weight_sync=weight_sync,
        utilisation=_Figures(IdleShares(idle), watch),
        journal=journal,
        checkpoints=checkpoints,
        ledger=ledger,
        evaluation_sets=ready.evaluation_sets,
    )
    computing = {role: actor for role, actor in handles.items() if role not in (REWARDER, ANNOTATOR)}
    return Crew(roles, checkpoints, watch, {**computing, **actors.ranks})


def _watch(config: RunConfig, actors: Actors, recovery: Recovery) -> HeartbeatWatch:
    indices = {engine_role(index): index for index in range(len(actors.engines))}

    def is_proven(role: str, life: str) -> bool:
        return role not in indices or recovery.life(indices[role]) == life

    return HeartbeatWatch(actors.board, {**actors.handles, **actors.ranks}, config.health, is_proven)


def _generator(engines: Sequence[Any], config: RunConfig, recovery: Recovery) -> VllmGenerator:
    # what is sampled ahead has the time of the steps that it is ahead of
    patience_s = config.placement.step_timeout_s * (1 + config.scheduling.max_staleness)
    hands_over = not config.scheduling.is_synchronous  # a synchronous run waits, and stays the same to the last bit
    return VllmGenerator(
        engines, config.sampling.max_response_tokens, patience_s, recovery=recovery, hands_over=hands_over
    )


def _sampler(ready: Ready, generator: Generator, teacher_engines: Sequence[Any]) -> Generator:
    """Whose completions are trained on: those of sampling.source, or of the policy's generator for a share of them."""
    config, sampling = ready.config, ready.config.sampling
    sampler = generator
    if sampling.source == "teacher":
        recovery = Lives(teacher_engines, config.placement.start_timeout_s)
        sampler = TeacherGenerator(_generator(teacher_engines, config, recovery))
    elif sampling.source == "solutions":
        sampler = SolutionGenerator(ready.tokenizer, sampling.max_response_tokens)
    if sampling.off_policy_frac < 1:
        sampler = MixedGenerator(generator, sampler, sampling.off_policy_frac)
    return sampler


def _weight_sync(
    ready: Ready, learner: DeepSpeedLearner | LearnerInTurns, actors: Actors
) -> tuple[WeightSync, Recovery]:
    """The learner's way to the policy's engines, with proof, and how engines that died come back on it."""
    config, turns = ready.config, actors.turns
    source, backend = actors.learner, transfer_backend(config.sync, config.placement)
    transport: Transport = AdapterObjects(source)
    if not config.learner.sends_adapters:
        transport = transport_of(source, config.sync, backend, config.generator.tensor_parallel)
    sequences = [*ready.canaries, *canary_sequences(len(ready.tokenizer))]
    if turns is None:
        patience_s = config.placement.start_timeout_s
        proven = ProvenWeightSync(
            source, transport, actors.engines, sequences, config.sync, patience_s, actors.learner.lock
        )
        return proven, proven
    canary = CanaryInTurns(learner, turns)
    in_turns = ProvenWeightSync(canary, transport, actors.engines, sequences, config.sync)
    return SyncInTurns(in_turns, canary, sequences, turns), NoRecovery()
