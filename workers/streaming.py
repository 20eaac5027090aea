"""A stage of the step as an iterator transformer: items in, batched calls to a role, results out as they come.

Items are handed on while the stage before is still producing: a thread pulls them, so that neither a slow producer
holds up finished results nor slow calls hold up the producer. Calls are batched by themselves: what arrives while the
role's `Gate` is closed travels in the next one. Streams that feed one role at a time share its gate.

Invariants: every item comes out exactly once, in any order; a call that misses its deadline gives up its items as LATE,
and so are all items that were not handed on by then, so a role that hangs costs one deadline and not one for each call;
all that is left after `drain_s` is LATE; an error of the producer is raised as it is.

This module must not know what a role does or how it is reached: `Call.submit` returns a future.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from trace_rl.errors import WorkerError
from trace_rl.workers.waiting import first_cause, worker_error

Item = TypeVar("Item")
Result = TypeVar("Result")

PRODUCER_CHECK_S = 1.0
"""How often to see whether the thread that pulls is alive while nothing else is awaited; the producer owns the bound
of its own waits."""


class Unserved(Enum):
    """Why an item comes out without a result."""

    SKIPPED = "skipped"
    LATE = "late"


class Gate:
    """Calls to a role that may be under way at a time, over all streams that feed it."""

    def __init__(self, num_places: int) -> None:
        self._num_free = num_places
        self._waiting: list[queue.SimpleQueue[Any]] = []
        self._lock = threading.Lock()

    def enter(self, events: queue.SimpleQueue[Any]) -> Callable[[], None] | None:
        """Take a place; returns what gives it back, however often that is called.

        Where there is none, `events` gets a `_Wake` as soon as there may be one.
        """
        with self._lock:
            if not self._num_free:
                self._waiting.append(events)
                return None
            self._num_free -= 1
        places = [self]  # taken out by the first that leaves
        return lambda: places.pop()._leave() if places else None

    def _leave(self) -> None:
        with self._lock:
            self._num_free += 1
            woken, self._waiting = self._waiting, []
        for events in woken:  # all of them: one that has nothing left to send would keep the place from the others
            events.put(_Wake())


class _Wake:
    """A place at the gate may be free."""


@dataclass(frozen=True)
class Call(Generic[Item, Result]):
    """How a batch of items is served."""

    submit: Callable[[Sequence[Item]], Future[Sequence[Result]]]
    """Starts serving a batch without blocking; the results are in the order of the batch."""
    is_wanted: Callable[[Item], bool]
    """Items that are not wanted come out as SKIPPED at once."""
    deadline_s: Callable[[int], float]
    """Deadline of a call, given the number of items that are being served once it has started."""
    suspect: str
    """The role, as an error names it."""
    doing: str
    """What it does, as an error names it: "grading"."""
    max_batch: int = 32
    gate: Gate = field(default_factory=lambda: Gate(4))
    drain_s: float = math.inf
    """Once there are no more items, what is not served after so long is given up."""


@dataclass(frozen=True)
class _InFlight(Generic[Item]):
    items: Sequence[Item]
    deadline: float
    leave: Callable[[], None]
    """Gives its place at the gate back."""


class _End:
    """The producer is exhausted, or failed with `error`."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def stream(items: Iterable[Item], call: Call[Item, Result]) -> Iterator[tuple[Item, Result | Unserved]]:
    """Each item with its result, or with the reason why it has none, as soon as that is known.

    Raises:
        WorkerError: the role failed as a whole; what was wrong with one item is for its result to tell.
    """
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stopped = threading.Event()
    puller = threading.Thread(target=_pull, args=(items, events, stopped), daemon=True, name=f"feed {call.suspect}")
    puller.start()
    waiting: deque[Item] = deque()
    in_flight: dict[Future[Sequence[Result]], _InFlight[Item]] = {}
    is_open, has_given_up, give_up_at = True, False, math.inf
    try:
        while is_open or waiting or in_flight:
            for event in _next_events(events, in_flight, puller if is_open else None, give_up_at):
                if isinstance(event, _End):
                    is_open = False
                    if event.error is not None:
                        raise event.error
                    give_up_at = time.monotonic() + call.drain_s
                elif isinstance(event, Future):
                    served = in_flight.pop(event, None)
                    if served is not None:
                        served.leave()
                        yield from zip(served.items, _results(event, call, len(served.items)), strict=True)
                elif isinstance(event, _Wake):
                    continue
                elif call.is_wanted(event[0]):
                    waiting.append(event[0])
                else:
                    yield event[0], Unserved.SKIPPED
            is_over = give_up_at <= time.monotonic()
            for future in list(in_flight) if is_over else _overdue(in_flight):
                has_given_up = True
                late = in_flight.pop(future)
                late.leave()
                yield from ((item, Unserved.LATE) for item in late.items)
            while waiting and (has_given_up or is_over):
                yield waiting.popleft(), Unserved.LATE
            while waiting and (leave := call.gate.enter(events)):
                _start(waiting, in_flight, call, events, leave)
    finally:
        stopped.set()
        for served in in_flight.values():
            served.leave()


def _pull(items: Iterable[Item], events: queue.SimpleQueue[Any], stopped: threading.Event) -> None:
    try:
        for item in items:
            events.put((item,))
            if stopped.is_set():
                return
        events.put(_End())
    except BaseException as error:  # raised again where the results are consumed
        events.put(_End(error))


def _start(
    waiting: deque[Item],
    in_flight: dict[Future[Sequence[Result]], _InFlight[Item]],
    call: Call[Item, Result],
    events: queue.SimpleQueue[Any],
    leave: Callable[[], None],
) -> None:
    batch = [waiting.popleft() for _ in range(min(len(waiting), call.max_batch))]
    num_served = len(batch) + sum(len(other.items) for other in in_flight.values())
    future = call.submit(batch)
    in_flight[future] = _InFlight(batch, time.monotonic() + call.deadline_s(num_served), leave)
    future.add_done_callback(events.put)


def _next_events(
    events: queue.SimpleQueue[Any],
    in_flight: dict[Future[Sequence[Result]], _InFlight[Item]],
    puller: threading.Thread | None,
    give_up_at: float,
) -> list[Any]:
    """All events that are there, after waiting for the first one until the next deadline.

    Args:
        puller: where there are more items to come, the thread that brings them.
    """
    if in_flight:
        until = min(give_up_at, *(served.deadline for served in in_flight.values()))
        patience_s = max(0.0, until - time.monotonic())
    else:
        patience_s = min(PRODUCER_CHECK_S, max(0.0, give_up_at - time.monotonic()))
    was_alive = puller is None or puller.is_alive()
    try:
        found = [events.get(timeout=patience_s)]
    except queue.Empty:
        if puller is not None and not was_alive and not in_flight:
            raise WorkerError(f"The thread {puller.name!r} ended without a word: report this as a bug.") from None
        return []
    while not events.empty():
        found.append(events.get_nowait())
    return found


def _overdue(in_flight: dict[Future[Sequence[Result]], _InFlight[Item]]) -> list[Future[Sequence[Result]]]:
    now = time.monotonic()
    return [future for future, served in in_flight.items() if served.deadline <= now]


def _results(future: Future[Sequence[Result]], call: Call[Any, Result], num_items: int) -> Sequence[Result]:
    try:
        results = future.result(timeout=0)
    except Exception as error:
        raise worker_error(error, call.suspect, call.doing) from first_cause(error)
    if len(results) != num_items:
        raise WorkerError(f"{call.suspect} answered {len(results)} results to a call with {num_items} items.")
    return results
