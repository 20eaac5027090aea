"""The account of a run's prompts: lines that prove themselves, and what they add up to.

A run notes what becomes of each prompt that it draws: issued, finished, graded, annotated, trained or dropped. A line
carries a number and a checksum, so that a line that was cut off, changed or lost is found. The account is evidence: a
run goes on from its checkpoint, and the account shows whether every prompt was then trained on exactly once.

Must not know files, clocks or processes.

Invariants: a prompt is known by how it was drawn (`Drawn`), since data sets are gone through more than once; what was
noted after the step that a run goes back to, and after the checkpoint of that step, counts no more.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from trace_rl.batch import Prompt, Rollout
from trace_rl.protocols import Drawn, Fate, Mark, PromptLedger

Item = TypeVar("Item")

_FATES = frozenset(get_args(Fate))
_MARKS = frozenset(get_args(Mark))


@dataclass(frozen=True)
class Record:
    """One line."""

    number: int
    """Counts up by one from line to line."""
    event: Fate | Mark
    step: int
    """Of a fate: the step that it belongs to; of a mark: the number of steps that are done."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """How each was drawn (`drawn_key`) -> its id; of marks empty."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else is worth keeping; read by people."""


def drawn_key(drawn: Drawn) -> str:
    """How a prompt was drawn, in a few characters: the values of the position, how many were taken, which it is."""
    position = ",".join(f"{name}={value}" for name, value in sorted(drawn.position.items()))
    return f"{position}/{drawn.count}/{drawn.index}"


def accounted(drawn: Iterable[tuple[Prompt, Drawn]]) -> dict[str, str]:
    """Prompts as a `PromptLedger` takes them."""
    return {drawn_key(how): prompt.prompt_id for prompt, how in drawn}


class Passage:
    """Notes for each stage of an admission when the last completion of a prompt has passed it."""

    def __init__(self, ledger: PromptLedger, step: int, drawn: Mapping[str, Drawn], size: int) -> None:
        self._ledger = ledger
        self._step = step
        self._drawn = drawn
        self._size = size

    def note(self, fate: Fate, items: Iterable[Item], rollout_of: Callable[[Item], Rollout]) -> Iterator[Item]:
        """The items, as they come."""
        counts: Counter[str] = Counter()
        for item in items:
            prompt_id = rollout_of(item).prompt.prompt_id
            counts[prompt_id] += 1
            if counts[prompt_id] == self._size:
                self._ledger.note(fate, self._step, {drawn_key(self._drawn[prompt_id]): prompt_id})
            yield item


def encode(record: Record) -> bytes:
    """The line of a record, with its line feed."""
    content: dict[str, Any] = {"n": record.number, "event": record.event, "step": record.step}
    content |= {"prompts": dict(record.prompts)} if record.prompts else {}
    content |= {"notes": dict(record.notes)} if record.notes else {}
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), default=str).encode()
    return text + f"\t{zlib.crc32(text):08x}\n".encode()


def decode(line: bytes) -> Record:
    """The record of a line without its line feed.

    Raises:
        ValueError: the checksum is not that of the text, or the text is no record.
    """
    text, _, checksum = line.rpartition(b"\t")
    if checksum != f"{zlib.crc32(text):08x}".encode():
        raise ValueError("its checksum is not that of its text")
    try:
        content = json.loads(text)
        record = Record(
            content["n"], content["event"], content["step"], content.get("prompts", {}), content.get("notes", {})
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no record ({error!r})") from error
    numbers = all(type(value) is int for value in (record.number, record.step))
    mappings = all(isinstance(value, dict) for value in (record.prompts, record.notes))
    if not numbers or not mappings or not isinstance(content["event"], str) or record.event not in _FATES | _MARKS:
        raise ValueError("it is no record (a field has another type than expected)")
    return record


@dataclass(frozen=True)
class Ledger:
    """What a file of records holds."""

    records: Sequence[Record]
    damage: Sequence[str]
    """A sentence for each line that cannot be read or is missing; none in a file that is whole."""
    complete_bytes: int
    """Up to the last line feed: what follows was cut off while it was written."""


def read_records(content: bytes) -> Ledger:
    """All records that prove themselves, in order; a last line without line feed never happened."""
    complete = content.rfind(b"\n") + 1
    records: list[Record] = []
    damage: list[str] = []
    for at, line in enumerate(content[:complete].split(b"\n")[:-1], start=1):
        try:
            record = decode(line)
        except ValueError as error:
            damage.append(f"line {at} cannot be read: {error}")
            continue
        expected = records[-1].number + 1 if records else record.number
        if record.number != expected and not (damage and record.number > expected):
            damage.append(f"line {at} has number {record.number}, expected {expected}: lines are missing or repeated")
        records.append(record)
    return Ledger(records, damage, complete)


@dataclass(frozen=True)
class Account:
    """What became of the prompts, as far as it still counts."""

    steps: int
    """Training steps that are done."""
    trained: int
    dropped: int
    open: Mapping[str, str]
    """Issued, and neither trained nor dropped; of a run that goes on they are sampled again. By `drawn_key`."""
    lost: Mapping[str, str]
    """Open ones of a run that has ended all its steps, or that a checkpoint had forgotten."""
    trained_twice: Mapping[str, str]
    resumptions: int

    @property
    def is_exact(self) -> bool:
        """Whether every prompt was trained on, or dropped on purpose, exactly once."""
        return not self.lost and not self.trained_twice


@dataclass
class _State:
    """What counts after so many steps; a resumption goes back to a copy of it."""

    issued: dict[str, str] = field(default_factory=dict)
    trained: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    twice: dict[str, str] = field(default_factory=dict)

    def copy(self) -> _State:
        return _State(dict(self.issued), dict(self.trained), dict(self.dropped), dict(self.twice))

    def apply(self, record: Record) -> None:
        if record.event == "issued":
            self.issued.update(record.prompts)
        elif record.event == "trained":
            self.twice.update({key: name for key, name in record.prompts.items() if key in self.trained})
            self.trained.update(record.prompts)
        elif record.event == "dropped":
            self.dropped.update(record.prompts)

    @property
    def open(self) -> dict[str, str]:
        return {key: name for key, name in self.issued.items() if key not in self.trained and key not in self.dropped}


def audit(records: Iterable[Record]) -> Account:
    """Add a run's records up.

    A prompt that was open at the checkpoint that a run went back to must be issued again before the run ends, and so is
    lost where it never is trained on or dropped.
    """
    state, at_checkpoint = _State(), {0: _State()}
    steps = resumptions = 0
    has_ended = False
    for record in records:
        if record.event == "checkpoint":
            at_checkpoint[record.step] = state.copy()
            steps = record.step
        elif record.event == "resumed":
            resumptions += 1
            state = at_checkpoint.get(record.step, _State()).copy()
            steps = record.step
        elif record.event == "ended":
            steps, has_ended = record.step, True
        elif record.event == "trained":
            steps = max(steps, record.step + 1)
        state.apply(record)
    return Account(
        steps=steps,
        trained=len(state.trained),
        dropped=len(state.dropped),
        open=state.open,
        lost=state.open if has_ended else {},
        trained_twice=state.twice,
        resumptions=resumptions,
    )
