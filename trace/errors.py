"""Errors that a user can act on.

Each message is one clear sentence: what was found, what was expected, where, and what to do.
The classes are picklable (Ray ships them between processes) because they carry only their message.
"""


class TraceError(Exception):
    """Base of every error that trace-rl raises on purpose."""


class ConfigError(TraceError, ValueError):
    """A setting is unknown, malformed or contradicts another one."""


class DataError(TraceError):
    """A prompt source is missing, malformed or does not fit the budget."""


class ModelError(TraceError):
    """A model or tokenizer cannot be used (missing chat template, unsupported head, ...)."""


class RewardError(TraceError):
    """The grader itself failed, as opposed to a response that was graded 0."""


class AnnotationError(TraceError):
    """The annotator broke its protocol."""


class WeightSyncError(TraceError):
    """An engine could not be proven to run the learner's weights."""


class TrainingError(TraceError):
    """A training step cannot be trusted (non-finite loss or gradient)."""


class CheckpointError(TraceError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class WorkerError(TraceError):
    """A role died or missed its deadline; the message names the role and the first cause."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, without the stacks and advice that some libraries put into their messages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
