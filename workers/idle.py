"""How much of a run's time each role had nothing to do, as the driver sees it.

Decides nothing; counts what is open. Must not know what roles do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Clock = Callable[[], float]


@dataclass(frozen=True)
class Reading:
    """A while, and how much of it was idle, in seconds."""

    idle_s: float
    elapsed_s: float

    @property
    def busy_s(self) -> float:
        return max(0.0, self.elapsed_s - self.idle_s)  # a difference of sums

    @property
    def idle_frac(self) -> float:
        """In [0, 1]; 1 where no time has passed."""
        return self.idle_s / self.elapsed_s if self.elapsed_s > 0 else 1.0


class IdleMeter:
    """The time in which nothing was open; may be used by several threads."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_open = 0
        self._idle_s = 0.0
        self._since = self._read_at = clock()

    def begin(self, count: int = 1) -> None:
        """Something more is open."""
        self._count(count)

    def end(self, count: int = 1) -> None:
        """Something is done."""
        self._count(-count)

    @property
    def num_open(self) -> int:
        """What is open now."""
        with self._lock:
            return self._num_open

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Something is open for the time of the block."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def until(self, future: Future[Any]) -> None:
        """Something is open until the future is done."""
        self.begin()
        future.add_done_callback(lambda _: self.end())

    def read(self) -> Reading:
        """What the time since the last reading was."""
        with self._lock:
            self._settle()
            found = Reading(self._idle_s, self._since - self._read_at)
            self._idle_s, self._read_at = 0.0, self._since
        return found

    def _count(self, change: int) -> None:
        with self._lock:
            self._settle()
            self._num_open += change

    def _settle(self) -> None:
        now = self._clock()
        if not self._num_open:
            self._idle_s += now - self._since
        self._since = now


class IdleShares:
    """Implements `trace_rl.protocols.Utilisation` over the meters of each role."""

    def __init__(self, meters: Mapping[str, Sequence[IdleMeter]]) -> None:
        self._meters = meters

    def metrics(self) -> dict[str, float]:
        """`idle/{role}_frac` and `busy/{role}_s` since the last call: means over the actors of the role."""
        found = {}
        for role, meters in self._meters.items():
            if readings := [meter.read() for meter in meters]:
                found[f"idle/{role}_frac"] = sum(reading.idle_frac for reading in readings) / len(readings)
                found[f"busy/{role}_s"] = sum(reading.busy_s for reading in readings) / len(readings)
        return found
