"""Annotators that answer by themselves: a task's rule, controls that draw segments, and a recorded file.

Invariants: an answer depends on the request and the run's seed alone, not on the order of requests; controls match the
coverage that the annotator they stand in for has on the same response (mask ablations of arXiv:2605.10194), as near as
`_draw` says.

This module must not know about models, tokens' texts beyond the request's segments, or what spans are used for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from pydantic import BaseModel, ConfigDict, ValidationError

from trace_rl.annotation import AnnotationReply, AnnotationRequest, AnnotatorBackend, Answer, SegmentSpan, span_budget
from trace_rl.errors import AnnotationError, DataError
from trace_rl.prompts import derive_seed
from trace_rl.protocols import ErrorRule
from trace_rl.segments import Segment

logger = logging.getLogger(__name__)

Mask = Bool[np.ndarray, " segment"]


@dataclass(frozen=True)
class OracleBackend:
    """A task's rule as an annotator: the segments that the rule's character spans touch."""

    rule: ErrorRule

    async def answer(self, request: AnnotationRequest) -> Answer:
        return Answer(rule_reply(self.rule, request))


def rule_reply(rule: ErrorRule, request: AnnotationRequest) -> AnnotationReply:
    """Spans of a rule in segment numbers, empty ones left out; the first error's meaning is the reflection."""
    find = rule.key_spans if request.span_class == "key" else rule.error_spans
    spans = []
    for char_start, char_end, name, importance in find(request.prompt, request.text):
        touched = _touched(request.segments, char_start, char_end)
        if touched:
            spans.append(SegmentSpan(start=touched[0], end=touched[-1], type=name, importance=importance))
    is_error = request.span_class == "error" and bool(spans)
    reflection = f"The first mistake: {rule.types[spans[0].type]}." if is_error else ""
    return AnnotationReply(spans=tuple(spans), reflection=reflection)


@dataclass(frozen=True)
class AllTokenBackend:
    """Marks every segment, in one span of the first type of the list."""

    async def answer(self, request: AnnotationRequest) -> Answer:
        if not request.segments:
            return Answer(AnnotationReply(spans=()))
        span = SegmentSpan(start=1, end=len(request.segments), type=next(iter(request.types)))
        return Answer(AnnotationReply(spans=(span,)))


@dataclass(frozen=True)
class RandomBackend:
    """Marks segments drawn from the whole response in place of those that another annotator marks.

    Number of tokens (see `_draw`), types, importance, reflection and notes are the other annotator's.
    """

    of: AnnotatorBackend
    seed: int
    """The run's."""
    coverage_cap: float
    """The share that `resolve` will leave of an answer."""

    async def answer(self, request: AnnotationRequest) -> Answer:
        answer = await self.of.answer(request)
        free = np.ones(len(request.segments), dtype=bool)
        seed = derive_seed(self.seed, "random annotator", request.prompt.prompt_id, request.text)
        return _redrawn(answer, request, free, self.coverage_cap, seed)


@dataclass(frozen=True)
class InvertedBackend:
    """As `RandomBackend`, but drawn from the segments that the other annotator leaves untouched; fewer tokens where
    these have not enough."""

    of: AnnotatorBackend
    seed: int
    coverage_cap: float

    async def answer(self, request: AnnotationRequest) -> Answer:
        answer = await self.of.answer(request)
        free = ~_marked(_valid(answer.reply, request), len(request.segments))
        seed = derive_seed(self.seed, "inverted annotator", request.prompt.prompt_id, request.text)
        return _redrawn(answer, request, free, self.coverage_cap, seed)


@dataclass(frozen=True)
class ReplayBackend:
    """Answers out of a recording."""

    replies: Mapping[str, AnnotationReply]
    """By `recording_key`."""

    async def answer(self, request: AnnotationRequest) -> Answer:
        reply = self.replies.get(recording_key(request))
        if reply is None:
            raise AnnotationError(
                f"The recording (annotator.backend.path) has no {request.span_class} spans for this response to "
                f"{request.prompt.prompt_id} in these {len(request.segments)} segments; record it with `trace-rl "
                "annotate` and the run's own annotator.segmentation.",
                "not_recorded",
            )
        return Answer(reply)


class _Recorded(BaseModel):
    """What is read of a line of a recording; the rest of it is for people."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    key: str
    reply: AnnotationReply


def recording_key(request: AnnotationRequest) -> str:
    """Digest of the question, the class of spans and the segments' texts: a reply is for these segments alone."""
    parts = [request.prompt.question, request.span_class, *(segment.text for segment in request.segments)]
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def recording_line(request: AnnotationRequest, reply: AnnotationReply) -> str:
    """A reply as one line of a recording, its newline included: {"key", "prompt_id", "span_class", "reply"}."""
    record = {
        "key": recording_key(request),
        "prompt_id": request.prompt.prompt_id,
        "span_class": request.span_class,
        "reply": reply.model_dump(mode="json"),
    }
    return json.dumps(record) + "\n"


