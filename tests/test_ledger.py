"""The account of prompts: lines prove themselves, and resumptions, losses and repetitions add up."""

import zlib
from pathlib import Path
from typing import Any

import pytest
from rollouts import annotated

from trace_rl.batch import Prompt
from trace_rl.launch.ledger import LEDGER_FILE, RunLedger, read_ledger
from trace_rl.ledger import Passage, Record, accounted, audit, decode, drawn_key, encode, read_records
from trace_rl.protocols import Drawn


def drawn(index: int) -> Drawn:
    return Drawn({"epoch": 0, "index": 8}, 4, index)


def prompts(*names: str) -> dict[str, str]:
    return {f"key {name}": name for name in names}


def records(*events: tuple[object, ...]) -> list[Record]:
    """(event, step, names...) each."""
    return [Record(n, event, step, prompts(*names)) for n, (event, step, *names) in enumerate(events)]


def test_a_prompt_is_known_by_how_it_was_drawn() -> None:
    assert drawn_key(drawn(3)) == "epoch=0,index=8/4/3"
    assert accounted([(Prompt("p", "q", "a"), drawn(3))]) == {"epoch=0,index=8/4/3": "p"}


def test_a_line_is_read_as_it_was_written() -> None:
    record = Record(7, "trained", 3, {"k\n\t": "ä\u2028"}, {"why": "x"})
    line = encode(record)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert decode(line[:-1]) == record


def test_every_changed_bit_of_a_line_is_found() -> None:
    line = encode(Record(0, "issued", 1, prompts("a")))[:-1]
    for at in range(8 * len(line)):
        changed = bytearray(line)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match="checksum"):
            decode(bytes(changed))


def test_a_line_that_was_cut_off_never_happened_and_others_are_named() -> None:
    lines = [encode(record) for record in records(("started", 0), ("issued", 0, "a"), ("trained", 0, "a"))]
    whole = b"".join(lines)
    cut = read_records(whole[:-5])
    assert [record.event for record in cut.records] == ["started", "issued"]
    assert cut.damage == [] and cut.complete_bytes == len(lines[0] + lines[1])
    lost = read_records(lines[0] + lines[2])
    assert lost.damage == ["line 2 has number 2, expected 1: lines are missing or repeated"]
    changed = read_records(lines[0] + b"x" + lines[1] + lines[2])
    assert changed.damage == ["line 2 cannot be read: its checksum is not that of its text"]
    assert [record.event for record in changed.records] == ["started", "trained"]


@pytest.mark.parametrize(
    "content", ["3", "[]", '{"n":0}', '{"n":true,"event":"issued","step":0}', '{"n":0,"event":"x","step":0}']
)
def test_what_is_no_record_is_refused_though_its_checksum_is_right(content: str) -> None:
    with pytest.raises(ValueError, match="no record"):
        decode(f"{content}\t{zlib.crc32(content.encode()):08x}".encode())


def test_a_run_without_a_break_adds_up() -> None:
    account = audit(
        records(("started", 0), ("issued", 0, "a", "b"), ("trained", 0, "a"), ("dropped", 1, "b"), ("ended", 1))
    )
    assert (account.steps, account.trained, account.dropped, account.resumptions) == (1, 1, 1, 0)
    assert account.is_exact and not account.open


def test_what_came_after_the_checkpoint_counts_no_more_once_a_run_went_back_to_it() -> None:
    events = records(
        ("started", 0),
        ("issued", 0, "a", "b"),
        ("trained", 0, "a"),
        ("checkpoint", 1),
        ("trained", 1, "b"),
        ("issued", 2, "c"),
        ("resumed", 1),
        ("trained", 1, "b"),
        ("ended", 2),
    )
    account = audit(events)
    assert account.is_exact and (account.trained, account.steps, account.resumptions) == (2, 2, 1)


def test_a_prompt_that_a_resumed_run_has_forgotten_is_lost() -> None:
    events = records(
        ("issued", 0, "a", "b"), ("trained", 0, "a"), ("checkpoint", 1), ("resumed", 1), ("issued", 1, "c"),
        ("trained", 1, "c"), ("ended", 2),
    )  # fmt: skip
    assert dict(audit(events).lost) == prompts("b")
    assert not audit(events[:-1]).lost and dict(audit(events[:-1]).open) == prompts("b")


def test_a_prompt_that_is_trained_twice_is_named() -> None:
    events = records(("issued", 0, "a"), ("trained", 0, "a"), ("checkpoint", 1), ("resumed", 1), ("trained", 1, "a"))
    assert dict(audit(events).trained_twice) == prompts("a")


def test_a_run_that_starts_over_without_a_checkpoint_counts_from_the_start() -> None:
    events = records(("started", 0), ("issued", 0, "a"), ("trained", 0, "a"), ("resumed", 0), ("issued", 0, "a"))
    account = audit(events)
    assert account.trained == 0 and dict(account.open) == prompts("a") and not account.trained_twice


class Noting:
    def __init__(self) -> None:
        self.noted: list[tuple[object, ...]] = []

    def note(self, *what: object) -> None:
        self.noted.append(what)

    def mark(self, *what: object) -> None:
        self.noted.append(what)

    def settle(self) -> None: ...


def test_a_stage_is_noted_with_the_last_completion_of_a_prompt() -> None:
    ledger = Noting()
    passage = Passage(ledger, 5, {"p": drawn(0), "r": drawn(1)}, size=2)
    items = [annotated(name, sample, 3, 1.0).graded.rollout for name, sample in (("p", 0), ("r", 0), ("p", 1))]
    assert list(passage.note("finished", items, lambda item: item)) == items
    assert ledger.noted == [("finished", 5, {drawn_key(drawn(0)): "p"})]


def test_a_killed_process_leaves_a_file_that_the_next_one_goes_on_with(tmp_path: Path) -> None:
    first = RunLedger(tmp_path)
    first.mark("started", 0, attempt=0)
    first.note("issued", 0, prompts("a"))
    first.note("issued", 0, {})  # nothing to say
    with (tmp_path / LEDGER_FILE).open("ab") as file:
        file.write(b'{"n":2,"event":"tra')
    second = RunLedger(tmp_path)
    second.note("trained", 0, prompts("a"))
    second.close()
    second.note("dropped", 0, prompts("b"))  # of a thread that outlives its run
    found = read_ledger(tmp_path)
    assert [record.event for record in found.records] == ["started", "issued", "trained"]
    assert not found.damage and dict(found.records[0].notes) == {"attempt": 0}


def test_damage_is_told_when_a_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / LEDGER_FILE).write_bytes(b"nonsense\n" + encode(Record(1, "issued", 0, prompts("a"))))
    RunLedger(tmp_path).close()
    assert "line 1 cannot be read" in caplog.text and len(read_ledger(tmp_path).records) == 1


@pytest.mark.parametrize("event", [{}, [], None, 1, "unknown"])
def test_a_line_with_a_right_checksum_and_no_known_event_is_damage(event: Any) -> None:
    found = read_records(encode(Record(0, event, 0)))
    assert found.records == [] and "line 1 cannot be read: it is no record" in found.damage[0]
