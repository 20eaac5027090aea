"""The one thread that owns a vLLM engine, and the tickets of those who share it.

vLLM's engine inside a process may be touched by one thread only. Decides when the engine steps, which caller gets an
output, and that whatever else concerns the engine runs between two steps. It must not know what is asked of the engine,
or what its outputs mean.

Invariants: an engine without requests does not step, and its thread sleeps; work is done in the order in which it came,
so what is aborted before a call is gone when the call runs; nobody waits for a thread that has ended.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from trace_rl.errors import WorkerError

Result = TypeVar("Result")

_LIVENESS_S = 0.5  # between two looks whether the thread still lives
_EMPTY_STEP_S = 2e-4  # a shorter step has run no model: all requests wait, for example for their grammars
_PAUSE_S = 1e-3  # after such a step


class Engine(Protocol):
    """The part of `vllm.v1.engine.llm_engine.LLMEngine` that the thread uses."""

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        arrival_time: float | None = None,
        lora_request: Any = None,
        *,
        priority: int = 0,
    ) -> Any: ...

    def step(self) -> Sequence[Any]: ...

    def has_unfinished_requests(self) -> bool: ...

    def abort_request(self, request_ids: list[str]) -> None: ...


@dataclass(frozen=True)
class EngineRequest:
    """What vLLM is given."""

    token_ids: tuple[int, ...]
    params: Any
    """`vllm.SamplingParams`."""
    salt: str = "any"
    """Cached prefixes are shared by requests of the same salt only."""
    tag: Hashable = None
    """By which it can be cancelled."""
    adapter: Any = None
    """`vllm.lora.request.LoRARequest`."""


@dataclass(frozen=True)
class _Open:
    """A request that vLLM has and that has not finished."""

    ticket: Ticket
    index: int
    """Among those of the ticket."""
    tag: Hashable


class EngineThread:
    """Builds an engine in a thread of its own, steps it there and hands out what has finished.

    Args:
        name: whose engine it is, for errors.
        build: makes the engine; runs in the thread. The constructor waits for it and raises what it raises.
    """

    def __init__(self, name: str, build: Callable[[], Engine]) -> None:
        self._name = name
        self._jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._end: BaseException | None = None
        self._open: dict[str, _Open] = {}
        self._arrivals = itertools.count()
        self._engine: Engine
        built: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(build, built), name=name, daemon=True)
        self._thread.start()
        if (error := self.wait(built, None)) is not None:
            raise error

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises, run in the thread between two steps; work may call this again.

        Raises:
            WorkerError: the engine has failed in a step, now or before.
        """
        if threading.current_thread() is self._thread:
            return work()
        outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def job() -> None:
            try:
                outcome.put((work(), None))
            except BaseException as error:  # the caller's, whatever it is
                outcome.put((None, error))

        self._jobs.put(job)
        result, error = self.wait(outcome, None)
        if error is not None:
            raise error
        returned: Result = result
        return returned

    def submit(self, make: Callable[[], Sequence[EngineRequest]], priority: int) -> Ticket:
        """Have requests added together; does not wait.

        Args:
            make: runs in the thread right before the requests are added. What it raises, or vLLM on adding them, is
                raised by `Ticket.outputs`.
            priority: lower ones are scheduled first, equal ones in the order in which they came.
        """
        ticket = Ticket(self, priority)
        self._jobs.put(lambda: self._add(ticket, make))
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """Have what is left of a ticket dropped; does not wait."""
        self._jobs.put(lambda: self._drop(ticket))

    def cancel(self, tags: Collection[Hashable]) -> None:
        """Drop open requests with these tags; their tickets get None as their outputs."""
        self.run(lambda: self._cancel(frozenset(tags)))

    def abort_all(self, priority: int, reason: BaseException) -> None:
        """Drop all requests of this priority; their tickets raise `reason`."""
        self.run(lambda: self._drop_all(priority, reason))

    def wait(self, queue: SimpleQueue[Result], deadline: float | None) -> Result:
        """What the thread puts into the queue.

        Raises:
            TimeoutError: nothing came until `deadline` (of `time.monotonic`).
            WorkerError: the thread has ended.
        """
        while True:
            left_s = _LIVENESS_S if deadline is None else max(0.0, deadline - time.monotonic())
            is_alive = self._thread.is_alive()  # before the queue is read: what it has put is read then
            try:
                return queue.get(timeout=min(left_s, _LIVENESS_S) if is_alive else 0)
            except Empty:
                if not is_alive:
                    raise self._ended() from self._end
                if left_s <= _LIVENESS_S and deadline is not None:
                    raise TimeoutError(f"{self._name} gave no answer in time") from None

    def _ended(self) -> WorkerError:
        return WorkerError(f"{self._name} has failed in a step of vLLM ({self._end!r}); see its log")

    def _serve(self, build: Callable[[], Engine], built: SimpleQueue[BaseException | None]) -> None:
        """The thread's life: jobs, a step, jobs, a step, ...; waits for jobs where no request is open."""
        try:
            self._engine = build()
        except BaseException as error:
            built.put(error)
            return
        built.put(None)
        patience_s: float | None = None
        try:
            while True:
                self._work_off(patience_s)
                patience_s = self._step() if self._open else None
        except BaseException as error:
            self._end = error
            for ticket in {item.ticket for item in self._open.values()}:
                ticket.put(self._ended())

    def _work_off(self, patience_s: float | None) -> None:
        """Do all jobs at hand, after waiting at most `patience_s` for the first; None waits until there is one."""
        try:
            job = self._jobs.get(timeout=patience_s) if patience_s != 0 else self._jobs.get_nowait()
            while True:
                job()
                job = self._jobs.get_nowait()
        except Empty:
            return

    def _step(self) -> float:
        """One step of the engine; how long to wait for jobs after it, in seconds."""
        started = time.monotonic()
        arrived: dict[Ticket, list[tuple[int, Any]]] = {}
        for output in self._engine.step():
            if output.finished and output.request_id in self._open:
                item = self._open.pop(output.request_id)
                arrived.setdefault(item.ticket, []).append((item.index, output))
        for ticket, outputs in arrived.items():
            ticket.put(outputs)
        if self._open and not self._engine.has_unfinished_requests():
            raise WorkerError(f"vLLM has lost {len(self._open)} requests")
        return _PAUSE_S if not arrived and time.monotonic() - started < _EMPTY_STEP_S else 0.0

    def _add(self, ticket: Ticket, make: Callable[[], Sequence[EngineRequest]]) -> None:
        added: dict[str, _Open] = {}
        try:
            requests = make()
            for index, request in enumerate(requests):
                arrival = next(self._arrivals)  # the clock could tie, and vLLM breaks ties at random
                self._engine.add_request(
                    str(arrival),
                    {"prompt_token_ids": list(request.token_ids), "cache_salt": request.salt},
                    request.params,
                    float(arrival),
                    request.adapter,
                    priority=ticket.priority,
                )
                added[str(arrival)] = _Open(ticket, index, request.tag)
        except BaseException as error:
            self._engine.abort_request(list(added))
            ticket.put(error)
            return
        self._open.update(added)
        ticket.put(len(requests))

    def _drop(self, ticket: Ticket) -> None:
        self._forget([request_id for request_id, item in self._open.items() if item.ticket is ticket])

    def _cancel(self, tags: frozenset[Hashable]) -> None:
        for item in self._forget([request_id for request_id, item in self._open.items() if item.tag in tags]):
            item.ticket.put([(item.index, None)])

    def _forget(self, request_ids: list[str]) -> list[_Open]:
        self._engine.abort_request(request_ids)
        return [self._open.pop(request_id) for request_id in request_ids]

    def _drop_all(self, priority: int, reason: BaseException) -> None:
        for ticket in {item.ticket for item in self._open.values() if item.ticket.priority == priority}:
            self._drop(ticket)
            ticket.put(reason)


