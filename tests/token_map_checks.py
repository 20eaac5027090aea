"""What must hold for the token map and the segments of every response, whatever its tokenizer and its text."""

from collections.abc import Sequence
from itertools import pairwise

from trace_rl.segments import (
    THINK_END,
    Detokenizer,
    Segment,
    Segmentation,
    TokenText,
    math_regions,
    read_tokens,
    segment,
)


def decode(tokenizer: Detokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_map(tokenizer: Detokenizer, ids: list[int]) -> TokenText:
    """The text is what the tokenizer decodes, every token has its place in it, and boundaries survive the way back."""
    found = read_tokens(tokenizer, ids)
    assert found.text == decode(tokenizer, ids)
    assert found.num_tokens == len(ids) and found.offsets[0] == 0 and found.offsets[-1] == len(found.text)
    assert all(left <= right for left, right in pairwise(found.offsets))
    before = 0
    for token in range(len(ids) + 1):
        if found.is_boundary(token) and found.text:
            assert found.token_range(*found.char_range(before, token)) == (before, token)
            before = token
        assert found.boundary_at_most(token) == before or not found.text
    return found


def is_uncuttable(token_text: TokenText, regions: Sequence[tuple[int, int]], token: int) -> bool:
    """Whether a boundary lies inside a character or strictly inside a region; looks at every region."""
    char = token_text.offsets[token]
    return not token_text.is_boundary(token) or any(start < char < end for start, end in regions)


def think_tags(text: str) -> list[tuple[int, int]]:
    return [(char, char + len(THINK_END)) for char in range(len(text)) if text.startswith(THINK_END, char)]


def check_segments(token_text: TokenText, settings: Segmentation) -> tuple[Segment, ...]:
    """Partition, numbering, uncut characters, math and tags, lengths, and the way from tokens to text and back."""
    found = segment(token_text, settings)
    text = token_text.text
    assert "".join(item.text for item in found) == text
    assert [item.number for item in found] == list(range(1, len(found) + 1))
    ends = [item.token_end for item in found]
    assert [item.token_start for item in found] == [0, *ends[:-1]][: len(found)]
    assert ends[-1:] == ([token_text.num_tokens] if text else [])
    tags = think_tags(text)
    regions = [*math_regions(text), *tags]
    for item in found:
        assert item.text
        chars = token_text.char_range(item.token_start, item.token_end)
        assert token_text.token_range(*chars) == (item.token_start, item.token_end)
        assert not is_uncuttable(token_text, regions, item.token_end)
        if item.token_end - item.token_start > settings.max_tokens:
            assert all(is_uncuttable(token_text, regions, t) for t in range(item.token_start + 1, item.token_end))
    for _, tag_end in tags:
        behind = token_text.token_at(tag_end)
        while is_uncuttable(token_text, regions, behind):
            behind += 1
        assert behind in ends
    return found
