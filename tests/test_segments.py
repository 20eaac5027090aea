"""The character-to-token map on every kind of text and vocabulary, and where responses are cut."""

from itertools import accumulate
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_map_checks import check_map, check_segments
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from trace_rl.errors import AnnotationError
from trace_rl.segments import Segmentation, TokenText, math_regions, read_tokens, segment
from trace_rl.tasks.arithmetic import base_model_path
from trace_rl.workers.token_reader import CoreReader

CORPUS = [
    "Step 1: 47 + 38 = 85\nStep 2: 85 - 15 = 70\n\\boxed{70}",
    "Das Maß ist größer. 数学は美しい。 Ответ: √2 ≈ 1.414 🙂🙂",
    "<think>\nLet $x = 1$.\n\nThen \\[x + 1 = 2\\]\n</think>\n\nThe answer is 2.",
]
SPECIALS = ["<|im_end|>", "<think>", "</think>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(special, normalized=False) for special in SPECIALS])
    tokenizer.add_tokens([AddedToken("two words ß", normalized=False)])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Metaspace with byte fallback, as in Llama 2: not a byte-level alphabet, and the first space is dropped."""
    pieces = ["<unk>", "▁", "▁the", "▁a", "b", "c", "the", "é", "数"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


BYTE_LEVEL = byte_level()
TOKENIZER = CoreReader(BYTE_LEVEL)
EMBEDDED = Tokenizer.from_file(str(base_model_path() / "tokenizer.json"))


def encode(text: str) -> list[int]:
    return list(BYTE_LEVEL.encode(text).ids)


class Letters:
    """A tokenizer whose ids are characters: one token a character."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(token_id) for token_id in ids]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "".join(map(chr, token_ids))


def letters(text: str) -> TokenText:
    return read_tokens(Letters(), [ord(char) for char in text])


def pieces(*texts: str) -> TokenText:
    """One token for each text."""
    return TokenText("".join(texts), tuple(accumulate(map(len, texts), initial=0)))


def cut(text: str | TokenText, **options: object) -> list[str]:
    """Segments of a text; a plain one has one token a character."""
    token_text = letters(text) if isinstance(text, str) else text
    return [found.text for found in check_segments(token_text, Segmentation(**{"min_tokens": 1, **options}))]


def test_multi_byte_characters_belong_to_the_token_that_completes_them() -> None:
    """A face of four bytes that the vocabulary does not know as one: a, four single bytes, b."""
    byte_ids = [BYTE_LEVEL.token_to_id(char) for char in "aðŁ§©b"]  # the stand-ins of F0 9F A7 A9, U+1F9E9
    found = check_map(TOKENIZER, byte_ids)
    assert found.text == "a\U0001f9e9b"
    assert found.offsets == (0, 1, 1, 1, 1, 2, 3)
    assert [found.is_boundary(token) for token in range(7)] == [True, True, False, False, False, True, True]
    assert found.token_range(1, 2) == (1, 5)
    assert [found.boundary_at_most(token) for token in range(7)] == [0, 1, 1, 1, 1, 5, 6]


def test_text_before_the_first_byte_of_a_character_waits_for_the_rest() -> None:
    """Byte merges join a space with the first byte of a face: a, " " + F0, 9F, A7, A9, b. No border cuts the face."""
    vocabulary = {"a": 0, "Ġð": 1, "Ł": 2, "§": 3, "©": 4, "b": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    found = check_map(CoreReader(tokenizer), [0, 1, 2, 3, 4, 5])
    assert found.text == "a \U0001f9e9b" and found.offsets == (0, 1, 1, 1, 1, 3, 4)
    assert cut(found, boundary=r"\s|$", max_tokens=2) == ["a", " \U0001f9e9", "b"]


def test_a_position_inside_a_token_moves_to_the_next_token() -> None:
    found = TokenText("abcdef", (0, 2, 4, 6))
    assert [found.token_at(char) for char in range(7)] == [0, 1, 1, 2, 2, 3, 3]
    assert found.token_range(1, 4) == (1, 2)


@pytest.mark.parametrize("ids", [[], [10_000_000], [10_000_000, 70, 10_000_000]])
def test_ids_without_text(ids: list[int]) -> None:
    """Padded vocabularies let engines sample ids that no tokenizer knows."""
    found = check_map(TOKENIZER, ids)
    check_segments(found, Segmentation())


def test_an_incomplete_character_at_the_end_is_kept() -> None:
    ids = [BYTE_LEVEL.token_to_id(char) for char in "aðŁ"]
    found = check_map(TOKENIZER, ids)
    assert found.text == "a\ufffd" and found.offsets == (0, 1, 1, 2)


texts = st.text(
    st.one_of(st.sampled_from("ab 1\n.$\\é数🙂ﷺ\u0301\u200d"), st.characters(blacklist_categories=["Cs"])), max_size=60
)
mixed = st.lists(
    st.one_of(texts, st.sampled_from([*SPECIALS, "two words ß", "\n\n", "$x. y$", "\\(", "\\)", "</thi"])), max_size=8
).map("".join)
options = st.builds(
    lambda boundary, limits: Segmentation(boundary=boundary, min_tokens=min(limits), max_tokens=max(limits)),
    st.sampled_from([Segmentation().boundary, r"(?<== )|(?=\n)", r"(?=.)", r"\b", "k|/|x"]),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
)


@settings(max_examples=300, deadline=None)
@given(mixed, options)
def test_any_text_is_mapped_and_partitioned(text: str, settings: Segmentation) -> None:
    ids = encode(text)
    found = check_map(TOKENIZER, ids)
    assert found.text == text
    check_segments(found, settings)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=40), options)
