"""Bounded waits on Ray: every error names who was waited for, for what, and the first cause.

Ray wraps an actor's exception in a stack of its own; what a user needs is the exception that started it.
"""

from __future__ import annotations

import re
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from trace_rl.errors import TraceError, WorkerError

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b: ")
_GIST_LINES = 5


def first_cause(error: BaseException) -> BaseException:
    """The exception that was raised inside the actor, below Ray's wrapping."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def worker_error(error: BaseException, suspect: str, doing: str) -> TraceError:
    """Translate what Ray raised; our own errors pass through unchanged."""
    cause = first_cause(error)
    if isinstance(cause, TraceError):
        return cause
    if isinstance(cause, RayActorError):
        return WorkerError(f"{suspect} died while {doing}: {_gist(cause)}")
    return WorkerError(f"{suspect} failed while {doing}: {type(cause).__name__}: {_gist(cause)}")


def wait_for(refs: Any, timeout_s: float, suspect: str, doing: str) -> Any:
    """`ray.get(refs)` with a bound.

    Raises:
        WorkerError: naming `suspect` and what it was `doing`, on a missed deadline, a dead actor or an exception.
        TraceError: one that the actor raised itself, as it was.
    """
    try:
        return ray.get(refs, timeout=timeout_s)
    except GetTimeoutError:
        raise WorkerError(f"{suspect} did not finish {doing} within {timeout_s:g} s; its log tells more") from None
    except Exception as error:
        raise worker_error(error, suspect, doing) from first_cause(error)


def _gist(error: BaseException) -> str:
    """What a user needs of a message that may hold a remote stack: from its last `SomeError: ...` line on."""
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines() if line.strip()]
    raised = [index for index, line in enumerate(lines) if _RAISED.match(line)]
    return " ".join(lines[raised[-1] if raised else 0 :][:_GIST_LINES]) or "no message"
