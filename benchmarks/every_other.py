"""A schedule for benchmarks: a route that is on at every other step, so that steps with and without it take turns."""

from __future__ import annotations

from typing import Literal

from trace_rl.schedules import Schedule


class EveryOther(Schedule):
    """1 at even steps, 0 at odd ones."""

    type: Literal["every_other"] = "every_other"

    @property
    def peak(self) -> float:
        return 1.0

    def at(self, step: int) -> float:
        return float(step % 2 == 0)
