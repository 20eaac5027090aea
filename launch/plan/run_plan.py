"""What a run is going to do and to take, before anything is taken: the plan that `trace-rl plan` and `train` show.

Decides what belongs into a plan and what a cluster lacks for it. Nothing is started and no weights are read: shapes
come from config.json, prompts from the data, and nodes from whoever has asked for them. How it reads is decided by
`trace_rl.launch.plan.text`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from trace_rl.annotators import Frozen, Static
from trace_rl.config.learner import LearnerSettings
from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.config.teacher import External
from trace_rl.errors import TraceError
from trace_rl.launch import placement as seats
from trace_rl.launch import preflight
from trace_rl.launch.annotation_cost import Cost
from trace_rl.launch.annotator_checks import self_annotation_tokens
from trace_rl.launch.model_files import resolve_model
from trace_rl.launch.placement import Node, PlacementPlan, missing, plan_placement
from trace_rl.launch.plan.batch import BatchPlan, SyncPlan, annotation_at_most, plan_batch, plan_sync
from trace_rl.launch.plan.hardware import Hardware
from trace_rl.launch.plan.memory import (
    ENGINE,
    CacheMemory,
    Forecast,
    RoleMemory,
    engine_memory,
    learner_memory,
    teacher_memory,
)
from trace_rl.launch.plan.shapes import ModelShape, model_shape
from trace_rl.launch.plan.stages import Given
from trace_rl.launch.plan.warnings import Facts, warnings_of
from trace_rl.launch.plan.workload import Expected, workload
from trace_rl.launch.prompt_sources import open_source
from trace_rl.protocols import PromptSource
from trace_rl.workers.learner import learner_spec
from trace_rl.workers.policy_model import attention_of


@dataclass(frozen=True)
class RunPlan:
    """Everything that is known of a run before it starts."""

    config: RunConfig
    """With model.path resolved."""
    shape: ModelShape
    teacher_shape: ModelShape
    """Of the models that the teacher runs; the policy's where there is none."""
    batch: BatchPlan
    placement: PlacementPlan
    sync: SyncPlan
    forecast: Forecast
    annotation: Cost | None
    """At most; None where no language model is asked."""
    warnings: tuple[str, ...]
    refusals: tuple[str, ...]
    """Why `train` would not start."""

    def given(self, expected: Expected, hardware: Hardware) -> Given:
        """What the cost of its steps is worked out from."""
        return Given(
            config=self.config,
            shape=self.shape,
            teacher=self.teacher_shape,
            sync=self.sync,
            cache_bytes=self.forecast.caches[ENGINE].pool,
            work=workload(self.config, expected),
            hardware=hardware,
        )


def plan_checked(config: RunConfig, gpu_bytes: int | None) -> RunPlan:
    """The plan of a configuration, with what `train`'s own checks say of it.

    Args:
        gpu_bytes: memory of the GPUs that it is meant for; None: not known.

    Raises:
        TraceError: there is nothing to plan with, such as a model without config.json.
    """
    refusals: list[str] = []
    prompts: PromptSource | None = None
    with _warnings_of_checks() as warnings:
        try:
            ready = preflight.check(config)
            config, prompts = ready.config, ready.prompts
        except TraceError as error:
            refusals.append(str(error))
            config = config.model_copy(update={"model": resolve_model(config.model)})
            prompts = _prompts_if_any(config)
    return plan_run(config, prompts, gpu_bytes, warnings, refusals)


