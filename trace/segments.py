"""The text of a response, its exact character-to-token map, and the numbered segments that annotators point at.

Decides where a response is cut: at matches of a boundary expression outside of math delimiters, always behind
`</think>`; short pieces are merged, long ones split (protocol of arXiv:2605.10194, details ours). A character is a
Unicode code point: an emoji or letter that is made of several may be cut between them.

Invariants:
* The pieces of `TokenText` concatenate to what the tokenizer decodes from the same ids; nothing is re-tokenised.
  Special tokens are part of the text, because every id has a place in it.
* A position inside a token belongs to the next token boundary between characters. So (tokens -> characters -> tokens)
  is the identity on segments.
* The segments of a response partition its tokens. No border between them lies inside a character, strictly inside a
  closed pair of math delimiters (`math_regions`) or strictly inside a `</think>`. Where one token holds the end of one
  of these and the beginning of the next, both stay in one segment: keeping them whole goes before every limit and cut.

This module must not know what annotators say about segments or what tokens are routed for.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

from pydantic import Field, field_validator, model_validator

from trace_rl.config.base import Section
from trace_rl.errors import AnnotationError

MAX_WINDOW = 16
"""Tokens that one character may take before `read_tokens` stops waiting for its end; UTF-8 needs four."""
THINK_END = "</think>"

_DELIMITER = re.compile(
    r"(?P<escape>\\\\|\\\$)|(?P<dollars>\$\$?)|(?P<open>\\[\[(])|(?P<close>\\[\])])"
    r"|\\(?P<environment>begin|end)\{(?P<name>[^{}<\n]{1,40})\}|(?P<reset>\n[ \t]*\n|</think>)|(?P<newline>\n)"
)
_CLOSING = {"\\[": "\\]", "\\(": "\\)"}


class Segmentation(Section):
    """How a response is cut into the numbered segments that an annotator points at."""

    boundary: str = r"\n\s*\n|\n|(?<=[.!?])\s+"
    """Regular expression; a segment ends behind each match outside of math delimiters, or within the match where a
    token reaches over its end. Python's `re` has no time limit: an expression with nested repeats, such as `(a+)+b`,
    can stop the annotator."""
    min_tokens: int = Field(8, ge=1)
    """Shorter pieces are merged with the next one."""
    max_tokens: int = Field(128, ge=1)
    """Longer pieces are split, but never inside a character, a `</think>` or closed math: math that has more tokens
    makes a longer segment."""

    @field_validator("boundary")
    @classmethod
    def _is_regular_expression(cls, boundary: str) -> str:
        try:
            re.compile(boundary)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"annotator.segmentation.boundary {boundary!r} is not a regular expression ({error}); correct it"
            ) from None
        return boundary

    @model_validator(mode="after")
    def _limits_are_ordered(self) -> Segmentation:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"annotator.segmentation.min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; lower it"
            )
        return self


class Detokenizer(Protocol):
    """The part of a Hugging Face tokenizer that reading a response needs."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Sequence[str | None]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


@dataclass(frozen=True)
class TokenText:
    """Decoded token ids together with where each token's text starts."""

    text: str
    offsets: tuple[int, ...]
    """[num_tokens + 1] characters before each token: token t wrote offsets[t]:offsets[t + 1].

    A token that ends inside a character writes nothing: its whole text belongs to the token that completes the
    character, so a boundary inside a character is never the first one with its offset.
    """

    @property
    def num_tokens(self) -> int:
        return len(self.offsets) - 1

    def char_range(self, start: int, end: int) -> tuple[int, int]:
        """Characters of the tokens [start, end)."""
        return self.offsets[start], self.offsets[end]

    def token_at(self, char: int) -> int:
        """The first token boundary at or behind a character position."""
        if char <= 0:
            return 0
        return self.num_tokens if char >= len(self.text) else bisect_left(self.offsets, char)

    def token_range(self, char_start: int, char_end: int) -> tuple[int, int]:
        """Tokens of the characters [char_start, char_end), each end moved to the next token boundary."""
        return self.token_at(char_start), self.token_at(char_end)

    def is_boundary(self, token: int) -> bool:
        """Whether the boundary before a token lies between characters."""
        return self.token_at(self.offsets[token]) == token

    def boundary_at_most(self, token: int) -> int:
        """The last boundary between characters that is not behind `token`."""
        while not self.is_boundary(token):
            token -= 1
        return token


