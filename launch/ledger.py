"""The file of a run's prompt ledger: lines are added, never changed, and are safe on disk at the end of each step.

What lines mean is decided by `trace_rl.ledger`. A process that is killed leaves at most a line that is cut off, which
the next one removes; what else is damaged stays, and is told.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_rl.ledger import Ledger, Record, encode, read_records
from trace_rl.protocols import Fate, Mark

logger = logging.getLogger(__name__)

LEDGER_FILE = "ledger.jsonl"


def read_ledger(run_folder: Path) -> Ledger:
    """What a run has noted so far; nothing where it has not begun."""
    file = run_folder / LEDGER_FILE
    return read_records(file.read_bytes() if file.exists() else b"")


class RunLedger:
    """Implements `trace_rl.protocols.PromptLedger` over the file in a run folder; one process writes it at a time."""

    def __init__(self, run_folder: Path) -> None:
        self.file = run_folder / LEDGER_FILE
        before = read_ledger(run_folder)
        for sentence in before.damage:
            logger.warning("%s: %s; the account of prompts has a gap, the run itself has not", self.file, sentence)
        if self.file.exists():
            os.truncate(self.file, before.complete_bytes)
        self._next = before.records[-1].number + 1 if before.records else 0
        self._lock = threading.Lock()
        self._opened = self.file.open("ab", buffering=0)

    def note(self, fate: Fate, step: int, prompts: Mapping[str, str]) -> None:
        if prompts:
            self._write(fate, step, prompts, {})

    def mark(self, mark: Mark, step: int, **notes: Any) -> None:
        self._write(mark, step, {}, notes)

    def settle(self) -> None:
        os.fsync(self._opened.fileno())

    def close(self) -> None:
        """Make everything safe, and let go of the file."""
        with self._lock:
            if not self._opened.closed:
                self.settle()
                self._opened.close()

    def _write(self, event: Fate | Mark, step: int, prompts: Mapping[str, str], notes: Mapping[str, Any]) -> None:
        with self._lock:
            if self._opened.closed:  # a thread that brings rollouts outlives its run by a moment
                return
            self._opened.write(encode(Record(self._next, event, step, prompts, notes)))
            self._next += 1
