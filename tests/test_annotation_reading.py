"""Whatever a model answers is read as a reply, or refused in one sentence."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_rl.annotation import AnnotationReply, SegmentSpan
from trace_rl.annotation_reading import read_reply, visible_spans
from trace_rl.errors import AnnotationError

ONE = '{"spans": [{"start": 2, "end": 3, "type": "gap", "importance": 4}]}'
DRAFT = '{"spans": [{"start": 9, "end": 9, "type": "slip"}]}'


def read(text: str) -> list[tuple[int, int, str, float]]:
    return [(span.start, span.end, span.type, span.importance) for span in read_reply(text)[0].spans]


def test_a_reply_is_read_from_json() -> None:
    reply, num_dropped = read_reply(
        '{"spans": [{"start": 12, "end": 14, "type": "gap", "importance": 3, "note": "see"}], "reflection": "A slip."}'
    )
    assert reply.spans == (SegmentSpan(start=12, end=14, type="gap", importance=3.0),)
    assert reply.reflection == "A slip." and num_dropped == 0
    assert read_reply('{"spans": []}') == (AnnotationReply(spans=()), 0)


@pytest.mark.parametrize(
    "text",
    [
        f"\ufeff \n{ONE}\n",
        f"```json\n{ONE}\n```",
        f"Here you are: {ONE} I hope that it helps.",
        f"<think>First {DRAFT}</think>{ONE}",
        f"The template has opened the thought {DRAFT} </think> {ONE}",
        f"<think>a</think>{ONE}<think>{DRAFT}",
        f"A first idea was {DRAFT}, but it is {ONE}",
        f"{ONE} {{'spans': []}}",
        f'{ONE} {{"spans": "none"}} {{"answer": []}}',
        f'{{"result": {ONE}}}',
        f'The set {{1, 2 has a 5" pipe,\nso {ONE}',
        f"\\left\\{{ x \\in [0, 1) \\right. and {ONE}",
        f'Let S = {{x in [0, 1)}} be 5" wide: {ONE}',
        f'He wrote "x and {ONE}',
        f'{{"spans": [{{"start": 1, "end\n{ONE}',
        ONE.replace("2", "2.0").replace("3", '"3"'),
        ONE.replace("]", ', {"start": 1}, 7, null]'),
        ONE.replace("]}", '], "reflection": {"spans": 3}}'),
        ONE.replace("]}", '], "reflection": "a\tb\x00 } \\" ] { </think>"}'),
    ],
)
def test_the_last_complete_object_with_spans_is_the_answer(text: str) -> None:
    assert read(text) == [(2, 3, "gap", 4.0)]


BAD_ENTRIES = [
    {"start": 1, "end": 1},
    {"start": 1, "end": 1, "type": 3},
    {"start": 1.5, "end": 2, "type": "gap"},
    {"start": 1, "end": 2.5, "type": "gap"},
    {"start": True, "end": True, "type": "gap"},
    {"start": "one", "end": 1, "type": "gap"},
    {"start": "\u0663", "end": 3, "type": "gap"},  # an Arabic digit
    {"start": float("nan"), "end": 1, "type": "gap"},
    {"start": 1, "end": float("inf"), "type": "gap"},
    {"start": 1, "end": 10**300, "type": "gap"},
    {"start": [1], "end": 1, "type": "gap"},
    {"end": 1, "type": "gap"},
    [1, 1, "gap"],
    "gap",
    None,
]


@pytest.mark.parametrize("bad", BAD_ENTRIES, ids=str)
def test_a_bad_entry_is_dropped_and_counted_and_the_others_stay(bad: object) -> None:
    good = {"start": 1, "end": 2, "type": "gap"}
    reply, num_dropped = read_reply(json.dumps({"spans": [bad, good, bad]}))
    assert [(span.start, span.end) for span in reply.spans] == [(1, 2)] and num_dropped == 2
    with pytest.raises(AnnotationError, match="no span has a whole number"):
        read_reply(json.dumps({"spans": [bad, bad]}))


def test_positions_that_do_not_exist_are_left_to_those_who_know() -> None:
    assert read('{"spans": [{"start": -4, "end": 0, "type": "?"}, {"start": 9, "end": 2, "type": ""}]}') == [
        (-4, 0, "?", 1.0),
        (9, 2, "", 1.0),
    ]


@pytest.mark.parametrize(
    ("importance", "weight"),
    [
        ("0", 0.0),
        ("2.5", 2.5),
        ('"4"', 4.0),
        ("-1", 1.0),
        ("NaN", 1.0),
        ("1e999", 1.0),
        ("null", 1.0),
        ("true", 1.0),
        ('"high"', 1.0),
        ("9" * 400, 1.0),
        ("[3]", 1.0),
    ],
)
def test_an_importance_that_is_none_counts_one(importance: str, weight: float) -> None:
    assert read(ONE.replace('"importance": 4', f'"importance": {importance}')) == [(2, 3, "gap", weight)]
    assert read(ONE.replace(', "importance": 4', "")) == [(2, 3, "gap", 1.0)]


def test_half_a_character_is_left_out() -> None:
    reply, _ = read_reply(ONE.replace("gap", "g\\ud800ap").replace("]}", '], "reflection": "A\\udc00 slip."}'))
    assert reply.spans[0].type == "gap" and reply.reflection == "A slip."


@pytest.mark.parametrize("reflection", ["3", "null", '["a"]', "{}"])
def test_a_reflection_that_is_no_text_is_empty(reflection: str) -> None:
    assert read_reply(f'{{"spans": [], "reflection": {reflection}}}')[0].reflection == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "segments 1 to 3",
        "[]",
        "{}",
        "null",
        '"spans"',
        '{"spans": {}}',
        '{"spans": [}',
        ONE[:-1],
        f"<think>{ONE}",
        f"{ONE}</think> I cannot help.",
        '[{"start": 1, "end": 1, "type": "gap"}]',
        '{"spans": [' + "1" * 5000 + "]}",
    ],
)
def test_an_answer_without_spans_is_refused(text: str) -> None:
    with pytest.raises(AnnotationError, match=r"The annotator answered .*; expected JSON like") as caught:
        read_reply(text)
    assert caught.value.cause == "unparsable" and len(str(caught.value)) < 500


def check_reads_or_refuses(text: str) -> None:
    try:
        reply, num_dropped = read_reply(text)
    except AnnotationError as error:
        assert error.cause == "unparsable"
    else:
        assert num_dropped >= 0
        json.dumps(reply.model_dump(mode="json"), ensure_ascii=False, allow_nan=False).encode()


parts = st.sampled_from(
    [
        ONE,
        DRAFT,
        '{"spans": [',
        '{"spans": []}',
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ",",
        ":",
        "\n",
        "<think>",
        "</think>",
        "```",
        "NaN",
        "-1e999",
        "9" * 5000,
        "\ud800",
        "\\ud800",
        "\x00",
        '"start": ',
        '"type": "a"',
        "null",
        "5",
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(parts, st.text(max_size=5)), max_size=30).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    check_reads_or_refuses(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=3,
)
entries = st.dictionaries(st.sampled_from(["start", "end", "type", "importance"]), values, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(entries | values, max_size=4), values)
def test_any_json_is_read_or_refused(entries: list[object], reflection: object) -> None:
    check_reads_or_refuses(json.dumps({"spans": entries, "reflection": reflection}))


MEGABYTE = 10**6
PATTERNS = [
    '{"spans":[' * (MEGABYTE // 12) + "x" + "]}" * (MEGABYTE // 12),
    '{"a":' * (MEGABYTE // 6) + "{}" + "}" * (MEGABYTE // 6),
    "[",
    "{",
    '{"',
    '"\\',
    '{"\\"',
    '\\"',
    '{"spans":[',
    '{"spans":0}',
    '{"spans":[]x}',
    "</think>",
    "<think>",
    "{ ",
    "}",
    '{"spans":[' * 16 + "x" + "]}" * 16,
    '{"spans":[' + "0," * 500,
    "```json\n{",
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_a_megabyte_of_anything_takes_no_more_than_seconds(pattern: str) -> None:
    """Each takes less than 0.5 s here; reading anew from every brace or quotation mark would take minutes."""
    started = time.monotonic()
    check_reads_or_refuses(pattern * (MEGABYTE // len(pattern)))
    check_reads_or_refuses('{"' + pattern * (MEGABYTE // len(pattern)))
    assert time.monotonic() - started < 10


def test_spans_over_segments_that_were_not_shown_are_dropped_and_counted() -> None:
    ranges = [(1, 3), (3, 4), (4, 4), (5, 6), (6, 7), (7, 9), (2, 8), (9, 2)]
    spans = tuple(SegmentSpan(start=start, end=end, type="gap") for start, end in ranges)
    said = AnnotationReply(spans=spans, reflection="A slip.")
    reply, num_hidden = visible_spans(said, range(4, 7))
    assert [(span.start, span.end) for span in reply.spans] == [(1, 3), (7, 9), (9, 2)]
    assert num_hidden == 5 and reply.reflection == "A slip."
    assert visible_spans(said, range(5, 5)) == (said, 0)  # all are shown