def plan_run(
    config: RunConfig,
    prompts: PromptSource | None,
    gpu_bytes: int | None,
    warnings: Sequence[str] = (),
    refusals: Sequence[str] = (),
) -> RunPlan:
    """The plan of a configuration whose model is resolved.

    Args:
        prompts: of the run; None where they could not be read.
        warnings: that checks have given already.
        refusals: of checks that have failed already.
    """
    try:
        learner_spec(config)
    except TraceError as error:
        refusals = [*refusals, str(error)]
    shape = model_shape(config.model, config.learner, _device(config.placement.learner.num_gpus))
    rows = getattr(prompts, "train_prompts", None)
    batch = plan_batch(config, shape.layout, len(rows) if rows is not None else None)
    placement, sync = plan_placement(config), plan_sync(config, shape)
    has_teacher = config.needs_teacher or config.sampling.source == "teacher"
    teacher = _teacher_shape(config, shape) if has_teacher else shape
    forecast = forecast_of(config, shape, teacher, sync, placement, gpu_bytes)
    model = config.annotator.backend.model if config.needs_annotator else None
    facts = Facts(config, batch, placement, shape, sync, forecast)
    return RunPlan(
        config=config,
        shape=shape,
        teacher_shape=teacher,
        batch=batch,
        placement=placement,
        sync=sync,
        forecast=forecast,
        annotation=annotation_at_most(config, model) if model else None,
        warnings=(*warnings, *warnings_of(facts)),
        refusals=tuple(refusals),
    )


def problems(plan: RunPlan, nodes: Sequence[Node]) -> list[str]:
    """Why the run cannot start, or not fit: what the checks refuse, what the nodes lack, what a GPU cannot hold."""
    return [*plan.refusals, *missing(plan.placement, nodes), *_too_much_for_a_gpu(plan)]


def _too_much_for_a_gpu(plan: RunPlan) -> list[str]:
    """Roles, with their guests, that need more memory than a GPU has."""
    forecast, gpu = plan.forecast, plan.forecast.gpu_bytes
    if gpu is None:
        return []
    found: list[str] = []
    for memory in forecast.roles:
        role = memory.roles[0]
        if not plan.placement.uses_gpu(role):
            continue
        cache = forecast.caches.get(memory.name)
        if cache is not None:
            found += _too_much_for_an_engine(plan, memory, cache, gpu)
        elif memory.peak > gpu:
            found.append(
                f"{_those(memory)} needs about {_gib(memory.peak)} of GPU memory ({_largest(memory)}), but a GPU has "
                f"{_gib(gpu)}; {_ADVICE[memory.name]}"
            )
    return [*found, *_too_much_together(plan, gpu)]


_ADVICE = {
    "learner rank": (
        "raise learner.world_size or learner.zero_stage, set learner.offload or learner.gradient_checkpointing, or "
        "lower learner.max_tokens_per_micro_batch"
    ),
    "teacher": "lower teacher.max_tokens_per_batch, or choose a smaller teacher",
}


def _too_much_for_an_engine(plan: RunPlan, memory: RoleMemory, cache: CacheMemory, gpu: int) -> Iterator[str]:
    sequences = cache.sequences
    if sequences is not None and sequences < 1:
        weights, sequence = memory.items[0].nbytes, cache.bytes_per_token * cache.sequence_tokens
        yield (
            f"the {memory.name} has room for {sequences:.1f} sequences of {cache.sequence_tokens:,} tokens in its "
            f"share of a GPU of {_gib(gpu)} (weights {_gib(weights)}, {_gib(sequence)} "
            "a sequence); raise gpu_memory_frac or tensor_parallel, or lower sampling.max_response_tokens"
        )
    seat = plan.placement.seats[memory.roles[0]]
    if 0 < seat.num_gpus < 1 and memory.peak > seat.num_gpus * gpu:
        yield (
            f"the {memory.name} takes {_gib(memory.peak)} of a GPU of {_gib(gpu)} (gpu_memory_frac), but asks Ray for "
            f"{seat.num_gpus:g} of it ({seat.setting}.num_gpus); lower the former or raise the latter"
        )


def _too_much_together(plan: RunPlan, gpu: int) -> Iterator[str]:
    """A teacher beside those on its GPUs; engines and learner ranks that share GPUs take turns instead."""
    guest = plan.placement.seats.get(seats.TEACHER)
    teacher = plan.forecast.of(seats.TEACHER)
    if guest is None or teacher is None or not guest.hosts or not plan.placement.uses_gpu(seats.TEACHER):
        return
    beside = [
        role
        for role, seat in plan.placement.seats.items()
        if role in guest.hosts or (role != seats.TEACHER and set(seat.hosts) & set(guest.hosts))
    ]
    for host in beside:
        memory = plan.forecast.of(host)
        if memory is not None and memory.peak + teacher.peak > gpu:
            yield (
                f"{host} ({_gib(memory.peak)}) and the teacher ({_gib(teacher.peak)}) share a GPU of {_gib(gpu)}; give "
                "the teacher its own (placement.teacher_place=own), or make room"
            )


