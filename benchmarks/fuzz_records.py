"""Records near to real ones, and their reading: rows of data, answers of annotators, and recordings of these."""

from __future__ import annotations

import json
from pathlib import Path

from fuzz_configs import base_config
from hypothesis import strategies as st

from trace_rl.annotation import AnnotationReply, AnnotationRequest, readable_reflection, resolve
from trace_rl.annotation_reading import read_reply, visible_spans
from trace_rl.batch import Prompt
from trace_rl.launch.prompt_sources import open_source
from trace_rl.rule_annotators import read_recording
from trace_rl.segments import Segment, TokenText

# Data: rows with columns that are missing, of another type, or hold text that no file can.

_ROW = {"question": "What is 3 + 4?", "answer": "7", "solution": "3 + 4 = 7", "id": "a"}
_LINES = (
    *("", "{}", "[]", "null", "7", '"text"', "{", '{"question": "a"}'),
    *('{"question": "q", "answer": "\\ud800"}', "NaN"),
    *('{"question": "\\ud83d", "answer": 1}', '{"question": "q", "answer": ' + "1" * 5000 + "}", "[" * 100_000),
    *('{"question": "q", "answer": ' + "[" * 990 + "]" * 990 + "}", '{"prompt": "q", "answer": NaN}', "\ufeff{}"),
    *(
        '{"question": "q", "answer": "x #### 3"}',
        '{"a": 1, "a": 2}',
        '{"question": "q", "answer": 1e999}',
        "\x00",
        "{'a': 1}",
    ),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
_columns = st.sampled_from(("question", "prompt", "answer", "solution", "id", "other"))
_row = st.dictionaries(_columns, JSON_VALUES, max_size=3).map(lambda changed: json.dumps(_ROW | changed))
_good_line = st.integers(0, 99).map(lambda number: json.dumps(_ROW | {"id": number, "question": f"{number}?"}).encode())
_line = st.one_of(
    _row.map(str.encode),
    _good_line,
    st.sampled_from(_LINES).map(lambda line: line.encode("utf-8", "surrogatepass")),
    st.binary(max_size=12),
)
_lines = st.one_of(
    st.lists(_line, max_size=5), st.lists(_good_line, max_size=5), st.lists(_good_line | _line, max_size=3)
)
_rows = st.builds(bytes.join, st.sampled_from((b"\n", b"\r\n", b"\r")), _lines)
_paths = st.sampled_from(
    ("", ".", "nowhere.jsonl", "~nobody/rows.jsonl", "a\0b", "x" * 300, "\ud800.jsonl", "/proc/self/mem")
)
_heldout = st.one_of(st.none(), st.none(), st.none(), _rows, _paths)
DATA = st.tuples(_rows, _heldout, st.integers(0, 3), st.text(max_size=3))


def read_data(given: tuple[bytes, bytes | str | None, int, str], folder: Path) -> object:
    content, heldout, count, suffix = given
    file, other = folder / "rows.jsonl", folder / "heldout.jsonl"
    file.write_bytes(content)
    if isinstance(heldout, bytes):
        other.write_bytes(heldout)
    settings = {"path": str(file), "heldout_rows": count, "question_suffix": suffix}
    if heldout is not None:
        settings["heldout_path"] = heldout if isinstance(heldout, str) else str(other)
    config = base_config()
    source = open_source(config.model_copy(update={"data": config.data.model_copy(update=settings)}))
    return source.take(count), source.heldout(count)


# Annotations: what models answer, and what was recorded of it.

_NUM_SEGMENTS = 6
_TOKENS = TokenText("abcd\U0001f600fghijkl", tuple(range(13)))
_REQUEST = AnnotationRequest(
    Prompt("p", "question", "7", "3 + 4 = 7"),
    "error",
    tuple(
        Segment(number + 1, 2 * number, 2 * number + 2, _TOKENS.text[2 * number : 2 * number + 2])
        for number in range(6)
    ),
    {"slip": "a wrong result", "gap": "a missing step"},
    0.5,
    13,
)
_PIECES = (
    *(
        '{"spans": [',
        '{"spans": []}',
        '{"start": 1, "end": 2, "type": "slip"}',
        "{",
        "}",
        "[",
        "]",
        '"',
        "\\",
        ",",
        ":",
    ),
    *(
        "\n",
        "<think>",
        "</think>",
        "```json\n",
        "NaN",
        "-1e999",
        "9" * 5000,
        "\ud800",
        "\\ud800",
        "\x00",
        "null",
        "1e308",
    ),
    *(
        '"reflection": "A slip."',
        '"start": ',
        '"type": "a"',
        "[" * 5000,
        '{"spans":' * 500,
        "1.5",
        "-0",
        "\u0663",
        "true",
    ),
)
_numbers = st.one_of(
    st.integers(-2, 9), st.integers(), st.floats(), st.sampled_from((10**12, "3", "3.0", None, True, [1]))
)
_entry = st.fixed_dictionaries(
    {},
    optional={
        "start": _numbers,
        "end": _numbers,
        "type": st.one_of(st.sampled_from(("slip", "gap", "other")), st.text(max_size=3), JSON_VALUES),
        "importance": _numbers,
        "note": JSON_VALUES,
    },
)
_reply = st.fixed_dictionaries(
    {"spans": st.one_of(st.lists(st.one_of(_entry, JSON_VALUES), max_size=4), JSON_VALUES)},
    optional={"reflection": st.one_of(st.text(max_size=20), JSON_VALUES)},
)
ANSWERS = st.one_of(
    st.lists(st.one_of(st.sampled_from(_PIECES), st.text(max_size=4)), max_size=20).map("".join),
    _reply.map(json.dumps),
    st.builds("{}{}{}".format, st.text(max_size=6), _reply.map(json.dumps), st.sampled_from(_PIECES)),
)


def _resolve(reply: AnnotationReply) -> object:
    spans, audit = resolve(reply, _REQUEST, _TOKENS, 13)
    budget, end = 6, 0
    for span in spans:
        assert end <= span.start < span.end <= 12
        budget, end = budget - (span.end - span.start), span.end
    assert budget >= 0
    return spans, audit, readable_reflection(reply, _REQUEST)


def read_annotation_answer(given: str, folder: Path) -> object:
    reply, _ = read_reply(given)
    shown, _ = visible_spans(reply, range(3, 5))
    return _resolve(reply), _resolve(shown)


_recorded_line = st.one_of(
    st.builds(lambda key, reply: json.dumps({"key": key, "reply": reply}).encode(), st.text(max_size=3), _reply),
    st.dictionaries(st.sampled_from(("key", "reply", "other")), JSON_VALUES).map(lambda row: json.dumps(row).encode()),
    st.sampled_from(_PIECES).map(lambda piece: piece.encode("utf-8", "surrogatepass")),
    st.binary(max_size=8),
)
RECORDINGS = st.lists(_recorded_line, max_size=4).map(b"\n".join)


def read_recorded(given: bytes, folder: Path) -> object:
    file = folder / "recording.jsonl"
    file.write_bytes(given)
    return [_resolve(reply) for reply in read_recording(file).values()]
