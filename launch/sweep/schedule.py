"""Runs the cells of a sweep, so many at a time, until each is finished, stopped by a rule, or failed.

What a cell's process is, and where it runs, is a `Runner`'s business. Every wait has a bound: a cell has a deadline,
and one that is asked to end and does not is killed. On KeyboardInterrupt the running cells end first; on any other
error they are left as they are, and the next sweep in this folder takes them up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from trace_rl.config.sweep import SweepConfig
from trace_rl.launch.sweep.outcome import broken_rule, read_records
from trace_rl.launch.sweep.record import Kind, SweepRecord
from trace_rl.sweeps import Cell, Sweep

END_S = 60.0
"""A cell that is asked to end may take so long; Ray alone may take half of it."""


class Ended(NamedTuple):
    """How a cell's process ended."""

    is_complete: bool
    cause: str
    """Why it is not complete."""


class Running(Protocol):
    """A cell that was started."""

    def ended(self) -> Ended | None:
        """How it ended; None while it runs."""
        ...

    def interrupt(self) -> None:
        """Ask it to end cleanly, and do not wait."""
        ...

    def kill(self) -> None:
        """End it at once, with all of its processes."""
        ...


class Runner(Protocol):
    """Where cells run."""

    @property
    def poll_s(self) -> float:
        """Between two looks at a cell."""
        ...

    def start(self, cell: Cell, note: Callable[[str], None]) -> Running:
        """Start a cell.

        Args:
            note: called, before the cell can change anything, with what `take_up` finds it by.
        """
        ...

    def take_up(self, cell: Cell, note: str) -> Running | None:
        """What a sweep that died had started; None where it runs no more."""
        ...


@dataclass
class _Watched:
    cell: Cell
    running: Running
    deadline_s: float
    """Of time.monotonic."""
    verdict: tuple[Kind, str] | None = None
    """What becomes of a cell that was asked to end."""


class SweepScheduler:
    """One sweep from where its record stands to its end."""

    def __init__(self, sweep: Sweep, record: SweepRecord, runner: Runner) -> None:
        self._sweep = sweep
        self._settings: SweepConfig = sweep.settings
        self._record = record
        self._runner = runner
        self._watched: dict[str, _Watched] = {}

    def run(self) -> None:
        """Return when no cell is left to run.

        Raises:
            KeyboardInterrupt: after the running cells have ended.
        """
        self._take_up_running()
        try:
            while self._start_what_may_run() or self._watched:
                self._look_at_all()
                time.sleep(self._runner.poll_s)
        except KeyboardInterrupt:
            self._end_all()
            raise

    def _take_up_running(self) -> None:
        for cell in self._sweep.cells:
            state = self._record.state(cell.name)
            if state.status != "running":
                continue
            running = self._runner.take_up(cell, state.note)
            if running is None:
                self._record.note(cell.name, "interrupted", "the sweep was killed")
            else:
                self._watch(cell, running)

    def _start_what_may_run(self) -> bool:
        """Start waiting cells where there is room; whether any was started."""
        room = self._settings.parallel - len(self._watched)
        waiting = [cell for cell in self._sweep.cells if self._record.state(cell.name).status == "waiting"]
        for cell in waiting[: max(0, room)]:
            self._start(cell)
        return bool(waiting)

    def _start(self, cell: Cell) -> None:
        def note(handle: str) -> None:
            self._record.note(cell.name, "started", handle)

        self._watch(cell, self._runner.start(cell, note))

    def _watch(self, cell: Cell, running: Running) -> None:
        self._watched[cell.name] = _Watched(cell, running, time.monotonic() + self._settings.cell_timeout_s)

    def _look_at_all(self) -> None:
        for name, watched in list(self._watched.items()):
            event = self._look_at(watched)
            if event:
                del self._watched[name]
                self._record.note(name, *event)

    def _look_at(self, watched: _Watched) -> tuple[Kind, str] | None:
        """The event that ends a cell; None while it runs."""
        ended = watched.running.ended()
        if ended and ended.is_complete:
            return "finished", ""
        if ended:
            return watched.verdict or ("broke", ended.cause)
        is_late = time.monotonic() > watched.deadline_s
        if watched.verdict:
            if is_late:
                watched.running.kill()
            return None
        rules = self._settings.stop
        reason = broken_rule(rules, read_records(watched.cell.folder)) if rules else ""
        if reason:
            self._ask_to_end(watched, ("stopped", reason))
        elif is_late:
            cause = f"it took longer than cell_timeout_s = {self._settings.cell_timeout_s:g}"
            self._ask_to_end(watched, ("broke", cause))
        return None

    def _ask_to_end(self, watched: _Watched, verdict: tuple[Kind, str]) -> None:
        watched.verdict = verdict
        watched.deadline_s = time.monotonic() + END_S
        watched.running.interrupt()

    def _end_all(self) -> None:
        """End what runs within the bound; a second KeyboardInterrupt kills it."""
        try:
            for watched in self._watched.values():
                self._ask_to_end(watched, watched.verdict or ("interrupted", "by the user"))
            while self._watched:
                self._look_at_all()
                time.sleep(self._runner.poll_s)
        except KeyboardInterrupt:
            _kill(self._watched.values())
            raise


def _kill(cells: Iterable[_Watched]) -> None:
    for watched in cells:
        watched.running.kill()
