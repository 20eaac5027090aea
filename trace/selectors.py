"""Where a route acts: which rollouts it looks at, and which of their tokens it takes.

A `Selector` is a conjunction of rollout filters and one kind of token selector. Must not know what happens to the
tokens, schedules, or what other routes have taken.

Invariants: the result depends on the rollout, its group and the seed alone; key spans exist on correct rollouts only
and error spans on wrong ones; drawn masks are matched to the *realised* coverage of the spans they stand in for,
rollout by rollout (the mask ablations of arXiv:2605.10194).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field, field_validator, model_validator

from trace_rl.actions import RowAction
from trace_rl.batch import GroupMember, SpanClass
from trace_rl.config.base import Kind, Section
from trace_rl.contexts import Context, has_information
from trace_rl.row_actions import Rkl
from trace_rl.token_scores import SoftOr, TokenScore

Mask = Bool[np.ndarray, " time"]
RolloutFilter = Literal["all", "correct", "wrong", "mixed_group", "longest_wrong", "has_context"]
SpanTokens = Literal["key_spans", "error_spans"]
SPAN_CLASS: Mapping[SpanTokens, SpanClass] = {"key_spans": "key", "error_spans": "error"}


class TokenSelector(Kind):
    """Which response tokens of a rollout are taken."""

    @property
    def span_classes(self) -> frozenset[SpanClass]:
        """Classes of spans that the selector reads; empty: it needs no annotator."""
        return frozenset()

    @abstractmethod
    def mask(self, member: GroupMember, seed: int) -> Mask:
        """The tokens of a rollout that the selector takes.

        Args:
            seed: for kinds that draw; different for every rollout, step and route, and the same when a step is redone.
        """

    def at_most(self, limit: int, member: GroupMember, seed: int) -> Mask:
        """The tokens of a rollout that are taken where no more than `limit` may be: the earliest ones."""
        mask = self.mask(member, seed)
        return mask & (np.cumsum(mask) <= limit)


class AllTokens(TokenSelector):
    """Every token of the response."""

    type: Literal["all"] = "all"

    def mask(self, member: GroupMember, seed: int) -> Mask:
        return np.ones(member.length, dtype=bool)


class KeySpans(TokenSelector):
    """The annotator's key spans: the decisive steps of a correct rollout (arXiv:2605.10194)."""

    type: Literal["key_spans"] = "key_spans"

    @property
    def span_classes(self) -> frozenset[SpanClass]:
        return frozenset({"key"})

    def mask(self, member: GroupMember, seed: int) -> Mask:
        return span_mask(member, "key")


class ErrorSpans(TokenSelector):
    """The annotator's error spans: the locally causal wrong steps of a wrong rollout (arXiv:2605.10194)."""

    type: Literal["error_spans"] = "error_spans"

    @property
    def span_classes(self) -> frozenset[SpanClass]:
        return frozenset({"error"})

    def mask(self, member: GroupMember, seed: int) -> Mask:
        return span_mask(member, "error")


class SuffixFromError(TokenSelector):
    """All tokens from the start of the first error span; none without such a span (arXiv:2605.28014)."""

    type: Literal["suffix_from_error"] = "suffix_from_error"

    @property
    def span_classes(self) -> frozenset[SpanClass]:
        return frozenset({"error"})

    def mask(self, member: GroupMember, seed: int) -> Mask:
        return np.maximum.accumulate(span_mask(member, "error")) if member.length else np.zeros(0, dtype=bool)


class Top(TokenSelector):
    """The share of all candidate tokens of the batch with the highest scores (arXiv:2604.14084).

    Every token is a candidate; `trace_rl.routing.keep_top_tokens` thins them out when the scores are known.
    """

    type: Literal["top"] = "top"
    frac: float = Field(0.5, gt=0, le=1)
    """Share of the batch's candidate tokens that is kept."""
    score: TokenScore = SoftOr()
    """What the tokens are ranked by."""
    rank_by: RowAction = Rkl()
    """The divergence that the score reads; its clip and its importance weight are not applied."""

    def mask(self, member: GroupMember, seed: int) -> Mask:
        return np.ones(member.length, dtype=bool)


class _Drawn(TokenSelector):
    """Tokens drawn at random, as a control for spans."""

    like: SpanTokens = "key_spans"
    """The spans that the drawn tokens stand in for."""
    frac: float = Field(0.0, ge=0, le=1)
    """Share of the response that is drawn; 0: exactly as many tokens as the spans of `like` have in this rollout."""
    shape: Literal["tokens", "spans"] = "tokens"
    """`tokens`: each for itself; `spans`: runs as long as the spans of `like`, or of `span_tokens` where `frac` is
    given. A run that has no room left is drawn as single tokens."""
    span_tokens: int = Field(8, ge=1)
    """Length of a run where `frac` is given."""

    @abstractmethod
    def _free(self, member: GroupMember) -> Mask:
        """The tokens that are drawn from."""

    def mask(self, member: GroupMember, seed: int) -> Mask:
        return self.at_most(member.length, member, seed)

    def at_most(self, limit: int, member: GroupMember, seed: int) -> Mask:
        """As many as are allowed, drawn from the whole response: the earliest of all drawn would be no fair control."""
        lengths = [span.end - span.start for span in member.annotated.spans if span.span_class == SPAN_CLASS[self.like]]
        if self.frac:
            count = int(self.frac * member.length + 1e-9)
            full, rest = divmod(count, self.span_tokens)
            lengths = [self.span_tokens] * full + [rest] * (rest > 0)
        if self.shape == "tokens":
            lengths = [1] * sum(lengths)
        allowed = np.diff(np.minimum(np.cumsum(lengths, dtype=np.int64), limit), prepend=0).tolist()
        return draw_runs(self._free(member), allowed, np.random.default_rng(seed))


