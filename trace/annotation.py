"""The protocol between a privileged annotator and the run: request, JSON reply, and the reply's way to token spans.

An annotator sees the question, the reference and the verdict, points at numbered segments of the response, and names a
coarse type from a closed list (arXiv:2605.10194; wire format ours). Rules speak the same protocol as models.

Invariants:
* Spans are disjoint, in order, within the response, and cover at most floor(cap * response tokens) of it.
* Key spans exist on correct responses only, error spans on wrong ones only: `span_class_of` alone decides.
* Whatever an annotator says, `resolve` returns legal spans and counts what it had to drop or change.

This module must not know how an annotator is reached, and never shows positions or span text to the teacher.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

from trace_rl.batch import GradedRollout, Prompt, Span, SpanClass
from trace_rl.segments import Segment, TokenText

MAX_REFLECTION_CHARS = 600
"""Longer reflections are dropped: one sentence or two are asked for."""
_QUOTE_CHARS = 16
"""A reflection that shares so many characters in a row with the response quotes it."""
OTHER_TYPE = "other"
"""What a type outside of the closed list is read as."""


@dataclass(frozen=True)
class AnnotationRequest:
    """All that an annotator is told about one response."""

    prompt: Prompt
    """Question, answer and reference solution."""
    span_class: SpanClass
    """The verdict: "key" asks for the decisive segments of a correct response, "error" for the first wrong ones."""
    segments: tuple[Segment, ...]
    types: Mapping[str, str]
    """Closed list of types: name -> one line of meaning."""
    coverage_cap: float
    """Largest share of the response that will be used."""
    num_tokens: int = 0
    """Tokens of the whole response, end-of-sequence included; what the cap is a share of."""
    policy_version: int = 0
    """Version of the weights that wrote the response."""
    asks_reflection: bool = False
    """Whether a model is asked to say in a sentence what went wrong, because a teacher will read it."""

    @property
    def text(self) -> str:
        """The response, special tokens included, without its end-of-sequence token."""
        return "".join(segment.text for segment in self.segments)


class SegmentSpan(BaseModel):
    """One entry of a reply: segments start..end, both included."""

    # Models add remarks of their own; these are no reason to lose an annotation.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    start: int
    end: int
    type: str
    importance: Annotated[float, Field(ge=0)] = 1.0


class AnnotationReply(BaseModel):
    """What an annotator answers: `{"spans": [{"start": 12, "end": 14, "type": "case_analysis", "importance": 3}]}`.

    `reflection` beside it may say in a sentence what went wrong, in general words.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    spans: tuple[SegmentSpan, ...]
    reflection: str = ""


@dataclass(frozen=True)
class Answer:
    """A reply, and what it took to get it."""

    reply: AnnotationReply
    notes: Mapping[str, float] = field(default_factory=dict)
    """Counts for the audit, for example `hidden_spans` or `repairs`; see `trace_rl.annotation_audit`."""


class AnnotatorBackend(Protocol):
    """Anything that can answer a request: a rule, a file, a model behind an API, the policy itself.

    Many requests may be open at once; a backend that waits does so with `await`.
    """

    async def answer(self, request: AnnotationRequest) -> Answer:
        """The annotator's answer.

        Raises:
            AnnotationError: there is none; its `cause` says why.
        """
        ...


def span_class_of(graded: GradedRollout) -> SpanClass:
    """The class of spans that a response can have."""
    return "key" if graded.is_correct else "error"


def span_budget(num_tokens: int, coverage_cap: float) -> int:
    """floor(cap * num_tokens), where num_tokens counts the whole response, end-of-sequence included."""
    return math.floor(coverage_cap * num_tokens + 1e-9)  # 0.29 * 100 is 28.999999999999996


