"""The arithmetic of a run before it starts: its batches, its syncs, how far it samples ahead, and its annotations.

Counts only, from the configuration and the shape of the model; a step is planned by the planner that the learner uses.
Must not know memory, nodes or how a plan is printed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trace_rl.annotators import LanguageModel
from trace_rl.config.run import RunConfig
from trace_rl.launch.annotation_cost import Cost
from trace_rl.launch.plan.shapes import ModelShape
from trace_rl.packing import Extent, plan_sequences
from trace_rl.routing import active_span_classes
from trace_rl.token_layout import Layout
from trace_rl.workers.weight_sender import transfer_backend
from trace_rl.workers.weight_wire import plan_buckets, plan_frames

_HELD = {"gloo": 3, "nccl": 2, "ipc": 2, "file": 1}
"""Buckets that the sender holds at a time, by transport: one is filled while others travel."""


@dataclass(frozen=True)
class BatchPlan:
    """What one step does, with every sequence as long as it may be."""

    num_prompts: int
    samples_per_prompt: int
    max_sequence_tokens: int
    sequences_per_optimizer_step: int
    optimizer_steps: int
    """On the batch of one step."""
    steps: int
    num_shares: int
    """Parts that a batch is dealt to: ranks, or groups of ranks that share sequences."""
    micro_batches: int
    """Forward and backward passes of every rank for one optimizer step; shorter sequences take fewer."""
    sequences_per_micro_batch: int
    """In the fullest."""
    idle_micro_batches: int
    """Of all ranks in one optimizer step: passes over nothing, which keep a rank in step with the others."""
    num_rows: int | None
    """Training prompts of the data; None where it has no end, or could not be read."""

    @property
    def num_sequences(self) -> int:
        """Of one step."""
        return self.num_prompts * self.samples_per_prompt

    @property
    def max_tokens(self) -> int:
        """Of one step, prompts included."""
        return self.num_sequences * self.max_sequence_tokens

    @property
    def epochs(self) -> float | None:
        """How often the run goes through its data, where that has an end."""
        return self.steps * self.num_prompts / self.num_rows if self.num_rows else None


def plan_batch(config: RunConfig, layout: Layout, num_rows: int | None) -> BatchPlan:
    """The batches of a run whose sequences all reach their budgets."""
    sampling, learner = config.sampling, config.learner
    sequences = sampling.prompts_per_step // learner.minibatches_per_step * sampling.samples_per_prompt
    shares = learner.world_size // learner.sequence_parallel
    prompt, response = sampling.max_prompt_tokens, config.max_sequence_tokens - sampling.max_prompt_tokens
    extents = [Extent(number // sampling.samples_per_prompt, prompt, response) for number in range(sequences)]
    plan = plan_sequences(extents, learner.max_tokens_per_micro_batch, shares, layout).plan
    batches = [batch for share in plan for batch in share]
    return BatchPlan(
        num_prompts=sampling.prompts_per_step,
        samples_per_prompt=sampling.samples_per_prompt,
        max_sequence_tokens=config.max_sequence_tokens,
        sequences_per_optimizer_step=sequences,
        optimizer_steps=learner.minibatches_per_step,
        steps=config.run.steps,
        num_shares=shares,
        micro_batches=len(plan[0]),
        sequences_per_micro_batch=max(map(len, batches)),
        idle_micro_batches=sum(not batch for batch in batches),
        num_rows=num_rows,
    )


@dataclass(frozen=True)
class SyncPlan:
    """How every version of the weights gets to the engines."""

    transport: str
    nbytes: int
    """That every engine receives."""
    num_weights: int
    num_buckets: int
    largest_bucket: int
    """In bytes; a weight that is larger than sync.bucket_mib has a bucket of its own."""
    held: int
    """Bytes of the buckets that the sender holds at a time."""
    num_engines: int
    workers_per_engine: int

    @property
    def num_members(self) -> int:
        """Of the transfer group: the sender and every engine's workers."""
        return 1 + self.num_engines * self.workers_per_engine


def plan_sync(config: RunConfig, shape: ModelShape) -> SyncPlan:
    """The syncs of a run.

    Raises:
        ConfigError: the transport does not go with the placement.
    """
    if config.learner.sends_adapters:
        manifest, transport, buckets = shape.adapters, "objects of Ray", 1
        held = largest = manifest.nbytes
    else:
        manifest, transport = shape.weights, transfer_backend(config.sync, config.placement)
        cut = plan_frames if transport == "gloo" else plan_buckets
        sizes = [bucket.nbytes for bucket in cut(manifest, config.sync.bucket_mib * 2**20)]
        buckets, largest = len(sizes), max(sizes)
        held = _HELD[transport] * largest
    return SyncPlan(
        transport=transport,
        nbytes=manifest.nbytes,
        num_weights=len(manifest.names),
        num_buckets=buckets,
        largest_bucket=largest,
        held=held,
        num_engines=config.generator.num_engines,
        workers_per_engine=config.generator.tensor_parallel,
    )


def prompts_in_flight(config: RunConfig) -> int:
    """Prompts that are being sampled, or wait for their step, at most."""
    size, scheduling = config.sampling.prompts_per_step, config.scheduling
    return size * (1 + scheduling.max_staleness) + math.ceil(scheduling.oversampling_frac * size)


def annotation_at_most(config: RunConfig, model: LanguageModel) -> Cost:
    """What a run may ask of its annotator: one request a rollout, every prompt and answer as long as allowed.

    Requests sent again after failures, or to have an answer repaired, come on top; cached answers take off.
    """
    steps = sum(bool(active_span_classes(config, step)) for step in range(config.run.steps))
    requests = steps * config.sampling.prompts_per_step * config.sampling.samples_per_prompt
    prompt_tokens, replies = requests * model.max_prompt_tokens, requests * model.max_reply_tokens
    rate = model.limits.requests_per_minute
    return Cost(
        steps=steps,
        requests=requests,
        prompt_tokens=prompt_tokens,
        completion_tokens=replies,
        is_measured=False,
        money=model.budget.cost(prompt_tokens, replies),
        minutes_at_rate=requests / rate if rate else 0.0,
    )