class Random(_Drawn):
    """Tokens drawn from the whole response."""

    type: Literal["random"] = "random"

    @property
    def span_classes(self) -> frozenset[SpanClass]:
        return frozenset() if self.frac else frozenset({SPAN_CLASS[self.like]})

    def _free(self, member: GroupMember) -> Mask:
        return np.ones(member.length, dtype=bool)


class Inverted(_Drawn):
    """Tokens drawn from the response without the spans of `like`; fewer where the rest is too short."""

    type: Literal["inverted"] = "inverted"

    @property
    def span_classes(self) -> frozenset[SpanClass]:
        return frozenset({SPAN_CLASS[self.like]})

    def _free(self, member: GroupMember) -> Mask:
        return ~span_mask(member, SPAN_CLASS[self.like])


class Selector(Section):
    """Which tokens of which rollouts take a route."""

    rollouts: tuple[RolloutFilter, ...] = ("all",)
    """One filter or a list of which all must hold. `correct`, `wrong`: by reward; `mixed_group`: of prompts with both;
    `longest_wrong`: the longest wrong rollout of its prompt; `has_context`: the teacher has information on it."""
    tokens: TokenSelector
    """Which of their tokens."""
    max_coverage: float = Field(1.0, gt=0, le=1)
    """At most this share of a response takes the route; later tokens are left out, and fewer are drawn. Spans are
    capped before, by importance (annotator.coverage_cap)."""

    @field_validator("rollouts", mode="before")
    @classmethod
    def _one_filter_may_stand_alone(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _spans_fit_rollouts(self) -> Selector:
        for needed, verdicts in ((frozenset({"key"}), {"correct"}), (frozenset({"error"}), {"wrong", "longest_wrong"})):
            if self.tokens.span_classes == needed and not verdicts & set(self.rollouts):
                expected = sorted(verdicts, reverse=True)[0]
                raise ValueError(
                    f"selector asks for {self.tokens.type} of {' and '.join(self.rollouts)} rollouts, but "
                    f"{'/'.join(needed)} spans exist on {expected} rollouts only; set rollouts: {expected}"
                )
        return self

    @model_validator(mode="after")
    def _ranked_tokens_have_one_bound(self) -> Selector:
        if isinstance(self.tokens, Top) and self.max_coverage < 1:
            raise ValueError(
                f"selector.max_coverage is {self.max_coverage:g}, but selector.tokens top ranks the whole batch, and "
                "the cap would leave out the later tokens of a response unranked; bound the route by "
                "selector.tokens.frac and leave max_coverage out"
            )
        return self

    def span_classes(self, context: Context) -> frozenset[SpanClass]:
        """Classes of spans that must be annotated for this selector and a teacher with this context."""
        if not context.needs_annotation:
            return self.tokens.span_classes
        if "correct" in self.rollouts:
            return self.tokens.span_classes | {"key"}
        if {"wrong", "longest_wrong"} & set(self.rollouts):
            return self.tokens.span_classes | {"error"}
        return frozenset({"key", "error"})

    def positions(self, member: GroupMember, context: Context, seed: int) -> Int[np.ndarray, " row"]:
        """Response positions that the selector takes, ascending."""
        if not all(_FILTERS[name](member, context) for name in self.rollouts):
            return np.zeros(0, dtype=np.int64)
        limit = int(self.max_coverage * member.length + 1e-9)
        return np.flatnonzero(self.tokens.at_most(limit, member, seed))


def span_mask(member: GroupMember, span_class: SpanClass) -> Mask:
    """The tokens in the rollout's spans of a class."""
    mask = np.zeros(member.length, dtype=bool)
    for span in member.annotated.spans:
        if span.span_class == span_class:
            mask[span.start : span.end] = True
    return mask


def draw_runs(is_free: Mask, lengths: Sequence[int], generator: np.random.Generator) -> Mask:
    """Place runs of the given lengths at random without overlap, longest first, on the free positions.

    Where no gap is long enough the tokens of a run are drawn one by one, so that the number of tokens is that of the
    lengths unless fewer positions are free.
    """
    free = is_free.copy()
    taken = np.zeros(len(free), dtype=bool)
    singles = sum(length == 1 for length in lengths)
    for length in sorted((length for length in lengths if length > 1), reverse=True):
        room = np.concatenate([[0], np.cumsum(free)])
        starts = np.flatnonzero(room[length:] - room[: max(len(room) - length, 0)] == length)
        if len(starts):
            start = int(generator.choice(starts))
            taken[start : start + length] = True
            free[start : start + length] = False
        else:
            singles += length
    candidates = np.flatnonzero(free)
    taken[generator.choice(candidates, min(singles, len(candidates)), replace=False)] = True
    return taken


def _is_longest_wrong(member: GroupMember) -> bool:
    wrong = [item.graded.rollout for item in member.group if not item.graded.is_correct]
    return bool(wrong) and max(wrong, key=lambda r: len(r.token_ids)).sample == member.rollout.sample


_FILTERS: Mapping[RolloutFilter, Callable[[GroupMember, Context], bool]] = {
    "all": lambda member, context: True,
    "correct": lambda member, context: member.graded.is_correct,
    "wrong": lambda member, context: not member.graded.is_correct,
    "mixed_group": lambda member, context: 0 < member.pass_rate < 1,
    "longest_wrong": lambda member, context: _is_longest_wrong(member),
    "has_context": lambda member, context: has_information(context, member),
}
