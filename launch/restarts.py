"""Starts a run again from its last checkpoint after the loss of what nothing replaces while it goes on.

Decides which failures are worth another start, and how many in a row. What a start consists of is decided by
`trace_rl.launch.train`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trace_rl.errors import TraceError, WeightSyncError, WorkerError

LOSSES = (WorkerError, WeightSyncError)
"""A role that died or hung, or weights that did not arrive. Other errors would come again: a loss that is not finite,
data that are missing, a checkpoint that is damaged."""
LOST = "The run has lost what nothing replaces while it goes on: "
"""With it begins the line that tells of another start."""


@dataclass
class Patience:
    """Counts failures in a row; a checkpoint between two of them starts the count anew."""

    limit: int
    in_a_row: int = 0
    _last_step: int = -1

    def lasts(self, step: int) -> bool:
        """Whether to go on after another failure, the newest checkpoint being that of `step`."""
        self.in_a_row = self.in_a_row + 1 if step == self._last_step else 1
        self._last_step = step
        return self.in_a_row <= self.limit


class Attempt:
    """One start of a run."""

    def __init__(self, number: int) -> None:
        self.number = number
        """0 is the first."""
        self.has_begun = False
        """Whether all roles were ready: a run that cannot even start is not started again."""


def persist(
    attempt: Callable[[Attempt], None],
    max_restarts: int,
    newest_checkpoint: Callable[[], int],
    tell: Callable[[str], None],
) -> None:
    """Run attempts until one ends without a loss.

    Args:
        newest_checkpoint: the step from which the next attempt would go on.

    Raises:
        WorkerError, WeightSyncError: of the last attempt, saying how many there were.
    """
    patience, current = Patience(max_restarts), Attempt(0)
    while True:
        try:
            return attempt(current)
        except LOSSES as error:
            step = newest_checkpoint()
            if not (current.has_begun or current.number) or not patience.lasts(step):
                raise _last(error, current.number, patience) from error
            tell(
                f"{LOST}{error}. It starts again after step {step} "
                f"(restart {patience.in_a_row} of at most {max_restarts} without a checkpoint between)"
            )
        current = Attempt(current.number + 1)


def _last(error: TraceError, restarts: int, patience: Patience) -> TraceError:
    if not restarts:
        return error
    told = f"{error} (the run was started again {restarts} times, the last {patience.in_a_row - 1} of them without "
    return type(error)(told + "reaching another checkpoint; run.max_restarts)")
