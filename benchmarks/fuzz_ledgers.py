"""Ledgers near to real ones, and their reading: lines cut off, changed, repeated, missing, or never a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from fuzz_records import JSON_VALUES
from hypothesis import strategies as st

from trace_rl.errors import DataError
from trace_rl.launch.ledger import LEDGER_FILE, RunLedger
from trace_rl.ledger import Record, audit, encode, read_records
from trace_rl.protocols import Fate, Mark

_events = st.sampled_from((*get_args(Fate), *get_args(Mark)))
_prompts = st.dictionaries(st.sampled_from(("epoch=0/4/0", "epoch=0/4/1", "epoch=1/4/0")), st.text(max_size=2))
_steps = st.integers(0, 4)
_whole = st.tuples(_events, _steps, _prompts)
_odd = st.tuples(*[JSON_VALUES] * 5)


def _encode_whole(entries: list[tuple[Any, ...]]) -> list[bytes]:
    return [encode(Record(number, *entry)) for number, entry in enumerate(entries)]


def _encode_odd(entry: tuple[Any, ...]) -> bytes:
    """A line whose checksum is right, and whose fields are of any kind."""
    number, event, step, prompts, notes = entry
    return encode(Record(number, event, step, _Shown(prompts), _Shown(notes)))


class _Shown(dict[str, Any]):
    """Passes as a mapping, and is written as one whatever it was made of."""

    def __init__(self, value: Any) -> None:
        super().__init__(value if isinstance(value, dict) else {"value": value})


def _damage(lines: list[bytes], edits: list[tuple[str, int, bytes]]) -> bytes:
    lines = list(lines)
    for kind, at, piece in edits:
        if not lines:
            break
        place = at % len(lines)
        line = lines[place]
        if kind == "drop":
            del lines[place]
        elif kind == "repeat":
            lines.insert(place, line)
        elif kind == "cut":
            lines[place] = line[: at % (len(line) + 1)]
        elif kind == "flip" and line:
            bit = at % (8 * len(line))
            lines[place] = line[: bit // 8] + bytes([line[bit // 8] ^ 1 << bit % 8]) + line[bit // 8 + 1 :]
        else:
            lines.insert(place, piece)
    return b"".join(lines)


_edits = st.tuples(
    st.sampled_from(("drop", "repeat", "cut", "flip", "insert")), st.integers(0, 9999), st.binary(max_size=12)
)
_lines = st.one_of(
    st.lists(_whole, max_size=8).map(_encode_whole),
    st.tuples(st.lists(_whole, max_size=4).map(_encode_whole), _odd.map(_encode_odd)).map(lambda p: [*p[0], p[1]]),
)
LEDGERS = st.one_of(
    st.lists(_whole, max_size=8).map(_encode_whole).map(b"".join),
    st.builds(_damage, _lines, st.lists(_edits, max_size=3)),
    st.binary(max_size=40),
)


def read_ledger(given: bytes, folder: Path) -> object:
    """Read, add up and go on, as a run that is started again does; damage counts as refused.

    Raises:
        DataError: some line is damaged; what the reader says of it.
    """
    found = read_records(given)
    account = audit(found.records)
    assert account.trained >= 0 and given[: found.complete_bytes].endswith((b"\n", b""))
    file = folder / LEDGER_FILE
    file.write_bytes(given)
    ledger = RunLedger(folder)
    ledger.note("issued", 0, {"epoch=9/1/0": "new"})
    after = read_records(file.read_bytes())
    assert after.complete_bytes == file.stat().st_size
    assert after.records[-1].prompts == {"epoch=9/1/0": "new"}, "what is noted after damage is not found again"
    ledger.close()
    if found.damage:
        raise DataError(found.damage[0])
    return account
