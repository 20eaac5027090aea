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
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from trace_rl.errors import FailureCause

FinishReason = Literal["stop", "length"]
GradeCause = Literal["graded", "truncated", "timeout", "error"]
SpanClass = Literal["key", "error"]
AnnotationCause = Literal["annotated", "not_requested", FailureCause]
TeacherOutput = Literal["states", "logprobs", "entropy"]
"""What a route reads of the teacher at its tokens: final hidden states, the log-prob of the sampled token, entropy."""
NOT_THE_POLICY = -1
"""Version of completions that were not sampled from the policy (demonstrations, a teacher's own)."""


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
    """Log-probs under the sampling distribution (after temperature), from the engine that sampled; NaN where the
    sampler was not the policy."""
    finish_reason: FinishReason
    token_versions: Int[np.ndarray, " time"]
    """Version of the weights that wrote each token; NOT_THE_POLICY at all of them where the sampler was not it."""
    text: str
    """Decoded response without special tokens: what the grader reads."""

    @property
    def key(self) -> RolloutKey:
        return RolloutKey(self.prompt.prompt_id, self.sample)

    @property
    def oldest_version(self) -> int:
        """Lowest version of any token; NOT_THE_POLICY where there is no token of the policy."""
        return int(self.token_versions.min()) if len(self.token_versions) else NOT_THE_POLICY

    @property
    def newest_version(self) -> int:
        """Highest version of any token; NOT_THE_POLICY where there is no token of the policy."""
        return int(self.token_versions.max(initial=NOT_THE_POLICY))


@dataclass(frozen=True)
class Cancelled:
    """In place of a rollout that was given up."""

    key: RolloutKey


@dataclass(frozen=True)
class GradedRollout:
    """A rollout with its reward in [0, 1] and how that reward came about."""

    rollout: Rollout
    reward: float
    cause: GradeCause
    feedback: str = ""
    """What the environment says of the response, one sentence; empty when it has nothing to say."""

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
    reflection: str = ""
    """The annotator's explanation of what went wrong, without span text or positions; empty when it gave none."""


@dataclass(frozen=True)
class GroupMember:
    """An annotated rollout among all completions of its prompt."""

    annotated: AnnotatedRollout
    group: tuple[AnnotatedRollout, ...]
    """All completions of the prompt in the order of their samples, this one included."""

    @property
    def graded(self) -> GradedRollout:
        return self.annotated.graded

    @property
    def rollout(self) -> Rollout:
        return self.graded.rollout

    @property
    def length(self) -> int:
        return len(self.rollout.token_ids)

    @property
    def correct_siblings(self) -> tuple[AnnotatedRollout, ...]:
        """The other completions of the prompt that are correct, in the order of their samples."""
        own = self.rollout.sample
        return tuple(item for item in self.group if item.graded.is_correct and item.graded.rollout.sample != own)

    @property
    def pass_rate(self) -> float:
        """Share of the group's completions that are correct."""
        return sum(item.graded.is_correct for item in self.group) / len(self.group)


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of one rollout that take one route."""

    route: int
    """Index into the run's routes."""
    positions: Int[np.ndarray, " row"]
    """Response positions, ascending."""
    weight: float
    """Schedule value times class multiplier, before token weights and aggregation."""


@dataclass(frozen=True)
class RoutedRollout:
    """A rollout with its advantage and the tokens that take routes."""

    member: GroupMember
    advantage: float
    routed: tuple[RoutedTokens, ...]
    """At most one entry a route, in the order of the routes."""

    @property
    def key(self) -> RolloutKey:
        return self.member.rollout.key


@dataclass(frozen=True)
class TeacherRequest:
    """One teacher forward: the privileged prompt, the student's own ids, and the rows that are wanted."""

    key: RolloutKey
    view: int
    """Which of the run's teacher views (context and temperature) the prompt was made for."""
    teacher_prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """[time] response ids cut after the last wanted position."""
    positions: Int[np.ndarray, " row"]
    """Response positions t whose predicting state (of token t-1) is wanted, ascending."""
    outputs: frozenset[TeacherOutput]
    temperature: float = 1.0
    """Divides the logits before log-probs and entropy; states are not touched by it."""