def test_any_ids_are_mapped_and_partitioned(ids: list[int], settings: Segmentation) -> None:
    """Random ids are mostly invalid UTF-8, as an untrained policy samples it."""
    check_segments(check_map(TOKENIZER, ids), settings)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 264), max_size=30))
def test_vocabularies_that_are_not_byte_level(ids: list[int]) -> None:
    tokenizer = CoreReader(sentencepiece_like())
    try:
        check_map(tokenizer, ids)
    except AnnotationError:  # Fuse reads broken bytes all at once, one replacement for each; whole characters work
        assert "\ufffd" in tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_byte_fallback_completes_characters() -> None:
    tokenizer = CoreReader(sentencepiece_like())
    ids = [2, *(9 + byte for byte in "🙂".encode()), 4]
    found = check_map(tokenizer, ids)
    assert found.text == "the🙂b" and found.offsets == (0, 3, 3, 3, 3, 4, 5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, EMBEDDED.get_vocab_size() - 1), max_size=40), options)
def test_the_embedded_models_tokenizer(ids: list[int], settings: Segmentation) -> None:
    check_segments(check_map(CoreReader(EMBEDDED), ids), settings)


def test_long_responses_take_linear_time() -> None:
    """32,768 tokens take less than a second; a decoding per prefix would take hours."""
    ids = (encode(CORPUS[1] + CORPUS[2]) * 1000)[:32_768]
    start = perf_counter()
    found = segment(read_tokens(TOKENIZER, ids), Segmentation())
    assert len(found) > 100
    assert perf_counter() - start < 5