def resolve(
    reply: AnnotationReply, request: AnnotationRequest, token_text: TokenText, num_tokens: int
) -> tuple[tuple[Span, ...], dict[str, float]]:
    """Token spans of a reply, capped, with an audit of what was dropped or changed.

    In this order: drop what is out of range; read unknown types as `other`; merge overlaps, where the more important
    type wins; keep by importance, then position, until the budget is spent, the last one cut at a boundary between
    characters.

    Args:
        token_text: the text that the request's segments were cut from.
        num_tokens: tokens of the whole response, which the budget is a share of.

    Returns:
        Disjoint spans in order of position, and counts: out_of_range, unknown_types, merged, spans_before_cap,
        spans_after_cap, tokens_before_cap, tokens_after_cap, budget_tokens, round_trip_errors.
    """
    audit: Counter[str] = Counter()
    spans = _merge_overlaps(_token_spans(reply, request, audit), audit)
    budget = span_budget(num_tokens, request.coverage_cap)
    kept = _cap(spans, token_text, budget)
    audit["spans_before_cap"], audit["spans_after_cap"] = len(spans), len(kept)
    audit["tokens_before_cap"], audit["tokens_after_cap"] = _num_tokens(spans), _num_tokens(kept)
    audit["budget_tokens"] = budget
    audit["round_trip_errors"] = sum(
        token_text.token_range(*token_text.char_range(span.start, span.end)) != (span.start, span.end) for span in kept
    )
    return kept, {name: float(audit[name]) for name in _AUDIT}


def readable_reflection(reply: AnnotationReply, request: AnnotationRequest) -> str:
    """The reply's reflection where a teacher may read it, else nothing.

    Refused are reflections with a digit, which could be a position or a result, those that quote the response or the
    reference solution, those that give the answer, and those of more than MAX_REFLECTION_CHARS characters: the teacher
    is told what went wrong, not where, and nothing of the solution.
    """
    text = " ".join(reply.reflection.split())
    if len(text) > MAX_REFLECTION_CHARS or any(map(str.isdigit, text)):
        return ""
    folded, answer = text.casefold(), _folded(request.prompt.answer)
    gives_answer = bool(answer) and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", folded)
    sources = (_folded(request.text), _folded(request.prompt.solution))
    quotes = [folded[start : start + _QUOTE_CHARS] for start in range(max(0, len(folded) - _QUOTE_CHARS + 1))]
    return "" if gives_answer or any(quote in source for quote in quotes for source in sources) else text


_AUDIT = (
    "out_of_range",
    "unknown_types",
    "merged",
    "spans_before_cap",
    "spans_after_cap",
    "tokens_before_cap",
    "tokens_after_cap",
    "budget_tokens",
    "round_trip_errors",
)


def _token_spans(reply: AnnotationReply, request: AnnotationRequest, audit: Counter[str]) -> list[Span]:
    spans = []
    for entry in reply.spans:
        if not 1 <= entry.start <= entry.end <= len(request.segments):
            audit["out_of_range"] += 1
            continue
        is_known = entry.type in request.types
        audit["unknown_types"] += not is_known
        first, last = request.segments[entry.start - 1], request.segments[entry.end - 1]
        name = entry.type if is_known else OTHER_TYPE
        spans.append(Span(first.token_start, last.token_end, request.span_class, name, entry.importance))
    return spans


def _merge_overlaps(spans: Sequence[Span], audit: Counter[str]) -> list[Span]:
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if merged and span.start < merged[-1].end:
            before = merged.pop()
            leading = span if span.importance > before.importance else before
            end = max(before.end, span.end)
            merged.append(Span(before.start, end, leading.span_class, leading.type, leading.importance))
            audit["merged"] += 1
        else:
            merged.append(span)
    return merged


def _cap(spans: Sequence[Span], token_text: TokenText, budget: int) -> tuple[Span, ...]:
    kept: list[Span] = []
    for span in sorted(spans, key=lambda span: (-span.importance, span.start)):
        end = token_text.boundary_at_most(min(span.end, span.start + budget))
        if end > span.start:
            kept.append(Span(span.start, end, span.span_class, span.type, span.importance))
        if end < span.end:
            break
        budget -= end - span.start
    return tuple(sorted(kept, key=lambda span: span.start))


def _num_tokens(spans: Sequence[Span]) -> int:
    return sum(span.end - span.start for span in spans)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
