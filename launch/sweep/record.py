"""What has become of each cell, in an append-only file that survives any death of the sweep.

Every event is one JSON line, on disk before anything is done that depends on it. The state of a cell is what its events
say together, so the file is never rewritten; a line that was cut off by a kill never happened. One sweep writes at a
time: a lock on the folder is held as long as its process lives.

This module must not know how cells are run or what they measure.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trace_rl.launch.append_only import drop_half_line
from trace_rl.launch.folder_lock import held

Kind = Literal["started", "finished", "broke", "stopped", "interrupted", "reopened"]
Status = Literal["waiting", "running", "finished", "failed", "stopped"]

TRIES = 2
"""A cell that broke is tried so often in all."""
FILE = "sweep.jsonl"


@dataclass(frozen=True)
class CellState:
    status: Status = "waiting"
    note: str = ""
    """Of a running cell what it can be found by; else why it is in this state."""
    failures: int = 0

    def after(self, kind: Kind, note: str) -> CellState:
        """The state that an event leads to."""
        match kind:
            case "started":
                return replace(self, status="running", note=note)
            case "finished" | "stopped":
                return replace(self, status=kind, note=note)
            case "broke":
                failures = self.failures + 1
                return CellState("failed" if failures >= TRIES else "waiting", note, failures)
            case "interrupted":
                return replace(self, status="waiting", note=note)
            case "reopened":
                return CellState()


def read_states(folder: Path) -> dict[str, CellState]:
    """State by name of every cell that something has happened to."""
    states: dict[str, CellState] = {}
    for cell, kind, note in _events(folder / FILE):
        states[cell] = states.get(cell, CellState()).after(kind, note)
    return states


class SweepRecord:
    """The states of a sweep's cells, and the only way to change them.

    Args:
        tell: called with each event, to show it.
    """

    def __init__(self, folder: Path, tell: Callable[[str, Kind, str], None]) -> None:
        self._file = folder / FILE
        self._tell = tell
        drop_half_line(self._file)
        self._states = read_states(folder)

    def state(self, cell: str) -> CellState:
        return self._states.get(cell, CellState())

    def note(self, cell: str, kind: Kind, note: str = "") -> None:
        """Write an event down; it is on disk when this returns."""
        event = {"time_s": time.time(), "cell": cell, "event": kind, "note": note}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._states[cell] = self.state(cell).after(kind, note)
        self._tell(cell, kind, note)


@contextmanager
def only_sweep_in(folder: Path) -> Iterator[None]:
    """Hold the folder for the time of the block; a killed process lets go of it.

    Raises:
        ConfigError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    instead = "wait for it, end it, or give this sweep another folder"
    with held(folder / "lock", f"the sweep in {folder} is run", instead):
        yield


def _events(file: Path) -> list[tuple[str, Kind, str]]:
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    events = [json.loads(line) for line in lines[:-1]]  # what stands behind the last line feed was never finished
    return [(event["cell"], event["event"], event["note"]) for event in events]
