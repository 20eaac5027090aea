"""One frozen type per stage of a step: Prompt -> Rollout -> GradedRollout -> AnnotatedRollout -> TrainingBatch.

Invariants that every producer keeps and every consumer may rely on:

* `token_ids` are the sampler's own ids, end-of-sequence included when it was sampled. Nothing is ever re-tokenised.
* Alignment: `x[t]` belongs to `token_ids[t]`, and `logprobs[t] = log p(token_ids[t] | prompt, token_ids[<t])`.
  The shift between logits and targets happens in one place only, `trace_rl.packing.predicting_positions`.
* No optional fields: a later stage is a later type.

This module must not know who produces the types (Ray, vLLM) or where they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

FinishReason = Literal["stop", "length"]
GradeCause = Literal["graded", "truncated", "timeout", "error"]
SpanClass = Literal["key", "error"]
AnnotationCause = Literal["annotated", "not_requested", "failed", "timeout"]


class RolloutKey(NamedTuple):
    """Identity of a completion within one step."""

    prompt_id: str
    sample: int


@dataclass(frozen=True)
class Prompt:
    """One question with everything that only privileged roles may see."""

    prompt_id: str
    """Stable and unique within the source; seeds and the data position are derived from it."""
    question: str
    answer: str
    solution: str = ""
    """Worked reference solution; empty when the source has none."""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RolloutRequest:
    """What the generator is asked for: one completion of one prompt."""

    prompt: Prompt
    sample: int
    prompt_token_ids: tuple[int, ...]
    seed: int
    """Derived from (run seed, step, prompt id, sample), so a rollout does not depend on its neighbours."""


@dataclass(frozen=True)
class Rollout:
    """A completion as it was sampled."""

    prompt: Prompt
    sample: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """[time] response ids, end-of-sequence included."""
    rollout_logprobs: Float[np.ndarray, " time"]
    """Log-probs under the sampling distribution (after temperature), from the engine that sampled."""
    finish_reason: FinishReason
    policy_version: int
    """Version of the weights that wrote every token."""
    text: str
    """Decoded response without special tokens: what the grader reads."""

    @property
    def key(self) -> RolloutKey:
        return RolloutKey(self.prompt.prompt_id, self.sample)


@dataclass(frozen=True)
class GradedRollout:
    """A rollout with its reward in [0, 1] and how that reward came about."""

    rollout: Rollout
    reward: float
    cause: GradeCause

    @property
    def is_correct(self) -> bool:
        return self.reward >= 0.5


@dataclass(frozen=True)
class Span:
    """A run of response tokens [start, end) with a coarse diagnostic type."""

    start: int
    end: int
    span_class: SpanClass
    type: str
    importance: float = 1.0


@dataclass(frozen=True)
class AnnotatedRollout:
    """A graded rollout with the annotator's spans, capped and mapped to tokens (possibly none)."""

    graded: GradedRollout
    spans: tuple[Span, ...]
    cause: AnnotationCause
    audit: Mapping[str, float] = field(default_factory=dict)
    """Counters of this annotation (dropped ids, unknown types, tokens before and after the cap)."""


class Action(IntEnum):
    """What a routed token is trained with; the values index per-row direction flags."""

    NONE = 0
    FKL = 1
    RKL = 2


@dataclass(frozen=True)
class RoutedRollout:
    """A rollout with its advantage and, for every token, the policy-gradient weight and the route."""

    annotated: AnnotatedRollout
    advantage: float
    pg_weight: Float[np.ndarray, " time"]
    """Weight of the policy-gradient term before aggregation: 1, or the ramp g_k on routed tokens."""
    route_index: Int[np.ndarray, " time"]
    """Index into the run's routes; -1 where no route applies."""
    kl_weight: Float[np.ndarray, " time"]
    """Schedule value times class multiplier on routed tokens, 0 elsewhere; before aggregation."""

    @property
    def is_routed(self) -> Bool[np.ndarray, " time"]:
        return self.route_index >= 0


@dataclass(frozen=True)
class TeacherRequest:
    """One teacher forward: the privileged prompt, the student's own ids, and the rows that are wanted."""

    key: RolloutKey
    teacher_prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """[time] response ids cut after the last wanted position."""
    positions: Int[np.ndarray, " row"]
    """Response positions t whose predicting state (of token t-1) is wanted, ascending."""


@dataclass(frozen=True)
class TeacherRows:
    """Final hidden states (after the last norm) that predict the routed tokens of one rollout."""

    key: RolloutKey
    hidden: Float[np.ndarray, "row hidden"]


@dataclass(frozen=True)
class TrainingSequence:
    """What the learner needs of one rollout; all weights already carry the global denominators."""

    key: RolloutKey
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    rollout_logprobs: Float[np.ndarray, " time"]
    advantage: float
    pg_weight: Float[np.ndarray, " time"]
    kl_positions: Int[np.ndarray, " row"]
    """Response positions of the routed tokens, ascending."""
    kl_route: Int[np.ndarray, " row"]
    """Index into the run's routes, which gives each row its action and clip."""
    kl_weight: Float[np.ndarray, " row"]
    teacher_hidden: Float[np.ndarray, "row hidden"]


@dataclass(frozen=True)
class TrainingBatch:
    """One global batch: the loss is the plain sum of weighted token terms over all its sequences."""

    step: int
    policy_version: int
    """Version of the weights that wrote the rollouts."""
    sequences: tuple[TrainingSequence, ...]
