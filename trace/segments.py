"""The text of a response, its exact character-to-token map, and the numbered segments that annotators point at.

Decides where a response is cut: behind matches of a boundary expression outside of math delimiters, never across
`</think>`; short pieces are merged, long ones split (protocol of arXiv:2605.10194, details ours).

Invariants:
* The pieces of `TokenText` concatenate to what the tokenizer decodes from the same ids; nothing is re-tokenised.
  Special tokens are part of the text, because every id has a place in it.
* A position inside a token belongs to the next token boundary; a token boundary inside a character is never used as
  the end of a segment. So (tokens -> characters -> tokens) is the identity on segments.
* The segments of a response partition its tokens.

This module must not know what annotators say about segments or what tokens are routed for.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Protocol

from trace_rl.config.roles import Segmentation
from trace_rl.errors import AnnotationError

MAX_WINDOW = 16
"""Tokens that one character may take before `read_tokens` stops waiting for its end; UTF-8 needs four."""
THINK_END = "</think>"

_DELIMITER = re.compile(
    r"(?P<escape>\\\\|\\\$)|(?P<dollars>\$\$?)|(?P<open>\\[\[(])|(?P<close>\\[\])])"
    r"|\\(?P<environment>begin|end)\{(?P<name>[^{}\n]{1,40})\}|(?P<reset>\n[ \t]*\n|</think>)|(?P<newline>\n)"
)
_CLOSING = {"\\[": "\\]", "\\(": "\\)"}


class Detokenizer(Protocol):
    """The part of a Hugging Face tokenizer that reading a response needs."""

    def convert_ids_to_tokens(self, ids: list[int]) -> Sequence[str | None]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


@dataclass(frozen=True)
class TokenText:
    """Decoded token ids together with where each token's text starts."""

    text: str
    offsets: tuple[int, ...]
    """[num_tokens + 1] number of complete characters before each token: token t wrote offsets[t]:offsets[t + 1]."""

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
    text = _decode(tokenizer, ids)
    pieces = _byte_level_pieces(tokenizer.convert_ids_to_tokens(ids))
    if "".join(pieces) != text:
        pieces = _windowed_pieces(tokenizer, ids)
    if "".join(pieces) != text:
        raise AnnotationError(
            f"The decoding of {len(ids)} tokens by {type(tokenizer).__name__} is not the concatenation of its tokens, "
            "so characters cannot be mapped to tokens: use a tokenizer that decodes token by token."
        )
    return TokenText(text, tuple(accumulate(map(len, pieces), initial=0)))


def segment(token_text: TokenText, settings: Segmentation) -> tuple[Segment, ...]:
    """Cut a response (without its end-of-sequence token) into numbered segments; none where there is no text.

    A segment has at least `min_tokens` tokens unless a `</think>` or the end of the response is near, and at most
    `max_tokens` (plus the rest of a character).
    """
    if not token_text.text:
        return ()
    hard = {token_text.token_at(char) for char in _ends_of_thinking(token_text.text)} | {token_text.num_tokens}
    soft = {token_text.token_at(char) for char in _boundaries(token_text.text, settings.boundary)}
    ends = _merge_short(sorted(hard | soft), hard, settings.min_tokens)
    segments: list[Segment] = []
    start = 0
    for end in _split_long(token_text, ends, settings.max_tokens):
        char_start, char_end = token_text.char_range(start, end)
        segments.append(Segment(len(segments) + 1, start, end, token_text.text[char_start:char_end]))
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


def _boundaries(text: str, boundary: str) -> list[int]:
    """Ends of the boundary's matches that do not lie strictly inside math."""
    regions = math_regions(text)
    starts = [start for start, _ in regions]
    ends = []
    for match in re.compile(boundary).finditer(text):
        before = bisect_left(starts, match.end()) - 1  # the last region that starts before the cut
        if before < 0 or match.end() >= regions[before][1]:
            ends.append(match.end())
    return ends


def _ends_of_thinking(text: str) -> list[int]:
    return [match.end() for match in re.finditer(re.escape(THINK_END), text)]


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


def _split_long(token_text: TokenText, ends: Iterable[int], max_tokens: int) -> list[int]:
    """Ends of segments: a long piece becomes parts of equal length, cut between characters."""
    split: list[int] = []
    start = 0
    for end in ends:
        num_parts = -(-(end - start) // max_tokens)
        for part in range(1, num_parts):
            cut = token_text.boundary_at_most(start + part * (end - start) // num_parts)
            if cut > (split[-1] if split else 0):
                split.append(cut)
        split.append(end)
        start = end
    return split


def _decode(tokenizer: Detokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _byte_level_pieces(tokens: Sequence[str | None]) -> list[str]:
    """Text that each token of a byte-level vocabulary completes; a token without the alphabet stands for itself."""
    alphabet = _byte_alphabet()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = []
    for token in tokens:
        try:
            data = bytes(alphabet[char] for char in token or "")
        except KeyError:
            data = (token or "").encode()
        pieces.append(decoder.decode(data))
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
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
        before, after = _decode(tokenizer, ids[context:start]), _decode(tokenizer, ids[context:end])
        is_complete = not after.endswith("\ufffd") or end - start >= MAX_WINDOW or end == len(ids)
        pieces.append(after[len(before) :] if is_complete else "")
        if is_complete:
            context, start = start, end
    return pieces
