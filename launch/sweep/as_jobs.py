"""Cells as jobs of a Ray cluster: they go on without the sweep, and a sweep that comes back takes them up again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from trace_rl.errors import ConfigError, WorkerError
from trace_rl.launch.job import jobs
from trace_rl.launch.job.submit import Request, job_name, ship
from trace_rl.launch.sweep.schedule import Ended, Running
from trace_rl.sweeps import Cell

_NOTE = "job"
_PATIENCE_S = 600.0
"""A dashboard may be out of reach for so long before the sweep gives up; the jobs go on."""


@dataclass(frozen=True)
class JobRunner:
    """Implements `Runner`."""

    address: str
    poll_s: float = 5.0

    def start(self, cell: Cell, note: Callable[[str], None]) -> Running:
        job = job_name(cell.name)
        note(f"{_NOTE} {job}")
        ship(cell.config, Request(self.address, job=job))
        return JobCell(self.address, job)

    def take_up(self, cell: Cell, note: str) -> Running | None:
        kind, _, job = note.partition(" ")
        if kind != _NOTE:
            raise ConfigError(
                f"the cell {cell.name} was started on a machine ({note}), not on a cluster; go on without an address, "
                "or give this sweep another folder"
            )
        client = jobs.connect(self.address)
        is_known = any(known.submission_id == job for known in jobs.all_jobs(client))
        return JobCell(self.address, job) if is_known else None


@dataclass
class JobCell:
    """Implements `Running`."""

    address: str
    job: str
    last_answer_s: float = field(default_factory=time.monotonic)

    def ended(self) -> Ended | None:
        try:
            known = jobs.details(jobs.connect(self.address), self.job)
        except WorkerError:
            if time.monotonic() - self.last_answer_s > _PATIENCE_S:
                raise
            return None
        self.last_answer_s = time.monotonic()
        if not known.status.is_terminal():
            return None
        is_complete = known.status == "SUCCEEDED"
        return Ended(is_complete, "" if is_complete else f"job {self.job} {jobs.why(known)}")

    def interrupt(self) -> None:
        with contextlib.suppress(WorkerError):  # out of reach: `kill` asks again, and `ended` tells where it lasts
            jobs.stop(jobs.connect(self.address), self.job)

    def kill(self) -> None:
        self.interrupt()  # Ray kills what does not end by itself
