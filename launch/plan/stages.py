"""How long each stage of a step takes: counts of operations and bytes, and the roofs of the hardware.

Every stage is worked out in the same way,

    seconds = seconds at the roofs / share of them that is reached + rounds x seconds that a round takes in any case

where a stage is at the roofs as fast as memory, products or links allow. Counts follow from the configuration, the
shapes of the models and the expected workload; sequences are spread evenly over ranks, and padding is left out. Units
are seconds, bytes and floating point operations, of which a multiplication and an addition are two. Where a formula
cites nothing it is our own arithmetic. Must not know who waits for whom (`cost`).

In the formulas F(T, R) are the operations of a forward pass over T tokens with R rows through the output head
(`TransformerShape.forward_flops`), p is the length of a prompt, r that of a response, and E the mean over responses.

Left out: evaluations and checkpoints, the optimizer's own arithmetic, all-reduces of tensor parallelism, moving states
to CPU memory (learner.offload, colocated placement), rounds of dynamic sampling, prompts that are given up, and passes
that rank tokens or draw diagnostics. Models are dense, with full causal attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trace_rl.config.run import RunConfig
from trace_rl.launch.plan.batch import SyncPlan, prompts_in_flight
from trace_rl.launch.plan.hardware import Hardware
from trace_rl.launch.plan.memory import kv_bytes_per_token
from trace_rl.launch.plan.shapes import ModelShape
from trace_rl.launch.plan.workload import Workload
from trace_rl.packing import Extent, units_of
from trace_rl.routing import teacher_views
from trace_rl.token_layout import SharedPrompts

Bound = Literal["memory", "products", "link", "overhead"]
GENERATION, GRADING, ANNOTATION = "generation", "grading", "annotation"
TEACHER, LEARNER, SYNC, DRIVER = "teacher", "learner", "sync", "driver"
_HEAD_PRODUCTS = 3
"""With the output head for a token: forward, gradient of the state, gradient of the head (`trace_rl.head_loss`)."""
_GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in float32 (`trace_rl.workers.deepspeed_engine`)."""


@dataclass(frozen=True)
class Given:
    """What a cost is worked out from."""

    config: RunConfig
    shape: ModelShape
    """Of the policy."""
    teacher: ModelShape
    sync: SyncPlan
    cache_bytes: int | None
    """Of the key-value cache of one engine's worker; None: not known, so that nothing is held up by it."""
    work: Workload
    hardware: Hardware

    def over_responses(self, count: Callable[[float], float]) -> float:
        """E[count(r)]."""
        lengths = self.work.responses.quantiles
        return sum(map(count, lengths)) / len(lengths)


@dataclass(frozen=True)
class Stage:
    """One kind of work of a step, as long as those whose work it is take for it."""

    name: str
    roof_s: float
    """At the roofs."""
    rounds: float
    """Token steps of an engine, passes of the learner, ...: what takes some time however small it is."""
    seconds: float
    bound: Bound


def _stage(name: str, parts: Mapping[Bound, float], share: float, rounds: float = 0.0, round_s: float = 0.0) -> Stage:
    """A stage whose parts follow each other at the roofs, in seconds by what bounds them."""
    roof_s = sum(parts.values())
    work_s, fixed_s = roof_s / share, rounds * round_s
    bound: Bound = max(parts, key=lambda part: parts[part]) if work_s > fixed_s else "overhead"
    return Stage(name, roof_s, rounds, work_s + fixed_s, bound)


@dataclass(frozen=True)
class Decoding:
    """What one engine does for a step."""

    sequences: int
    at_once: float
    """Sequences that it runs at a time."""
    token_steps: float
    nbytes: float
    """That each of its workers reads from memory while writing."""
    flops: float
    """Of each of its workers, while writing."""
    prefill_flops: float
    """Of each of its workers, while reading prompts."""


