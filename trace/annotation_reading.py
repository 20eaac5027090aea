"""How the answer of a language model is read: which JSON in it counts, and which of its spans.

Decides what is forgiven: text and code fences around the JSON, thoughts before it, numbers written as 3.0 or "3", a
missing importance, and single entries that make no sense.

Invariants: any text gives either a reply or an `AnnotationError`, in time linear in its length; what was dropped is
counted.

This module must not know what was asked; segment numbers and types are checked by `trace_rl.annotation.resolve`.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

from trace_rl.annotation import AnnotationReply, SegmentSpan
from trace_rl.errors import AnnotationError

MAX_DEPTH = 16
"""Objects and lists are looked for to this depth from the inside; an answer needs three."""
MAX_NUMBER = 10**9
"""Larger numbers are no segment and no importance."""

_FORM = '{"spans": [{"start": 12, "end": 14, "type": "TYPE", "importance": 3}]}'
_OPENING = re.compile(r"\{")
_TOKEN = re.compile(r'"[^"\\\n\r]*+(?:\\.[^"\\\n\r]*+)*+"?|[{}\[\]]')
"""A bracket, or a string up to its end or that of the line, so that a stray quotation mark does no harm beyond it."""
_PAIRS = {"}": "{", "]": "["}
_INTEGER = re.compile(r"[+-]?[0-9]{1,10}")


def read_reply(text: str) -> tuple[AnnotationReply, int]:
    """The reply in a model's answer, and how many of its entries were dropped because they make no sense.

    The answer is the whole text, or else the last complete JSON object in it, outside of thoughts, that has a list of
    spans: models explain first and answer last.

    Raises:
        AnnotationError: there is no such object, or none of its entries makes sense; `cause` is "unparsable".
    """
    answer = _answer(text)
    if answer is None:
        raise _unparsable(text, "which holds no complete JSON object with a list of spans")
    entries = answer["spans"]
    spans = tuple(span for span in map(_span, entries) if span is not None)
    if entries and not spans:
        raise _unparsable(text, "where no span has a whole number as start and end and a text as type")
    reflection = answer.get("reflection")
    if not isinstance(reflection, str):  # no reason to lose the spans
        reflection = ""
    return AnnotationReply(spans=spans, reflection=_encodable(reflection)), len(entries) - len(spans)


def visible_spans(reply: AnnotationReply, hidden: range) -> tuple[AnnotationReply, int]:
    """The reply without spans over segments that the model was not shown, and their number."""
    spans = tuple(span for span in reply.spans if max(span.start, hidden.start) >= min(span.end + 1, hidden.stop))
    return reply.model_copy(update={"spans": spans}), len(reply.spans) - len(spans)


def _unparsable(text: str, problem: str) -> AnnotationError:
    return AnnotationError(
        f"The annotator answered {text[:80]!r}, {problem}; expected JSON like {_FORM}.", "unparsable"
    )


def _answer(text: str) -> dict[str, Any] | None:
    whole = _loaded(text)
    if whole is not None:
        return whole
    answer = text.rpartition("</think>")[2].partition("<think>")[0]  # a thought that never ends has no answer
    found = (_loaded(answer[start:end]) for start, end in reversed(list(_objects(answer))))
    return next((value for value in found if value is not None), None)


def _loaded(text: str) -> dict[str, Any] | None:
    """The object in a text that is nothing but JSON, if it has a list of spans."""
    try:
        # Guided decoding lets control characters into strings.
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("spans"), list) else None


def _objects(text: str) -> Iterator[tuple[int, int]]:
    """Characters [start, end) of everything between matching braces, in order of their ends.

    Quotation marks count within braces only. Each character lies in at most MAX_DEPTH of the ranges.
    """
    opened: deque[tuple[str, int]] = deque(maxlen=MAX_DEPTH)
    position = 0
    while match := (_TOKEN if opened else _OPENING).search(text, position):
        position = match.end()
        token = match[0]
        if token in "{[":
            opened.append((token, match.start()))
        elif token in _PAIRS:
            bracket, start = opened.pop()
            if bracket != _PAIRS[token]:
                opened.clear()
            elif token == "}":
                yield start, position


def _span(entry: Any) -> SegmentSpan | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        return None
    start, end, importance = (_number(entry.get(name)) for name in ("start", "end", "importance"))
    if start is None or end is None or start % 1 or end % 1:
        return None
    weight = 1.0 if importance is None or importance < 0 else float(importance)
    return SegmentSpan(start=int(start), end=int(end), type=_encodable(entry["type"]), importance=weight)


def _number(value: Any) -> float | None:
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= MAX_NUMBER else None  # NaN is not


def _encodable(text: str) -> str:
    """The text without halves of characters, which no file or message could hold."""
    return text.encode("utf-8", "ignore").decode()
