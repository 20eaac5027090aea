"""Actors that Ray starts again in their seats after they died: how long they are waited for.

Ray restarts what was made with `max_restarts`; until then calls fail with `ActorUnavailableError`, or wait in a queue.
Every actor of a role has a `life`: an id that is new with each start, by which a restart that nobody was looking at is
told from an actor that never was away. Must not know what a role does, or what has to be done again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray import ObjectRef
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from trace_rl.errors import WorkerError
from trace_rl.workers.waiting import first_cause, late_error, wait_for, worker_error
from trace_rl.workers.worker_logs import WorkerProcess, starts_of

_ARRIVAL_S = 60.0
"""For what is there and only has to be copied."""
_PAUSE_S = 0.5
"""Between two looks at an actor that Ray is starting."""


class RestartedError(WorkerError):
    """An actor was started again unseen, and lacks what it had been told."""


class Reviving(Protocol):
    """An actor with a life, as its handle shows it."""

    @property
    def life(self) -> Any:
        """`life.remote()` resolves to its id."""
        ...


def life_of(actor: Reviving, suspect: str, timeout_s: float) -> str:
    """The present life of an actor; waits while Ray starts it again.

    Raises:
        WorkerError: Ray has given it up, because it died too often or fails as it starts; or it did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        call: ObjectRef[str] = actor.life.remote()
        try:
            return str(ray.get(call, timeout=max(0.0, deadline - time.monotonic())))
        except GetTimeoutError:
            raise late_error(call, suspect, "starting again", timeout_s) from None
        except ActorUnavailableError as error:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{suspect} died and was not started again within {timeout_s:g} s (placement.start_timeout_s); "
                    "its seat may be on a node that is gone"
                ) from error
            time.sleep(_PAUSE_S)
        except Exception as error:
            raise worker_error(error, suspect, "starting again") from first_cause(error)


def wait_until_ready(actor: Any, role: str, timeout_s: float, doing: str = "starting") -> None:
    """Wait for `actor.ready()`. A role that dies as it starts is not waited for, although Ray would start it again.

    Raises:
        WorkerError: it died, failed or was not ready in time; names the role and the first cause.
    """
    call, deadline = actor.ready.remote(), time.monotonic() + timeout_s
    process: WorkerProcess | None = None
    while True:
        left_s = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait([call], timeout=min(_PAUSE_S, left_s))
        if done:
            wait_for(call, _ARRIVAL_S, role, doing)
            return
        if not left_s:
            raise late_error(call, role, doing, timeout_s)
        restarts, present = starts_of(actor._actor_id.hex())
        if restarts:
            raise WorkerError(f"{role} died while {doing}: its process ended{_last_trace(process)}")
        process = present or process


def _last_trace(process: WorkerProcess | None) -> str:
    if process is None:
        return ""
    words = process.last_words()
    said = f'; its log says "{words}"' if words else ""
    return f"{said} ({process.place})"


class Lives:
    """Engines that come back with all they need: their weights are those that they load.

    Implements `trace_rl.workers.generator.Recovery`.
    """

    def __init__(self, engines: Sequence[Any], timeout_s: float) -> None:
        self._engines = list(engines)
        self._timeout_s = timeout_s

    def life(self, index: int) -> str:
        return life_of(self._engines[index], f"generator engine {index}", self._timeout_s)

    def recover(self, index: int, life: str) -> bool:
        return self.life(index) != life