class Ticket:
    """Requests that were submitted together; made by `EngineThread.submit`."""

    def __init__(self, thread: EngineThread, priority: int) -> None:
        self.priority = priority
        self._thread = thread
        self._arrived: SimpleQueue[Any] = SimpleQueue()

    def put(self, arrived: int | list[tuple[int, Any]] | BaseException) -> None:
        """For the thread: how many requests were added, then outputs as they finish, or why none will."""
        self._arrived.put(arrived)

    def outputs(self, timeout_s: float | None = None) -> Iterator[list[tuple[int, Any]]]:
        """Finished outputs with the index of their request, those of one step together; to be iterated once.

        A request that was cancelled has None as its output.

        Raises:
            TimeoutError: not all have come `timeout_s` after the first was asked for.
            WorkerError: the engine has failed.
            BaseException: what `make`, adding the requests, or `abort_all` gave as the reason.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        missing: int = self._next(deadline)
        while missing:
            finished: list[tuple[int, Any]] = self._next(deadline)
            yield finished
            missing -= len(finished)

    def _next(self, deadline: float | None) -> Any:
        arrived = self._thread.wait(self._arrived, deadline)
        if isinstance(arrived, BaseException):
            raise arrived
        return arrived

    def abort(self) -> None:
        """Drop the requests that have not finished; nothing arrives after that."""
        self._thread.abort(self)
