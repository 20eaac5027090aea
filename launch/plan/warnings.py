"""What a run will do that its user may not expect, each in a sentence with the setting that changes it.

What is wrong is refused elsewhere, by the validators of `RunConfig` and by `trace_rl.launch.preflight`; here stands
what is allowed and often not meant. Must not know how a plan is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from trace_rl.config.run import RunConfig
from trace_rl.launch.placement import PlacementPlan
from trace_rl.launch.plan.batch import BatchPlan, SyncPlan
from trace_rl.launch.plan.memory import ENGINE, Forecast
from trace_rl.launch.plan.shapes import ModelShape
from trace_rl.policy_gradients import Clipped, Gspo
from trace_rl.token_layout import Packed
from trace_rl.workers import environment

_MANY_STEPS = 50
"""Without a checkpoint in between: more is dear to lose."""
_MANY_EPOCHS = 20
_CANARY_NEEDS = {"bfloat16": 0.05, "float32": 2e-5}
"""Below it, syncs that are right are refused: what engine and learner were seen to differ by, in nats."""
_CANARY_PROVES = {"bfloat16": 1.0, "float32": 0.05}
"""Above it, a canary would sing for wrong weights too."""
_GPU_BYTES_PER_S, _CPU_BYTES_PER_S = 3.35e12, 2e10
"""Memory bandwidth of an H100 SXM, and of a core or two."""
_STEP_MARGIN = 3
_WIDE_FOR_SEQUENCES = 0.05


@dataclass(frozen=True)
class Facts:
    """What is known of a run before it starts."""

    config: RunConfig
    batch: BatchPlan
    placement: PlacementPlan
    shape: ModelShape
    sync: SyncPlan
    forecast: Forecast


def warnings_of(facts: Facts) -> list[str]:
    """All warnings, in the order of a step."""
    return [sentence for check in _CHECKS for sentence in check(facts)]


def _data(facts: Facts) -> Iterator[str]:
    batch = facts.batch
    if batch.num_rows and batch.num_rows < batch.num_prompts:
        yield (
            f"a step takes {batch.num_prompts} prompts, but the data has {batch.num_rows}, so that a step holds the "
            "same prompt several times (sampling.prompts_per_step)"
        )
    if batch.epochs and batch.epochs > _MANY_EPOCHS:
        yield f"the run goes through its {batch.num_rows:,} prompts {batch.epochs:.0f} times (run.steps)"
    rounds = facts.config.algorithm.dynamic_sampling.max_rounds
    if rounds > 1:
        yield (
            f"a step may sample up to {rounds} times its prompts (algorithm.dynamic_sampling.max_rounds), and the plan "
            "counts one round"
        )


def _routes(facts: Facts) -> Iterator[str]:
    config = facts.config
    for name, route in config.algorithm.routes.items():
        if not any(route.is_active(step) for step in range(config.run.steps)):
            yield f"route {name} is off at every one of {config.run.steps} steps (algorithm.routes.{name}.schedule)"


def _engines(facts: Facts) -> Iterator[str]:
    config = facts.config
    per_engine = -(-facts.batch.num_sequences // config.generator.num_engines)
    waves = -(-per_engine // config.generator.max_concurrent_sequences)
    if waves > 1:
        yield (
            f"an engine gets {per_engine} sequences a step and runs {config.generator.max_concurrent_sequences} at "
            f"once, so they come in {waves} waves (generator.max_concurrent_sequences)"
        )
    for name, cache in facts.forecast.caches.items():
        wanted = min(cache.concurrent, per_engine) if name == ENGINE else cache.concurrent
        if cache.sequences is not None and cache.sequences < wanted:
            yield (
                f"the cache of the {name.removeprefix('the ')} holds {cache.sequences:.1f} sequences of full length, "
                f"and up to {wanted} run at once; when they are that long vLLM sets some back and computes them again"
            )
    yield from _step_time(facts, waves)


def _step_time(facts: Facts, waves: int) -> Iterator[str]:
    config = facts.config
    speed = _GPU_BYTES_PER_S if config.placement.generator.num_gpus else _CPU_BYTES_PER_S
    share = facts.shape.weights.nbytes / config.generator.tensor_parallel
    least_s = waves * config.sampling.max_response_tokens * share / speed
    if config.placement.step_timeout_s < _STEP_MARGIN * least_s:
        yield (
            f"completions of full length take an engine at least {least_s:,.0f} s a step, weights being read once a "
            f"token, and the deadline of a stage is {config.placement.step_timeout_s:,.0f} s (placement.step_timeout_s)"
        )


def _gpus(facts: Facts) -> Iterator[str]:
    plan, config = facts.placement, facts.config
    roles = [item for role in facts.forecast.roles for item in role.roles]
    with_gpu = [role for role in roles if plan.uses_gpu(role)]
    without = [role for role in roles if not plan.uses_gpu(role)]
    if with_gpu and without:
        settings = ", ".join(dict.fromkeys(f"{plan.seats[role].setting}.num_gpus" for role in without))
        yield f"{', '.join(without)} will run without a GPU, while others have one ({settings} is 0)"
    if not with_gpu and environment.has_gpu():
        yield "this machine has GPUs, but no role asks for one (placement.*.num_gpus)"
    if with_gpu and config.placement.ray_address == "local":
        yield (
            "the run has a Ray of its own, on this machine alone; placement.ray_address=auto or host:port joins a "
            "cluster"
        )
    fractions = {seat.setting for seat in plan.seats.values() if seat.num_gpus % 1}
    for setting in sorted(fractions):
        yield f"{setting}.num_gpus is a fraction: Ray lets others onto the same GPU, and does not divide its memory"


def _learner(facts: Facts) -> Iterator[str]:
    config, batch, shape = facts.config, facts.batch, facts.shape
    if batch.idle_micro_batches:
        yield (
            f"{batch.num_shares} parts of the learner share {batch.sequences_per_optimizer_step} sequences an "
            f"optimizer step, so that {batch.idle_micro_batches} of their passes run over nothing (learner.world_size)"
        )
    is_square = isinstance(shape.layout, Packed) and not shape.layout.shares_prompts and not shape.is_flash
    if is_square and config.learner.sequence_parallel == 1:
        yield (
            "sequences are packed, but the attention is not flash attention, whose work and mask then grow with the "
            "square of a micro-batch (learner.layout, model.attention)"
        )
    if config.learner.schedule.warmup_steps >= config.run.steps * batch.optimizer_steps:
        yield "the learning rate is still rising when the run ends (learner.schedule.warmup_steps)"
    if config.learner.zero_stage == 3 and config.learner.world_size == 1:
        yield "ZeRO-3 on one rank shares nothing and costs gathering (learner.zero_stage)"


def _sync(facts: Facts) -> Iterator[str]:
    config = facts.config
    tolerance, dtype = config.sync.canary_tolerance, config.model.dtype
    if tolerance < _CANARY_NEEDS[dtype]:
        yield (
            f"sync.canary_tolerance is {tolerance:g}, but in {dtype} the log-probs of engine and learner differ by "
            "more than that with the same weights, so that syncs will be refused; bfloat16 needs about 0.4"
        )
    elif tolerance > _CANARY_PROVES[dtype]:
        yield f"sync.canary_tolerance is {tolerance:g}, which wrong weights could pass in {dtype}"
    bucket = config.sync.bucket_mib * 2**20
    if facts.sync.largest_bucket > bucket:
        yield (
            f"a weight of {facts.sync.largest_bucket / 2**20:,.0f} MiB is larger than sync.bucket_mib = "
            f"{config.sync.bucket_mib}, and has a bucket of its own"
        )


def _ratios(facts: Facts) -> Iterator[str]:
    config, steps = facts.config, facts.batch.optimizer_steps
    gradient, staleness = config.algorithm.policy_gradient, config.scheduling.max_staleness
    if isinstance(gradient, Gspo) and steps == 1:
        yield (
            "with one optimizer step a batch the ratios of gspo are 1 and its clips never act, as if it were GRPO "
            "(learner.minibatches_per_step)"
        )
    if isinstance(gradient, Gspo) and gradient.clip_high > _WIDE_FOR_SEQUENCES:
        yield (
            f"gspo clips ratios of whole sequences at {gradient.clip_high:g}, which suits ratios of tokens; its source "
            "has 4e-4 (algorithm.policy_gradient.clip_high)"
        )
    if isinstance(gradient, Clipped) and steps == 1 and staleness:
        yield (
            "clips compare with the policy before a batch, so that with one optimizer step they never act, however "
            "stale a token is; algorithm.rollout_correction.cap bounds its weight"
        )


def _watching(facts: Facts) -> Iterator[str]:
    config = facts.config
    if not config.evaluation.every and config.watch.action != "off" and config.algorithm.routes:
        yield f"nothing is evaluated, so that watch.action={config.watch.action} sees nothing (evaluation.every is 0)"
    every = config.run.checkpoint_every or config.run.steps
    if every > _MANY_STEPS:
        yield (
            f"the first checkpoint comes after {min(every, config.run.steps)} steps, and what fails before that starts "
            f"anew (run.checkpoint_every is {config.run.checkpoint_every})"
        )


def _loads(facts: Facts) -> Iterator[str]:
    config = facts.config
    if config.model.trust_remote_code:
        yield "code that ships with the model will run in every role that loads it (model.trust_remote_code)"


_CHECKS: tuple[Callable[[Facts], Iterator[str]], ...] = (
    _data,
    _routes,
    _loads,
    _gpus,
    _engines,
    _learner,
    _sync,
    _ratios,
    _watching,
)