def forecast_of(
    config: RunConfig,
    shape: ModelShape,
    teacher: ModelShape,
    sync: SyncPlan,
    placement: PlacementPlan,
    gpu_bytes: int | None,
) -> Forecast:
    """The memory of all roles that hold a model."""
    engines = tuple(seats.engine_role(index) for index in range(config.generator.num_engines))
    ranks = tuple(seats.rank_role(rank) for rank in range(config.learner.world_size))
    longest = max(config.max_sequence_tokens, self_annotation_tokens(config))
    has_gpu = placement.uses_gpu(engines[0])
    memory, cache = engine_memory(ENGINE, engines, shape, config.generator, longest, has_gpu, gpu_bytes)
    learner = learner_memory(config, shape, ranks, sync, placement.uses_gpu(ranks[0]))
    roles, caches = [memory, learner], {ENGINE: cache}
    if config.needs_teacher:
        roles.append(teacher_memory(config, teacher, (seats.TEACHER,)))
    if config.sampling.source == "teacher":
        name = seats.ENGINE_OF_TEACHER
        memory, caches[name] = engine_memory(name, (name,), teacher, config.generator, longest, has_gpu, gpu_bytes)
        roles.append(memory)
    model = config.annotator.backend.model
    if config.has_annotator_engine and isinstance(model, Static | Frozen):
        name = seats.ENGINE_OF_ANNOTATOR
        own, has_one = _annotator_shape(config, model, shape), placement.uses_gpu(name)
        memory, caches[name] = engine_memory(name, (name,), own, model.engine, model.context_tokens, has_one, gpu_bytes)
        roles.append(memory)
    return Forecast(tuple(roles), caches, gpu_bytes)


def _teacher_shape(config: RunConfig, shape: ModelShape) -> ModelShape:
    weights = config.teacher.weights
    if not isinstance(weights, External):
        attention = attention_of(config.model, _device(config.placement.teacher.num_gpus))  # not the learner's
        return replace(shape, is_flash=attention.startswith("flash_attention"))
    return _shape_of(config.model.model_copy(update={"path": weights.path}), "teacher.weights.path")


def _annotator_shape(config: RunConfig, model: Static | Frozen, shape: ModelShape) -> ModelShape:
    if isinstance(model, Static):
        return shape
    other = Model(path=model.path, dtype=model.dtype, trust_remote_code=model.trust_remote_code)
    return _shape_of(other, "annotator.backend.path")


def _shape_of(model: Model, setting: str) -> ModelShape:
    """Of a model that is read and not trained."""
    return model_shape(resolve_model(model, setting), LearnerSettings(), _device(0), setting)


def _device(num_gpus: float) -> torch.device:
    return torch.device("cuda" if num_gpus else "cpu")


def _prompts_if_any(config: RunConfig) -> PromptSource | None:
    try:
        return open_source(config)
    except TraceError:
        return None


@contextmanager
def _warnings_of_checks() -> Iterator[list[str]]:
    """Collects what the checks warn of, which would go to the terminal before the plan."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    source, collector = logging.getLogger(preflight.__name__), Collector(logging.WARNING)
    source.addHandler(collector)
    source.propagate, before = False, source.propagate
    try:
        yield found
    finally:
        source.propagate = before
        source.removeHandler(collector)


def _those(memory: RoleMemory) -> str:
    return memory.roles[0] if len(memory.roles) == 1 else f"each {memory.name}"


def _largest(memory: RoleMemory) -> str:
    items = sorted((item for item in memory.items if item.place == "device"), key=lambda item: -item.nbytes)[:3]
    return ", ".join(f"{item.what} {_gib(item.nbytes)}" for item in items)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