def read_recording(path: Path) -> Mapping[str, AnnotationReply]:
    """The replies of a recording by key; of two with the same key the last one.

    A last line without a newline that cannot be read is what a killed writer leaves; it is skipped with a warning.

    Raises:
        DataError: the file cannot be read, or another line is not a recorded reply.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give a file that `trace-rl annotate` has written"
        ) from error
    replies = {}
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        try:
            recorded = _Recorded.model_validate_json(line)
        except ValidationError as error:
            if number > len(lines):
                logger.warning("Line %d of %s is cut short and is left out: its writer was stopped.", number, path)
                continue
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise DataError(
                f"{path}, line {number}: {place} is wrong ({first['msg']}); expected a line like "
                '{"key": "...", "reply": {"spans": []}}: delete the line, or record the file again'
            ) from error
        replies[recorded.key] = recorded.reply
    return replies


def _valid(reply: AnnotationReply, request: AnnotationRequest) -> list[SegmentSpan]:
    """The entries that `resolve` would take, in order of position."""
    entries = [entry for entry in reply.spans if 1 <= entry.start <= entry.end <= len(request.segments)]
    return sorted(entries, key=lambda entry: (entry.start, entry.end))


def _marked(entries: Sequence[SegmentSpan], num_segments: int) -> Mask:
    """Which segments are in an entry."""
    marked = np.zeros(num_segments, dtype=bool)
    for entry in entries:
        marked[entry.start - 1 : entry.end] = True
    return marked


def _redrawn(answer: Answer, request: AnnotationRequest, free: Mask, coverage_cap: float, seed: int) -> Answer:
    """The same answer with its spans moved to segments drawn from the free ones."""
    entries = _valid(answer.reply, request)
    sizes = np.array([item.token_end - item.token_start for item in request.segments], dtype=np.int64)
    budget = span_budget(request.num_tokens, coverage_cap)
    marked_tokens = int(sizes[_marked(entries, len(sizes))].sum())
    generator = np.random.default_rng(seed)
    by_importance = sorted(entries, key=lambda entry: -entry.importance)  # the order in which the cap keeps them
    order = _random_order(free, [entry.end - entry.start + 1 for entry in by_importance], generator)
    drawn = _draw(order, sizes, min(marked_tokens, budget), is_cut=marked_tokens >= budget)
    spans = _dealt(sorted(drawn), entries)
    return Answer(answer.reply.model_copy(update={"spans": spans}), answer.notes)


def _random_order(free: Mask, lengths: Sequence[int], generator: np.random.Generator) -> list[int]:
    """The free segments in random order: first runs of the given lengths where there is room, then one by one."""
    left = free.copy()
    order: list[int] = []
    for length in (length for length in lengths if length > 1):
        room = np.concatenate([[0], np.cumsum(left)])
        starts = np.flatnonzero(room[length:] - room[:-length] == length)
        if len(starts):
            start = int(generator.choice(starts))
            order += range(start, start + length)
            left[start : start + length] = False
    return order + [int(index) for index in generator.permutation(np.flatnonzero(left))]


def _draw(order: Sequence[int], sizes: Int[np.ndarray, " segment"], target: int, is_cut: bool) -> list[int]:
    """Segments out of a random order that have about `target` tokens together.

    They are taken in order up to the one that would pass the target. Where the cap cuts (`is_cut`: the target is the
    budget) that one is taken too, and `resolve` leaves exactly the budget, as far as characters allow. Elsewhere the
    rest is filled with the segments that come nearest to it, so that the whole is off by at most half of the longest
    segment, and short of the target by more only where no segment is left. Sizes decide about the rest alone: roles
    have sizes (results are short), and the best fit throughout would draw just the segments that a rule marks.
    """
    taken: list[int] = []
    rest = target
    for index in order:
        if rest <= 0 or (sizes[index] > rest and not is_cut):
            break
        taken.append(index)
        rest -= int(sizes[index])
    left = list(order[len(taken) :])
    while left and rest > 0:
        nearest = min(left, key=lambda index: abs(int(sizes[index]) - rest))
        if abs(int(sizes[nearest]) - rest) >= rest:
            break
        left.remove(nearest)
        taken.append(nearest)
        rest -= int(sizes[nearest])
    return taken


def _dealt(drawn: Sequence[int], entries: Sequence[SegmentSpan]) -> tuple[SegmentSpan, ...]:
    """Spans over the drawn segments (ascending): types and importance of the entries in order, each for an equal share
    of the segments; neighbours with the same entry are one span."""
    spans: list[SegmentSpan] = []
    for place, index in enumerate(drawn):
        entry = entries[place * len(entries) // len(drawn)]
        number = index + 1
        last = spans[-1] if spans else None
        if last and last.end == index and (last.type, last.importance) == (entry.type, entry.importance):
            spans[-1] = last.model_copy(update={"end": number})
        else:
            spans.append(entry.model_copy(update={"start": number, "end": number}))
    return tuple(spans)


def _touched(segments: Sequence[Segment], char_start: int, char_end: int) -> list[int]:
    """Numbers of the segments that share a character with [char_start, char_end)."""
    numbers, start = [], 0
    for segment in segments:
        end = start + len(segment.text)
        if max(start, char_start) < min(end, char_end):
            numbers.append(segment.number)
        start = end
    return numbers