@dataclass(frozen=True)
class TeacherRows:
    """What the teacher says at the wanted positions of one rollout; arrays that were not asked for have no rows."""

    key: RolloutKey
    view: int
    positions: Int[np.ndarray, " row"]
    hidden: Shaped[np.ndarray, "row hidden"]
    """Final hidden states (after the last norm) that predict the tokens, as `trace_rl.states` keeps them."""
    logprobs: Float[np.ndarray, " row"]
    """log q(token_ids[t]) at the request's temperature."""
    entropy: Float[np.ndarray, " row"]
    """Entropy of q in nats at the request's temperature."""


@dataclass(frozen=True)
class ScoredTokens:
    """One route's tokens of one rollout with all that token weights, token scores and advantages may depend on.

    Arrays that no part of the route reads have no rows.
    """

    member: GroupMember
    advantage: float
    positions: Int[np.ndarray, " row"]
    teacher_logprobs: Float[np.ndarray, " row"]
    teacher_entropy: Float[np.ndarray, " row"]
    policy_entropy: Float[np.ndarray, " row"]
    divergence: Float[np.ndarray, " row"]
    """The divergence that the route's token score ranks by, in nats, before any clip."""

    @property
    def rollout_logprobs(self) -> Float[np.ndarray, " row"]:
        """log p of the sampled tokens under the policy that sampled them."""
        return np.asarray(self.member.rollout.rollout_logprobs[self.positions])


@dataclass(frozen=True)
class TokenStatistics:
    """What the learner's scoring pass finds for one rollout's tokens of one route, in the order of their positions."""

    key: RolloutKey
    route: int
    policy_entropy: Float[np.ndarray, " row"]
    """In nats, at the sampling temperature."""
    divergence: Float[np.ndarray, " row"]
    """What the route's token score ranks by, or else the route's own term, in nats before any clip."""
    policy_logprobs: Float[np.ndarray, " row"]
    """log p(token_ids[t]) at the route's temperature."""
    teacher_logprobs: Float[np.ndarray, " row"]
    """log q(token_ids[t]) at the route's temperature; no rows where the route reads no teacher."""


@dataclass(frozen=True)
class Candidates:
    """The most likely tokens at some positions, the likeliest first; no rows where there is no such distribution."""

    token_ids: Int[np.ndarray, "row candidate"]
    logprobs: Float[np.ndarray, "row candidate"]
    """At the route's temperature."""


@dataclass(frozen=True)
class RouteFigures:
    """What can be shown of one rollout's tokens of one route, in the order of their positions."""

    statistics: TokenStatistics
    policy: Candidates
    teacher: Candidates


@dataclass(frozen=True)
class TokenFigures:
    """What the learner's policy and the teacher say of one rollout's tokens: measured for people, not trained on."""

    key: RolloutKey
    policy_logprobs: Float[np.ndarray, " time"]
    """Of the sampled tokens at the sampling temperature."""
    policy_entropy: Float[np.ndarray, " time"]
    """In nats, at the sampling temperature."""
    routes: tuple[RouteFigures, ...]
    """Of the routes that add a term to the loss of this rollout."""


@dataclass(frozen=True)
class TrainingSequence:
    """What the learner needs of one rollout; all weights already carry the global denominators."""

    key: RolloutKey
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    rollout_logprobs: Float[np.ndarray, " time"]
    staleness: Int[np.ndarray, " time"]
    """Versions between the weights that wrote each token and those that are trained; 0 where the sampler was not the
    policy."""
    advantages: Float[np.ndarray, " time"]
    pg_weight: Float[np.ndarray, " time"]
    route_positions: Int[np.ndarray, " row"]
    """Response positions of the rows whose routes add a term to the loss, by route and then ascending; a token that
    takes several routes has a row for each."""
    route_index: Int[np.ndarray, " row"]
    """Index into the run's routes, which gives each row its action."""
    route_weight: Float[np.ndarray, " row"]
    teacher_row: Int[np.ndarray, " row"]
    """Index into `teacher_hidden`; -1 where the action reads no states."""
    teacher_hidden: Shaped[np.ndarray, "state hidden"]
    """The teacher's final hidden states, as `trace_rl.states` keeps them."""


@dataclass(frozen=True)
class TrainingBatch:
    """One global batch: the loss is the plain sum of weighted token terms over all its sequences."""

    step: int
    """And the version of the weights that are trained."""
    sequences: tuple[TrainingSequence, ...]
