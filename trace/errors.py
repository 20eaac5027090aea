"""Errors that a user can act on.

Each message is one clear sentence: what was found, what was expected, where, and what to do.
The classes are picklable (Ray ships them between processes): they carry little more than their message.
"""

from __future__ import annotations

import reprlib
from typing import Literal

FailureCause = Literal[
    "failed",
    "timeout",
    "unparsable",
    "refused",
    "rate_limited",
    "server_error",
    "unreachable",
    "circuit_open",
    "over_budget",
    "too_long",
    "not_recorded",
]
"""Why a response was not annotated. `failed`: a rule raised; `timeout`: no answer before the deadline; `unparsable`: an
answer outside of the protocol, also after a repair; `refused`: the server does not accept the request; `rate_limited`,
`server_error`, `unreachable`: the last of several tries ended so; `circuit_open`: not sent, because the tries before
failed; `over_budget`: not sent, because the run's budget is spent; `too_long`: the response does not fit the model's
context, even without its middle; `not_recorded`: the replayed file lacks it."""


class TraceError(Exception):
    """Base of every error that trace-rl raises on purpose."""


class ConfigError(TraceError, ValueError):
    """Settings are unknown, malformed or contradict each other.

    Args:
        problems: a line each; what a user gave may stand in them as it is, whatever its length and characters.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*(_one_line(problem) for problem in problems))

    def __str__(self) -> str:
        return "\n".join(self.args)


class DataError(TraceError):
    """A prompt source is missing, malformed or does not fit the budget."""


class ModelError(TraceError):
    """A model or tokenizer cannot be used (missing chat template, unsupported head, ...)."""


class RewardError(TraceError):
    """The grader itself failed, as opposed to a response that was graded 0."""


class AnnotationError(TraceError):
    """A response has no annotation; `cause` says why, in the words that metrics count by."""

    def __init__(self, message: str, cause: FailureCause = "failed") -> None:
        super().__init__(message)
        self.cause: FailureCause = cause

    def __reduce__(self) -> tuple[type[AnnotationError], tuple[str, FailureCause]]:
        return type(self), (str(self), self.cause)


class WeightSyncError(TraceError):
    """An engine could not be proven to run the learner's weights."""


class SyncDeadlineError(WeightSyncError):
    """A weight sync missed its deadline; who is late may still live."""


class MovedOnError(WeightSyncError):
    """The learner was asked for a version of its weights that it holds no more."""


class TrainingError(TraceError):
    """A training step cannot be trusted (non-finite loss or gradient)."""


class CheckpointError(TraceError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class WorkerError(TraceError):
    """A role died or missed its deadline; the message names the role and the first cause."""


class DeadlineError(WorkerError):
    """A role missed its deadline; it may still live."""


class PreemptedError(TraceError):
    """The run was told to end, and has kept what it had done."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_MAX_LINE_CHARS = 500
"""Of a foreign message: some repeat the whole input."""
_MAX_OWN_LINE_CHARS = 800
"""Of a message of ours: a key or a path may be of any length."""
_GAP = " ... "


def short_repr(value: object) -> str:
    """A value for a message: as `repr`, but shortened, since a list can hold itself, or a thousand others."""
    return _SHORT.repr(value)


def first_line(error: BaseException) -> str:
    """What a foreign error says, without the stacks and advice that some libraries put into their messages."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= _MAX_LINE_CHARS else f"{line[:_MAX_LINE_CHARS]}..."


def _one_line(problem: str) -> str:
    """Without its middle where it is long; line breaks and other characters that cannot be seen are escaped."""
    kept = (_MAX_OWN_LINE_CHARS - len(_GAP)) // 2
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in problem)
    return shown if len(shown) <= _MAX_OWN_LINE_CHARS else f"{shown[:kept]}{_GAP}{shown[-kept:]}"
