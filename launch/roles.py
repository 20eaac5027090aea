"""Starts the actors of a run and wires them into the `Roles` that the loop talks to.

Actors are created together and waited for afterwards, so their start-up overlaps. A method without routes starts
neither annotator nor teacher, and one on completions of a teacher an engine of its own for it.
"""

from __future__ import annotations

from typing import Any

from trace_rl.absent import AbsentAnnotator, AbsentTeacher
from trace_rl.config.learner import Lora
from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.flops import TransformerShape
from trace_rl.launch.annotators import ANNOTATOR, AnnotatorSetting, start_annotator
from trace_rl.launch.cluster import actor_of
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.preflight import Ready
from trace_rl.launch.run_folder import RunCheckpoints, RunFolder
from trace_rl.loop import Roles
from trace_rl.off_policy import MixedGenerator, SolutionGenerator, TeacherGenerator
from trace_rl.protocols import Annotator, Generator, Teacher
from trace_rl.workers.annotator import RayAnnotator
from trace_rl.workers.generator import VllmGenerator
from trace_rl.workers.generator_engine import ENGINE_THREADS, GeneratorEngine
from trace_rl.workers.learner import DeepSpeedLearner
from trace_rl.workers.rewarder import MAX_CONCURRENT_CALLS, MathRewarder, RayGrader
from trace_rl.workers.teacher import RayTeacher, TeacherModel
from trace_rl.workers.waiting import wait_for
from trace_rl.workers.weight_sender import transfer_backend
from trace_rl.workers.weight_sync import ProvenWeightSync, canary_sequences
from trace_rl.workers.weight_transport import AdapterObjects, Broadcast, Transport


def start_roles(ready: Ready, folder: RunFolder, journal: RunJournal) -> tuple[Roles, RunCheckpoints]:
    """Start every role that the configured method needs, and wait until all of them are ready.

    Raises:
        WorkerError: a role was not ready within placement.start_timeout_s; names it and the first cause.
    """
    config = ready.config
    engines = [_start_engine(index, ready, config.model) for index in range(config.generator.num_engines)]
    rewarder = actor_of(MathRewarder, config.placement.rewarder, max_concurrency=MAX_CONCURRENT_CALLS).remote(
        config.rewarder
    )
    started = {f"generator engine {index}": engine for index, engine in enumerate(engines)} | {"the rewarder": rewarder}
    if config.needs_teacher:
        teacher_actor = actor_of(TeacherModel, config.placement.teacher).remote(
            config.model, config.teacher, ready.vocab_size
        )
        started |= {"the teacher": teacher_actor}
    if config.needs_annotator:
        setting = AnnotatorSetting(config, ready.tokenizer, ready.rule, ready.annotation_types, folder.path)
        annotator_actors = start_annotator(setting, engines)
        started |= annotator_actors
    if config.sampling.source == "teacher":
        path = config.teacher.weights.start_path(config.model.path)
        model = config.model.model_copy(update={"path": path})
        # never synced: its weights are what it has loaded
        teacher_engine = _start_engine(config.generator.num_engines, ready, model, loaded_version=0)
        started |= {"the engine of the teacher": teacher_engine}
    learner = DeepSpeedLearner(config, folder.path)
    for name, actor in started.items():
        wait_for(actor.ready.remote(), config.placement.start_timeout_s, name, "starting")
    annotator: Annotator = AbsentAnnotator()
    teacher: Teacher = AbsentTeacher()
    teacher_shapes: list[TransformerShape] = []
    if config.needs_teacher:
        teacher = RayTeacher(teacher_actor, learner, config.teacher.weights, config.placement.step_timeout_s)
        teacher_shapes = teacher.shapes()
    if config.needs_annotator:
        annotator = RayAnnotator(annotator_actors[ANNOTATOR], config.annotator)
    canary = [*ready.canaries, *canary_sequences(len(ready.tokenizer))]
    generator = _generator(engines, config)
    sampler = _sampler(ready, generator, [teacher_engine] if config.sampling.source == "teacher" else [])
    sends_adapters = config.learner.sends_adapters
    transport: Transport = AdapterObjects(learner) if sends_adapters else Broadcast(learner, config.sync)
    checkpoints = RunCheckpoints(folder, learner, teacher, config.run.keep_checkpoints)
    roles = Roles(
        prompts=ready.prompts,
        encoder=ready.encoder,
        generator=generator,
        sampler=sampler,
        grader=RayGrader(rewarder, config.rewarder),
        annotator=annotator,
        teacher=teacher,
        teacher_shapes=teacher_shapes,
        learner=learner,
        weight_sync=ProvenWeightSync(learner, transport, engines, canary, config.sync),
        journal=journal,
        checkpoints=checkpoints,
    )
    return roles, checkpoints


def _generator(engines: list[Any], config: RunConfig) -> VllmGenerator:
    return VllmGenerator(engines, config.sampling.max_response_tokens, config.placement.step_timeout_s)


def _sampler(ready: Ready, generator: Generator, teacher_engines: list[Any]) -> Generator:
    """Whose completions are trained on: those of sampling.source, or of the policy's generator for a share of them."""
    sampling = ready.config.sampling
    sampler = generator
    if sampling.source == "teacher":
        sampler = TeacherGenerator(_generator(teacher_engines, ready.config))
    elif sampling.source == "solutions":
        sampler = SolutionGenerator(ready.tokenizer, sampling.max_response_tokens)
    if sampling.off_policy_frac < 1:
        sampler = MixedGenerator(generator, sampler, sampling.off_policy_frac)
    return sampler


def _start_engine(index: int, ready: Ready, model: Model, loaded_version: int | None = None) -> Any:
    config = ready.config
    return actor_of(GeneratorEngine, config.placement.generator, max_concurrency=ENGINE_THREADS).remote(
        index=index,
        model=model,
        settings=config.generator,
        max_model_len=ready.max_model_len,
        backend=transfer_backend(config.sync, config.placement),
        seed=config.run.seed,
        loaded_version=loaded_version,
        lora=config.learner.lora if config.learner.sends_adapters and loaded_version is None else Lora(),
    )