@dataclass(frozen=True)
class Segment:
    """Tokens [token_start, token_end) of a response, with the number by which an annotator names them."""

    number: int
    """Counts from 1."""
    token_start: int
    token_end: int
    text: str


def read_tokens(tokenizer: Detokenizer, token_ids: Sequence[int]) -> TokenText:
    """Decode ids, special tokens kept, and find out which token wrote which characters.

    Byte-level vocabularies (GPT-2 onwards) are read through their byte alphabet, others by decoding a sliding window;
    time is linear in both cases, and the result is compared with the decoding of the whole.

    Raises:
        AnnotationError: the tokenizer's decoding is not the concatenation of pieces of text.
    """
    ids = list(token_ids)
    text = decode(tokenizer, ids)
    pieces = _byte_level_pieces(tokenizer.convert_ids_to_tokens(ids))
    if "".join(pieces) != text:
        pieces = _windowed_pieces(tokenizer, ids)
    if "".join(pieces) != text:
        raise AnnotationError(
            f"The decoding of {len(ids)} tokens by {type(tokenizer).__name__} is not the concatenation of its tokens, "
            "so characters cannot be mapped to tokens: use a tokenizer that decodes token by token."
        )
    return TokenText(text, tuple(accumulate(map(len, pieces), initial=0)))


