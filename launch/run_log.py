"""run.log: how the driver writes it, and what can be read back of it.

Decides its format, by which starts, warnings and last words are found again. Must not know why a run ends.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

BEGINNING = "code "
"""With it begins the line that a driver writes first."""
EARLY_END = "the run ended early: "

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} (?P<level>[A-Z]+) (?P<logger>[\w.]+): (?P<text>.*)")
_RAISED = re.compile(r"(?!Traceback\b)(?P<name>[A-Za-z_][\w.]*)(?:: (?P<text>.*))?")
_DRIVER = "trace_rl.launch.train"


@contextmanager
def logging_to(file: Path, console: Console) -> Iterator[None]:
    """Send every log line of the driver to a file, and warnings to the terminal too."""
    to_file = logging.FileHandler(file, encoding="utf-8")
    to_file.setFormatter(logging.Formatter(_FORMAT))
    to_terminal = RichHandler(logging.WARNING, console, show_time=False, show_path=False)
    root = logging.getLogger()
    logging.getLogger("trace_rl").setLevel(logging.INFO)
    for handler in (to_file, to_terminal):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (to_file, to_terminal):
            root.removeHandler(handler)
        to_file.close()


@dataclass(frozen=True)
class Entry:
    """One record of the log."""

    time: str
    """By the clock of the driver's host."""
    level: str
    logger: str
    text: str
    """All its lines, a stack included."""

    @property
    def is_beginning(self) -> bool:
        return self.logger == _DRIVER and self.text.startswith(BEGINNING)

    @property
    def is_early_end(self) -> bool:
        return self.logger == _DRIVER and self.text.startswith(EARLY_END.rstrip())


@dataclass(frozen=True)
class EarlyEnd:
    """Why a run says that it ended."""

    time: str
    error: str
    """Name of its class, without the module; empty where it was cut off."""
    sentence: str


def read_entries(text: str) -> list[Entry]:
    """The records of a log, or of its end; what is before the first whole one is left out."""
    found: list[tuple[dict[str, str], list[str]]] = []
    for line in text.split("\n"):
        if head := _LINE.fullmatch(line):
            found.append((head.groupdict(), [head["text"]]))
        elif found and line:
            found[-1][1].append(line)
    return [Entry(**{**head, "text": "\n".join(lines)}) for head, lines in found]


def since_beginning(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Those of the last driver."""
    starts = [number for number, entry in enumerate(entries) if entry.is_beginning]
    return entries[starts[-1] if starts else 0 :]


def early_end(entry: Entry) -> EarlyEnd:
    """What an entry that is an early end tells: its stack ends with the class and the sentence."""
    first, *stack = entry.text[len(EARLY_END.rstrip()) :].strip(" ").split("\n")
    for number in reversed(range(len(stack))):
        found = _RAISED.fullmatch(stack[number])
        if found and (found["text"] or "").strip() == first.strip():
            return EarlyEnd(entry.time, found["name"].rpartition(".")[2], "\n".join([first, *stack[number + 1 :]]))
    return EarlyEnd(entry.time, "", first)
