"""Limits that a request for an annotation passes before it is sent: a rate, a breaker and a budget.

Decides how long a request waits for its turn, whether requests are sent at all while a server fails, and whether the
run can still pay for one. It must not know what is asked, how it is sent or why it failed; nothing here waits.

Invariants: no window of t seconds holds more than capacity + rate * t turns; a breaker that has opened lets one trial
through at a time; what is spent and what is booked together stay within the budget, however many requests are under
way. Each object belongs to one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trace_rl.annotators import Budget

Clock = Callable[[], float]
"""Seconds since a moment of its own; never goes back."""
_ROUNDING = 1 + 1e-9
"""Of sums of money: three requests at 0.1 fit a budget of 0.3."""


class TokenBucket:
    """A rate limit that allows bursts of one second's worth of requests, at least of one request.

    Args:
        per_minute: requests a minute; 0 sets no limit.
    """

    def __init__(self, per_minute: float, clock: Clock = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._capacity = max(1.0, self._rate)
        self._clock = clock
        self._level = self._capacity
        self._filled_at_s = clock()

    def reserve(self) -> float:
        """Book the next token, which may not be there yet, and return the seconds until it is."""
        if not self._rate:
            return 0.0
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled_at_s) * self._rate) - 1
        self._filled_at_s = now
        return max(0.0, -self._level / self._rate)


class CircuitBreaker:
    """Stops requests to a server that fails.

    Closed, it admits everything. `failures` in a row open it: nothing is admitted for `pause_s`, then one request that
    tries for all. Its success closes the breaker, its failure opens it for another pause; where it never reports, the
    next one is admitted a pause later. Reports of requests that were sent before it opened arrive late: a success
    closes it, because the server answers; a failure says nothing new and does not prolong the pause.
    """

    def __init__(self, failures: int, pause_s: float, clock: Clock = time.monotonic) -> None:
        self._limit = failures
        self._pause_s = pause_s
        self._clock = clock
        self._num_failures = 0
        self._is_open = False
        self._has_trial = False
        self._next_trial_s = 0.0

    @property
    def is_open(self) -> bool:
        """Whether requests are held back; so also while a trial is under way."""
        return self._is_open

    @property
    def next_trial_s(self) -> float:
        """Seconds until the next request may be admitted; 0 where it may be now."""
        return max(0.0, self._next_trial_s - self._clock()) if self._is_open else 0.0

    def admit(self) -> bool:
        """Whether a request may be sent now; one that was admitted reports how it went."""
        if not self._is_open:
            return True
        if self._clock() < self._next_trial_s:
            return False
        self._wait_for_trial(has_trial=True)
        return True

    def succeeded(self) -> None:
        """The server has answered."""
        self._num_failures = 0
        self._is_open = self._has_trial = False

    def failed(self) -> None:
        """A try has failed."""
        self._num_failures += 1
        if self._has_trial or (not self._is_open and self._num_failures >= self._limit):
            self._is_open = True
            self._wait_for_trial(has_trial=False)

    def cancelled(self) -> None:
        """A request that was admitted is not sent after all; another one may take its place."""
        if self._has_trial:
            self._has_trial = False
            self._next_trial_s = self._clock()

    def _wait_for_trial(self, has_trial: bool) -> None:
        self._has_trial = has_trial
        self._next_trial_s = self._clock() + self._pause_s


@dataclass(frozen=True)
class Spent:
    """What requests have cost; `money` in the currency of the budget's prices."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0


@dataclass(frozen=True)
class _Count:
    """Whole numbers, so that booking and releasing leaves no rounding behind."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: _Count) -> _Count:
        return _Count(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    def __neg__(self) -> _Count:
        return _Count(-self.requests, -self.prompt_tokens, -self.completion_tokens)


class Purse:
    """What a run may still spend.

    Args:
        before: spent by the run before a resume, perhaps at other prices.
    """

    def __init__(self, budget: Budget, before: Spent) -> None:
        self._budget = budget
        self._before = before
        self._settled = _Count()
        self._booked = _Count()

    @property
    def spent(self) -> Spent:
        """What was settled, by the run before the resume too; without what is booked for requests under way."""
        return self._with(self._settled)

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> Reservation | None:
        """Book one request, or None where the budget does not cover it.

        Args:
            prompt_tokens: as far as they are known before the server counts them; the budget is exceeded by as much as
                they are underestimated.
            completion_tokens: the most that the answer may have.
        """
        estimate = _Count(1, prompt_tokens, completion_tokens)
        total = self._with(self._settled + self._booked + estimate)
        limits = (
            (total.requests, self._budget.requests),
            (total.prompt_tokens + total.completion_tokens, self._budget.tokens),
            (total.money / _ROUNDING, self._budget.money),
        )
        if any(limit and amount > limit for amount, limit in limits):
            return None
        self._booked += estimate
        return Reservation(self, estimate)

    def _close(self, booked: _Count, counted: _Count) -> Spent:
        self._booked += -booked
        self._settled += counted
        cost = self._budget.cost(counted.prompt_tokens, counted.completion_tokens)
        return Spent(counted.requests, counted.prompt_tokens, counted.completion_tokens, cost)

    def _with(self, count: _Count) -> Spent:
        before = self._before
        return Spent(
            before.requests + count.requests,
            before.prompt_tokens + count.prompt_tokens,
            before.completion_tokens + count.completion_tokens,
            before.money + self._budget.cost(count.prompt_tokens, count.completion_tokens),
        )


class Reservation:
    """What is booked for one request; closed once, by `settle` or by `cancel`.

    Raises:
        ValueError: it was closed before.
    """

    def __init__(self, purse: Purse, booked: _Count) -> None:
        self._purse: Purse | None = purse
        self._booked = booked

    def settle(self, prompt_tokens: int, completion_tokens: int, requests: int = 1) -> Spent:
        """Put what the server has counted in the place of the estimate, and return it for the ledger.

        Args:
            prompt_tokens: 0 for a failed try, as `completion_tokens`.
            requests: sent in fact; a failed one counts too.
        """
        return self._close(_Count(requests, prompt_tokens, completion_tokens))

    def cancel(self) -> None:
        """The request was not sent."""
        self._close(_Count())

    def _close(self, counted: _Count) -> Spent:
        if self._purse is None:
            raise ValueError("A reservation is closed for the second time; settle or cancel it once")
        purse, self._purse = self._purse, None
        return purse._close(self._booked, counted)
