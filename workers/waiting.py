"""Bounded waits on Ray: every error names who was waited for, for what, the first cause, and where its log is.

Ray wraps an actor's exception in a stack of its own, and tells of a dead process in a paragraph of guesses; what a user
needs is the exception that started it, or how the process ended and what its log said last.
"""

from __future__ import annotations

import re
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from trace_rl.errors import DeadlineError, TraceError, WorkerError
from trace_rl.workers.last_words import ANSI, RAISED
from trace_rl.workers.worker_logs import process_in, whereabouts, whereabouts_of_actor

DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
"""What Ray raises where a process is gone; the others are raised inside of one that goes on."""

_GIST_LINES = 5
_MEMORY = re.compile(r"was (\S+) used / (\S+) limit")
_EXIT_CODE = re.compile(r"exit code (-?\d+)")
_OURS = re.compile(r"^trace_rl\.errors\.\w+: ")  # the sentences of these stand for themselves
_CLASS = re.compile(r"^\tclass_name: (\w+)", re.MULTILINE)


_verdicts: dict[str, str] = {}


def condemn(actor: Any, fate: str) -> None:
    """Note why an actor is about to be killed, in the words that errors on its death will use."""
    _verdicts[actor._actor_id.hex()] = fate


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
    said = ANSI.sub("", str(error))
    if not isinstance(cause, DEATHS):
        gist = f"{type(cause).__name__}: {_gist(cause)}"
        return WorkerError(f"{suspect} failed while {doing}: {gist}{_place(said, cause)}")
    fate = f"{_fate(cause)}{_place(said, cause)}"
    if isinstance(error, RayTaskError):  # the suspect lives: it, or what it was given, depended on another actor
        named = _CLASS.search(said)
        other = f"the actor {named[1]}" if named else "another actor"
        return WorkerError(f"{suspect} failed while {doing}, because {other} died: {fate}")
    return WorkerError(f"{suspect} died while {doing}: {fate}")


def late_error(reference: Any, suspect: str, doing: str, timeout_s: float) -> DeadlineError:
    """The error on a missed deadline.

    Args:
        reference: what was waited for.
        doing: may end with the setting of the deadline, in brackets.
    """
    place = whereabouts(reference)
    return DeadlineError(
        f"{suspect} did not finish {doing} within {timeout_s:g} s"
        + (f" ({place})" if place else "; its log tells more")
    )


def wait_for(reference: Any, timeout_s: float, suspect: str, doing: str) -> Any:
    """`ray.get(reference)` with a bound.

    Raises:
        WorkerError: naming `suspect` and what it was `doing`, on a missed deadline, a dead actor or an exception.
        TraceError: one that the actor raised itself, as it was.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        raise late_error(reference, suspect, doing, timeout_s) from None
    except Exception as error:
        raise worker_error(error, suspect, doing) from first_cause(error)


def _place(said: str, cause: BaseException) -> str:
    """Node and log of the process in which it began, in brackets."""
    process = process_in(said)
    actor_id = getattr(cause, "actor_id", None)
    place = process.place if process else whereabouts_of_actor(actor_id) if actor_id else ""
    return f" ({place})" if place else ""


def _fate(death: BaseException) -> str:
    """How a process ended, in a person's words instead of Ray's."""
    if verdict := _verdicts.get(getattr(death, "actor_id", None) or ""):
        return verdict
    said = ANSI.sub("", str(death))
    process = process_in(said)
    if getattr(death, "actor_init_failed", False):
        return _gist(death)
    if isinstance(death, OutOfMemoryError):
        used = _MEMORY.search(said)
        amounts = f" ({used[1]} of {used[2]} were in use)" if used else ""
        return f"Ray killed it because its node ran out of memory{amounts}; give the role more room, or ask less of it"
    if isinstance(death, ActorUnavailableError):
        return "it cannot be reached any more: its process or its node is gone, or the network between"
    if isinstance(death, NodeDiedError) or re.search(r"node (has )?died|node was terminated", said):
        return "its node went down, or lost its connection to the head node"
    if "placement group was removed" in said:
        return "its placement group was removed"
    if "killed by `ray.kill`" in said:
        return "it was ended by ray.kill"
    if "SIGTERM" in said:
        return "its process was told to end (SIGTERM)"
    words = process.last_words() if process else ""
    told = f'; its log says "{words}"' if words else ""
    if "Worker unexpectedly exits" in said:
        guess = "" if told else ", as by the kernel's out-of-memory killer, whose word is in its node's dmesg"
        return f"its process crashed or was killed{guess}{told}"
    if code := _EXIT_CODE.search(said):
        return f"its process ended with exit code {code[1]}{told}"
    return _gist(death)


def _gist(error: BaseException) -> str:
    """What a user needs of a message that may hold a remote stack: from its last `SomeError: ...` line on."""
    lines = [line.strip() for line in ANSI.sub("", str(error)).splitlines() if line.strip()]
    raised = [index for index, line in enumerate(lines) if RAISED.match(line)]
    gist = " ".join(lines[raised[-1] if raised else 0 :][:_GIST_LINES]) or "no message"
    return _OURS.sub("", gist)