@pytest.mark.parametrize(
    "text", ["$", "$$x", "</think>", "</think>$x$", "\n", "\n ", " ", "\\begin{a}", "\\(x\\)", "a. "]
)
def test_long_repetitions_take_linear_time(text: str) -> None:
    """32,768 characters of what a policy that has collapsed writes: a fraction of a second, minutes if quadratic."""
    token_text = letters(text * (32_768 // len(text)))
    start = perf_counter()
    assert segment(token_text, Segmentation())
    assert perf_counter() - start < 5


def test_a_decoding_that_is_no_concatenation_is_refused() -> None:
    class Reversing(Letters):
        def decode(self, token_ids: list[int], **options: bool) -> str:  # type: ignore[override]
            return "".join(map(chr, reversed(token_ids)))

    with pytest.raises(AnnotationError, match="not the concatenation"):
        read_tokens(Reversing(), [ord(char) for char in "abc"])


def test_running_sums_are_cut_before_results_and_line_ends() -> None:
    text = "Step 1: 47 + 38 = 85\nStep 2: 85 - 15 = 70\n\\boxed{70}"
    assert cut(text, boundary=r"(?<== )|(?=\n)") == [
        "Step 1: 47 + 38 = ",
        "85",
        "\nStep 2: 85 - 15 = ",
        "70",
        "\n\\boxed{70}",
    ]


def test_sentences_and_paragraphs() -> None:
    assert cut("One. Two?\nThree\n\n\nFour") == ["One. ", "Two?\n", "Three\n\n\n", "Four"]


def test_nothing_is_cut_inside_math() -> None:
    text = "Let $a. b$ be. So \\[x\n= 1. \\] and \\begin{align}\n1. 2\\\\[2pt]\n\\end{align}. End"
    assert cut(text) == [
        "Let $a. b$ be. ",
        "So \\[x\n= 1. \\] and \\begin{align}\n1. 2\\\\[2pt]\n\\end{align}. ",
        "End",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a $x$ b", ["$x$"]),
        ("a $$x$y$$ b", ["$$x$y$$"]),
        ("costs \\$5 and \\$6", []),
        ("costs $5\nand $6", []),  # an inline pair ends with its line
        ("\\(x", []),
        ("\\(x\n\n\\) y \\(z\\)", ["\\(z\\)"]),  # a paragraph ends what is open
        ("\\[a\\(b\\]c\\)", ["\\[a\\(b\\]"]),
        ("\\begin{a}\\begin{b}\\end{b}\\end{a}", ["\\begin{a}\\begin{b}\\end{b}\\end{a}"]),
        ("$x</think>y$", []),
        ("\\begin{</think>}x\\end{</think>}", []),  # a tag is never a part of math
    ],
)
def test_math_regions(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in math_regions(text)] == expected


def test_short_pieces_join_the_next_one_and_the_last_joins_the_one_before() -> None:
    assert cut("a\nbcde\nfg", min_tokens=4, boundary="\n") == ["a\nbcde\nfg"]
    assert cut("a\nbcde\nfghij\nk", min_tokens=4, boundary="\n") == ["a\nbcde\n", "fghij\nk"]


def test_long_pieces_become_equal_parts() -> None:
    assert cut("abcdefghij", max_tokens=4) == ["abc", "def", "ghij"]  # cut at 10/3 and 20/3, rounded down


def test_thinking_is_never_joined_with_the_answer() -> None:
    assert cut("ab\n</think>cd", min_tokens=50) == ["ab\n</think>", "cd"]
    assert cut("abcdefghij\n</think>\nx\n", min_tokens=10, boundary="\n") == ["abcdefghij\n</think>", "\nx\n"]
    assert cut("ab</think></think>c") == ["ab</think>", "</think>", "c"]


def test_a_sentence_ends_before_a_token_that_begins_with_its_space() -> None:
    found = pieces("One", ".", " Two", ".", " $", "x", ". ", "y", "$", " Three", ".\n", "Four")
    assert cut(found) == ["One.", " Two.", " $x. y$ Three.\n", "Four"]


def test_a_token_over_the_edge_of_math_belongs_to_the_segment_of_the_math() -> None:
    """Borders behind "(?=b)" lie in the token "$b", which closes the math; the next one is behind it."""
    assert cut(pieces("a", "$", "x", "$b", "c"), boundary="(?=b)") == ["a$x$b", "c"]
    assert cut(pieces("a$", "x", "$", "b"), boundary="(?=[$])", max_tokens=1) == ["a$x$", "b"]


def test_math_is_not_split_even_where_it_is_too_long() -> None:
    assert cut("ab$1234567$cd", max_tokens=4) == ["ab", "$1234567$", "cd"]
    assert cut("\\begin{a}1\n2\\end{a}", max_tokens=3) == ["\\begin{a}1\n2\\end{a}"]
    assert cut("ab$1234567", max_tokens=4) == ["ab$", "123", "4567"]  # not closed: 10 = 3 + 3 + 4


def test_a_long_piece_is_split_at_the_border_nearest_to_equal_parts() -> None:
    """14 tokens, two parts of 7: the math reaches from 1 to 8, and 8 is nearer than 1."""
    assert cut("a$12345$bcdefg", max_tokens=9) == ["a$12345$", "bcdefg"]
    assert cut("abc$12345$d", max_tokens=8) == ["abc", "$12345$d"]  # 5 is wanted; 10 would make 10 tokens, so 3


def test_the_end_of_thinking_is_never_split() -> None:
    assert cut("x</think>yz", max_tokens=3) == ["x", "</think>", "yz"]
    assert cut("a</think>b", boundary="/|think") == ["a</think>", "b"]
    assert cut("a</thi", boundary="/") == ["a</", "thi"]  # only a whole tag is one


def test_a_token_over_the_end_of_thinking_belongs_to_the_thinking() -> None:
    assert cut(pieces("a", " </", "think", ">\n\n", "b"), max_tokens=1) == ["a", " </think>\n\n", "b"]
    assert cut(pieces("a", "</think", ">$", "x", "$", "b")) == ["a</think>$x$", "b"]  # math goes before the tag's cut