def decoding(given: Given, is_steady: bool) -> Decoding:
    """n responses on an engine that runs c of them at once, where a sequence that is complete makes room for the next.

    token steps = longest + max(n / c - 1, 0) E[r]    a batch that has to be complete; n / c E[r] where others follow it
    bytes       = token steps x W / k + n x kv x E[p r + r^2 / 2]
    operations  = n x E[F(p + r, r) - F(p, 0)] / k

    for the weights W that a token passes, k workers that share them, and kv bytes of cache a token and worker: a token
    step reads the weights once for all sequences, and the keys and values of each one's context. Prompts are read once
    for all of their samples, F(p, 1) / k; where a sync lets completions run through it, what is being written is read
    again by the new weights (scheduling.partial: resume), half written on average: c F(p + E[r] / 2, 1) / k.

    Args:
        is_steady: others follow, so that nobody waits for the longest response.
    """
    config, work, model = given.config, given.work, given.shape.transformer
    engines, workers = config.generator.num_engines, config.generator.tensor_parallel
    prompts = -(-work.prompts // engines)
    sequences, p, mean = prompts * work.samples, work.prompt_tokens, work.responses.mean
    kv = kv_bytes_per_token(given.shape, workers)
    in_flight = sequences * prompts_in_flight(config) / config.sampling.prompts_per_step if is_steady else sequences
    at_once = min(in_flight, config.generator.max_concurrent_sequences)
    if given.cache_bytes is not None:
        at_once = max(1.0, min(at_once, given.cache_bytes / (kv * (p + mean))))
    waves = sequences / at_once
    steps = waves * mean if is_steady else work.responses.longest + max(waves - 1, 0.0) * mean
    weights = (model.num_layer_parameters + model.hidden * model.vocab) * given.shape.bytes_per_value
    contexts = sequences * given.over_responses(lambda r: p * r + r**2 / 2)
    flops = sequences * given.over_responses(lambda r: model.forward_flops(p + r, r) - model.forward_flops(p, 0))
    is_read_again = is_steady and config.scheduling.partial == "resume"
    again = at_once * model.forward_flops(p + mean / 2, 1) if is_read_again else 0.0
    return Decoding(
        sequences=sequences,
        at_once=at_once,
        token_steps=steps,
        nbytes=steps * weights / workers + contexts * kv,
        flops=flops / workers,
        prefill_flops=(prompts * model.forward_flops(p, 1) + again) / workers,
    )


def generation(given: Given, is_steady: bool = False) -> Stage:
    """max(bytes / bandwidth, operations / roof) while writing, and operations / roof while reading (`decoding`).

    Decoding is bound by memory until so many sequences run at once that their products take longer than reading the
    weights (Pope et al. 2022, arXiv:2211.05102, section 2).
    """
    done, hardware = decoding(given, is_steady), given.hardware
    memory_s = done.nbytes / hardware.roofs.copy_bytes_per_s
    products_s = done.flops / hardware.roofs.matmul_flops
    prefill_s = done.prefill_flops / hardware.roofs.matmul_flops
    writing: Mapping[Bound, float] = {"memory": memory_s} if memory_s > products_s else {"products": products_s}
    parts = {**writing, "products": writing.get("products", 0.0) + prefill_s}
    return _stage(GENERATION, parts, hardware.shares.generation, done.token_steps, hardware.fixed.token_s)


def grading(given: Given) -> Stage:
    """n / processes x seconds of a completion, while others are being written."""
    rounds = given.work.num_rollouts / given.config.rewarder.num_processes
    return _stage(GRADING, {"overhead": 0.0}, 1.0, rounds, given.hardware.fixed.grading_s)


def annotation(given: Given, has_routes: bool) -> Stage:
    """n requests at the lower of concurrency / seconds of a reply and requests_per_minute / 60, while others are being
    written; no time for rules and recordings, and for a model whose replies take a time that is not known."""
    config, work = given.config, given.work
    model = config.annotator.backend.model if config.needs_annotator and has_routes else None
    rounds = work.num_rollouts if model else 0
    limits = model.limits if model else None
    apart_s = work.annotation_s / limits.concurrency if limits else 0.0
    if limits and limits.requests_per_minute:
        apart_s = max(apart_s, 60 / limits.requests_per_minute)
    return _stage(ANNOTATION, {"overhead": 0.0}, 1.0, rounds, apart_s)


def teacher_flops(given: Given, step: int) -> float:
    """m n x sum over views of E[F(p + context + reach r, rows)] for m models and the n rollouts with routed tokens.

    Rows are the routed tokens where log-probs or entropies are read; states go to the learner without a product. See
    `trace_rl.step_metrics.teacher_metrics`, which counts the same of a real step and subtracts what the last layer
    spares tokens that are not read: less than a layer, so that the work of a model of four is told up to 1.3 times too
    large.
    """
    config, work, model = given.config, given.work, given.teacher.transformer
    rollouts = work.num_rollouts * work.routed_rollouts_frac
    if not rollouts:
        return 0.0
    within = work.routed_tokens_frac / work.routed_rollouts_frac

    def of(has_rows: bool) -> float:
        start = work.prompt_tokens + work.context_tokens
        return given.over_responses(
            lambda r: model.forward_flops(start + work.routed_reach_frac * r, within * r * has_rows)
        )

    views = [bool(view.outputs & {"logprobs", "entropy"}) for view in teacher_views(config, step)]
    return len(config.teacher.weights.shares()) * rollouts * sum(map(of, views))


def teacher(given: Given, busy: Sequence[int]) -> Stage:
    """Operations / roof of one teacher, and bytes / link of what it is given and gives.

    bytes = n E[r] x routed share x views x m d b of states, and W of the policy's weights at steps that refresh them.

    Rounds are batches: full ones, but at least one for each call.

    Args:
        busy: the steps with routes, the step being one of them; none where it is not.
    """
    config, work, hardware = given.config, given.work, given.hardware
    if not busy:
        return _stage(TEACHER, {"products": 0.0}, 1.0)
    models = len(config.teacher.weights.shares())
    shipped = 2 if config.teacher.states == "bfloat16" else given.teacher.bytes_per_value
    views = teacher_views(config, busy[0])
    rows = work.num_rollouts * work.responses.mean * work.routed_tokens_frac
    states = rows * sum("states" in view.outputs for view in views) * models * given.teacher.hidden * shipped
    tokens = work.prompt_tokens + work.context_tokens + work.routed_reach_frac * work.responses.mean
    calls = math.ceil(work.prompts / config.prompts_scored_together) if config.scores_early else 1
    read = work.num_rollouts / calls * work.routed_rollouts_frac * len(views) * models * tokens
    return _stage(
        TEACHER,
        {
            "products": teacher_flops(given, busy[0]) / hardware.roofs.matmul_flops,
            "link": (states + _refreshed_bytes(given, busy)) / hardware.roofs.link_bytes_per_s,
        },
        hardware.shares.teacher,
        calls * max(1.0, read / config.teacher.max_tokens_per_batch),
        hardware.fixed.teacher_pass_s,
    )


def refresh_s(given: Given, busy: Sequence[int]) -> float:
    """How much of the teacher's time its weights take, which are there before anything is scored."""
    return _refreshed_bytes(given, busy) / given.hardware.roofs.link_bytes_per_s / given.hardware.shares.teacher


def _refreshed_bytes(given: Given, busy: Sequence[int]) -> float:
    rates = [given.config.teacher.weights.rate_at(step) for step in busy]
    return sum(rate > 0 for rate in rates) / max(1, len(rates)) * given.shape.weights.nbytes


def learner_flops(given: Given, has_routes: bool) -> float:
    """n x E[(2 + T / P + c + o) F(p + r, 0) + (3 + o + m s) F(0, r)] over all ranks, recomputation counted.

    Layers: one pass forward, one for gradients of their inputs, one for those of the T trained of P weights, c = 1 with
    gradient checkpointing, o = 1 where old log-probs are computed (learner.minibatches_per_step above 1). Head: three
    products a token, and one more with the heads of m teacher models on the routed share s whose states are read
    (`trace_rl.head_loss`). Every sequence is taken to have a gradient. Where prompts are shared
    (learner.layout) only one of a prompt's samples in a micro-batch has F(p, 0) in it.
    """
    config, work, model = given.config, given.work, given.shape.transformer
    learner = config.learner
    old = float(learner.minibatches_per_step > 1)
    layers = 2 + given.shape.num_trained / given.shape.num_parameters + learner.gradient_checkpointing + old
    reads_states = has_routes and "states" in config.algorithm.reads
    taught = len(config.teacher.weights.shares()) * work.routed_tokens_frac if reads_states else 0.0
    p, head = work.prompt_tokens, _HEAD_PRODUCTS + old + taught
    shared = _shared_frac(given) * model.forward_flops(p, 0)
    return work.num_rollouts * given.over_responses(
        lambda r: layers * (model.forward_flops(p + r, 0) - shared) + head * model.forward_flops(0, r)
    )


def _shared_frac(given: Given) -> float:
    """Share of the prompts that the learner need not compute: of a group all but one in each micro-batch."""
    work, learner = given.work, given.config.learner
    if not learner.shares_prompts:
        return 0.0
    extent = Extent(0, round(work.prompt_tokens), round(work.responses.mean))
    units = units_of([extent] * work.samples, learner.max_tokens_per_micro_batch, SharedPrompts())
    return 1 - len(units) / work.samples


def learner_passes(given: Given) -> int:
    """Micro-batches that a rank takes for a step: those of full length that its share of the tokens fills."""
    learner, work = given.config.learner, given.work
    shares = learner.world_size // learner.sequence_parallel
    length = work.prompt_tokens * (1 - _shared_frac(given)) + work.responses.mean
    tokens = work.num_rollouts * length / learner.minibatches_per_step / shares
    return learner.minibatches_per_step * max(1, math.ceil(tokens / learner.max_tokens_per_micro_batch))


def learner_link_bytes(given: Given) -> float:
    """What a rank receives of the others for a step with M passes and O optimizer steps, as (N - 1) / N of

    ZeRO-0   2 x 4 T O          gradients are all-reduced
    ZeRO-1   (4 T + b T) O      they are scattered, and weights gathered
    ZeRO-2   4 T M + b T O      the same, with gradients scattered in every pass
    ZeRO-3   (2 b P + 4 T) M    weights are gathered forward and backward

    for P weights of b bytes, T trained ones, gradients in float32. Reference: Rajbhandari et al. 2020,
    arXiv:1910.02054, section 7.
    """
    learner, shape = given.config.learner, given.shape
    passes, steps, ranks = learner_passes(given), learner.minibatches_per_step, learner.world_size
    gradients, whole = _GRADIENT_BYTES * shape.num_trained, shape.weights.nbytes
    trained = shape.num_trained * shape.bytes_per_value
    volume = {
        0: 2 * gradients * steps,
        1: (gradients + trained) * steps,
        2: gradients * passes + trained * steps,
        3: (2 * whole + gradients) * passes,
    }[learner.zero_stage]
    return volume * (ranks - 1) / ranks


def learner(given: Given, has_routes: bool) -> Stage:
    """max(operations / ranks / roof, bytes / link): what travels is hidden behind products, as far as they last."""
    hardware, ranks = given.hardware, given.config.learner.world_size
    products_s = learner_flops(given, has_routes) / ranks / hardware.roofs.matmul_flops
    link_s = learner_link_bytes(given) / hardware.roofs.ring_bytes_per_s
    parts: Mapping[Bound, float] = {"products": products_s} if products_s >= link_s else {"link": link_s}
    return _stage(LEARNER, parts, hardware.shares.learner, learner_passes(given), hardware.fixed.learner_pass_s)


def sync(given: Given) -> Stage:
    """W / link from one rank to all engines, which hand it on; before that (N - 1) / N W under ZeRO-3, gathered by N
    ranks. Where engines read the learner's memory (ipc), 2 W / k / bandwidth instead: W / k is read and written."""
    config, roofs = given.config, given.hardware.roofs
    nbytes, ranks = given.sync.nbytes, config.learner.world_size
    parts: dict[Bound, float] = {"memory": 0.0, "link": 0.0}
    if config.learner.zero_stage == 3:
        parts["link"] += nbytes * (ranks - 1) / ranks / roofs.ring_bytes_per_s
    if given.sync.transport == "ipc":
        parts["memory"] += 2 * nbytes / config.generator.tensor_parallel / roofs.copy_bytes_per_s
    else:
        parts["link"] += nbytes / roofs.link_bytes_per_s
    return _stage(SYNC, parts, given.hardware.shares.sync, 1, given.hardware.fixed.sync_s)


def driver(given: Given) -> Stage:
    """n x seconds of a rollout on the driver, while nothing else goes on."""
    return _stage(DRIVER, {"overhead": 0.0}, 1.0, given.work.num_rollouts, given.hardware.fixed.driver_s)