def decode(tokenizer: Detokenizer, token_ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def segment(token_text: TokenText, settings: Segmentation) -> tuple[Segment, ...]:
    """Cut a response (without its end-of-sequence token) into numbered segments; none where there is no text.

    A segment has at least `min_tokens` tokens unless it lies beside a `</think>`, the end of the response or math that
    is too long, and at most `max_tokens` unless nothing in it may be cut: a character, a `</think>`, or math.
    """
    text = token_text.text
    if not text:
        return ()
    thinking_ends = [match.span() for match in re.finditer(re.escape(THINK_END), text)]
    regions = sorted([*math_regions(text), *thinking_ends])
    borders = _borders(token_text, regions)
    hard = {_border_in(token_text, borders, end, end) for _, end in thinking_ends} | {token_text.num_tokens}
    matches = [match.span() for match in re.finditer(settings.boundary, text)]
    soft = {_border_in(token_text, borders, *span) for span in matches if not _is_inside(regions, span[1])}
    ends = _merge_short(sorted(hard | soft), hard, settings.min_tokens)
    segments: list[Segment] = []
    start = 0
    for end in _split_long(borders, ends, settings.max_tokens):
        char_start, char_end = token_text.char_range(start, end)
        segments.append(Segment(len(segments) + 1, start, end, text[char_start:char_end]))
        start = end
    return tuple(segments)


def math_regions(text: str) -> list[tuple[int, int]]:
    """Characters between closed math delimiters, delimiters included, ascending and disjoint.

    `$` pairs within a line, all others within a paragraph, so an unclosed delimiter does no harm beyond it; what is
    nested in an open pair is not looked at.
    """
    regions, waits_for, opened_at = [], "", 0
    for match in _DELIMITER.finditer(text):
        opens, closes = _role(match)
        if match["reset"] or (match["newline"] and waits_for == "$"):
            waits_for = ""
        elif waits_for and closes == waits_for:
            regions.append((opened_at, match.end()))
            waits_for = ""
        elif not waits_for and opens:
            waits_for, opened_at = opens, match.start()
    return regions


def _role(match: re.Match[str]) -> tuple[str, str]:
    """(what would close the pair that this delimiter opens, what this delimiter closes); empty where it does not."""
    if match["dollars"]:
        return match["dollars"], match["dollars"]
    if match["environment"]:
        closing = f"end {match['name']}"
        return (closing, "") if match["environment"] == "begin" else ("", closing)
    return _CLOSING.get(match["open"] or "", ""), match["close"] or ""


def _is_inside(regions: Sequence[tuple[int, int]], char: int) -> bool:
    """Whether a position lies strictly inside one of the regions, which are ascending and disjoint."""
    before = bisect_left(regions, (char,)) - 1  # the last region that starts before the position
    return before >= 0 and char < regions[before][1]


def _borders(token_text: TokenText, regions: Sequence[tuple[int, int]]) -> list[int]:
    """Ascending token boundaries at which a segment may end, 0 and num_tokens included."""
    boundaries = filter(token_text.is_boundary, range(token_text.num_tokens + 1))
    return [token for token in boundaries if not _is_inside(regions, token_text.offsets[token])]


def _border_in(token_text: TokenText, borders: Sequence[int], start: int, end: int) -> int:
    """The last border within the characters [start, end] of a match, or the first one behind them.

    Tokens often begin with the space before a word or a `$`; a cut behind that space would come after the word.
    """
    behind = bisect_left(borders, token_text.token_at(end))
    is_overshot = token_text.offsets[borders[behind]] > end
    return borders[behind - 1] if is_overshot and token_text.offsets[borders[behind - 1]] >= start else borders[behind]


def _merge_short(cuts: Iterable[int], hard: set[int], min_tokens: int) -> list[int]:
    """Ends of segments: a short piece joins the next one, or the one before where a hard cut follows."""
    ends: list[int] = []
    start = 0
    for cut in cuts:
        if cut - start >= min_tokens:
            ends.append(cut)
        elif cut in hard and cut > start:
            if ends and ends[-1] not in hard:
                ends.pop()
            ends.append(cut)
        else:
            continue
        start = cut
    return ends


def _split_long(borders: Sequence[int], ends: Iterable[int], max_tokens: int) -> list[int]:
    """Ends of segments: a long piece becomes parts of equal length, as far as the borders allow."""
    split: list[int] = []
    start = 0
    for end in ends:
        while end - start > max_tokens:
            num_parts = -(-(end - start) // max_tokens)
            start = _nearest_border(borders, start, start + (end - start) // num_parts, start + max_tokens)
            split.append(start)
        if end > start:
            split.append(end)
        start = end
    return split


def _nearest_border(borders: Sequence[int], start: int, target: int, limit: int) -> int:
    """The border in (start, limit] that is nearest to target; where there is none, the first one behind."""
    index = bisect_right(borders, target)
    reachable = [border for border in borders[index - 1 : index + 1] if start < border <= limit]
    return min(reachable, key=lambda border: abs(border - target), default=borders[index])


def _byte_level_pieces(tokens: Sequence[str | None]) -> list[str]:
    """Text that each token of a byte-level vocabulary completes; a token without the alphabet stands for itself.

    Merges of bytes do not respect characters: " " and the first two bytes of an emoji are one token in most
    vocabularies. Its space is kept for the token that completes the emoji.
    """
    alphabet = _byte_alphabet()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces, written = [], ""
    for token in tokens:
        try:
            data = bytes(alphabet[char] for char in token or "")
        except KeyError:
            data = (token or "").encode()
        written += decoder.decode(data)
        is_inside_character = bool(decoder.getstate()[0])
        pieces.append("" if is_inside_character else written)
        written = written if is_inside_character else ""
    if pieces:
        pieces[-1] += written + decoder.decode(b"", final=True)
    return pieces


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in byte-level BPE (Radford et al. 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _windowed_pieces(tokenizer: Detokenizer, ids: list[int]) -> list[str]:
    """Text that each token adds to the decoding of the last few tokens before it."""
    pieces: list[str] = []
    context, start = 0, 0
    for end in range(1, len(ids) + 1):
        before, after = decode(tokenizer, ids[context:start]), decode(tokenizer, ids[context:end])
        is_complete = not after.endswith("\ufffd") or end - start >= MAX_WINDOW or end == len(ids)
        pieces.append(after[len(before) :] if is_complete else "")
        if is_complete:
            context, start = start, end
    return pieces
