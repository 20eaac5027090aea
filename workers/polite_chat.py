"""Asks a language model politely, and pays once: cache, single flight, limits, repeated tries, budget.

For each request: join an identical one that is under way, else look into the cache, else send it within the limits
(concurrency, budget, rate, circuit breaker) and try again where that can help.

Invariants: what was answered is stored before it is used, and not asked again; a request that no rollout waits for any
more is finished and stored if it was sent, and not sent otherwise; what a request may cost is booked, also on disk,
before it is sent, and replaced by what it did cost.

This module must not know what is asked, or what an answer is worth.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from trace_rl.annotators import LanguageModel
from trace_rl.errors import AnnotationError
from trace_rl.workers.annotation_cache import AnswerCache, CacheError, key_of
from trace_rl.workers.annotation_limits import CircuitBreaker, Purse, Reservation, Spent, TokenBucket
from trace_rl.workers.chat import ChatAnswer, ChatFault, ChatModel, ChatRequest

Result = TypeVar("Result")

_LONGEST_WAIT_S = 1.0
"""Between two looks whether the breaker admits a request or the budget covers it."""
_COUNTED = ("requests", "retries", "cache_hits", "shared", "prompt_tokens", "completion_tokens", "cache_errors")


class _Flight:
    """A request under way, and who waits for it until when."""

    task: asyncio.Task[ChatAnswer]

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self.num_waiting = 0
        self.patience_ends = 0.0
        self._slots = slots
        self._has_slot = False

    async def take_slot(self) -> None:
        """Wait for a place among the requests that may be open at once."""
        await self._slots.acquire()
        self._has_slot = True

    def leave_slot(self) -> None:
        """Give the place to others, if there is one."""
        if self._has_slot:
            self._has_slot = False
            self._slots.release()


class PoliteChat:
    """A `ChatModel` behind cache and limits.

    Args:
        cache: answers of this and former runs.
        run: name of the run in the cache's ledger of spending.
        patience_s: how long a rollout waits for its annotation.
        prompt_version: a part of the cache's key.
        count: tokens of a text, near enough for a booking.
    """

    def __init__(
        self,
        settings: LanguageModel,
        chat: ChatModel,
        cache: AnswerCache,
        run: str,
        patience_s: float,
        prompt_version: str,
        count: Callable[[str], int],
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._limits = settings.limits
        self._budget = settings.budget
        self._chat = chat
        self._cache = cache
        self._run = run
        self._patience_s = patience_s
        self._prompt_version = prompt_version
        self._count = count
        self._sleep = sleep
        self._slots = asyncio.Semaphore(self._limits.concurrency)
        self._turn = asyncio.Lock()
        self._bucket = TokenBucket(self._limits.requests_per_minute)
        self._breaker = CircuitBreaker(self._limits.breaker_failures, self._limits.breaker_pause_s)
        self._purse = Purse(self._budget, cache.spent(run))
        self._is_refused = False
        self._num_booked = 0
        self._disk = ThreadPoolExecutor(1, "annotation-cache")  # another process may keep SQLite waiting for seconds
        self._jitter = random.Random(0)
        self._under_way: dict[str, _Flight] = {}
        self._counts: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._said: set[str] = set()
        self._notices: list[str] = []

    async def ask(self, request: ChatRequest) -> ChatAnswer:
        """The answer to a request: under way already, stored, or new.

        Raises:
            AnnotationError: there is none; its `cause` says why.
        """
        key = key_of(self._chat.identity, self._prompt_version, request)
        patience_ends = time.monotonic() + self._patience_s
        flight = self._under_way.get(key)
        if flight is None:
            flight = _Flight(self._slots)
            flight.task = asyncio.create_task(self._answer(key, request, flight))
            self._under_way[key] = flight
            flight.task.add_done_callback(lambda done: self._finish(key, done))
        else:
            self._counts["shared"] += 1
        flight.patience_ends = patience_ends
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)  # who stops waiting does not take the answer from others
        finally:
            flight.num_waiting -= 1
            if not flight.num_waiting:
                flight.leave_slot()  # what was sent is stored when it is answered, and takes no place from what comes

    def usage(self) -> dict[str, float]:
        """What was sent, saved and spent since the last call; the run's total spending; seconds of a request."""
        counts, self._counts = self._counts, Counter()
        seconds, self._seconds = self._seconds, []
        spent = self._purse.spent
        usage = {f"annotation/{name}": float(counts[name]) for name in _COUNTED}
        usage |= {f"annotation/{name}": float(counts[name]) for name in sorted(counts) if name.startswith("faults/")}
        usage |= {
            "annotation/run_requests": float(spent.requests),
            "annotation/run_tokens": float(spent.prompt_tokens + spent.completion_tokens),
            "annotation/run_cost": spent.money,
        }
        if seconds:
            usage["annotation/request_mean_s"] = math.fsum(seconds) / len(seconds)
        return usage

    def notices(self) -> list[str]:
        """What a user should hear, each once; since the last call."""
        notices, self._notices = self._notices, []
        return notices

    def say_once(self, topic: str, text: str) -> None:
        """Have a user hear something, if nothing on this topic was said before."""
        if topic not in self._said:
            self._said.add(topic)
            self._notices.append(text)

    def _finish(self, key: str, task: asyncio.Task[ChatAnswer]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # seen here, where no rollout waits for it any more

    async def _answer(self, key: str, request: ChatRequest, flight: _Flight) -> ChatAnswer:
        """The stored answer; else try until there is one, another try cannot help, or nobody waits any more."""
        stored = await self._on_disk(partial(self._cache.find, key), None)
        if stored is not None:
            self._counts["cache_hits"] += 1
            return stored
        limits = self._limits
        attempt = 1
        while True:
            try:
                return await self._try(key, request, flight)
            except ChatFault as fault:
                self._counts[f"faults/{fault.cause}"] += 1
                backoff_s = min(limits.backoff_max_s, limits.backoff_s * 2 ** (attempt - 1))
                wait_s = max(fault.retry_after_s, backoff_s * self._jitter.uniform(0.5, 1.0))
                is_last = fault.is_final or attempt >= limits.max_attempts
                if is_last or time.monotonic() + wait_s >= flight.patience_ends:
                    tries = f" (try {attempt} of {limits.max_attempts})" if attempt > 1 else ""
                    raise AnnotationError(f"{fault}{tries}", fault.cause) from fault
            attempt += 1
            self._counts["retries"] += 1
            await self._sleep(wait_s)

    async def _try(self, key: str, request: ChatRequest, flight: _Flight) -> ChatAnswer:
        """One request within all limits."""
        await flight.take_slot()
        try:
            estimate = (sum(self._count(message.content) for message in request.messages), request.max_tokens)
            booking = await self._book(estimate, flight)
            try:
                await self._wait_for_turn(flight)
            except BaseException:
                booking.cancel()
                self._num_booked -= 1
                raise
            booked = Spent(1, *estimate, self._budget.cost(*estimate))
            await self._on_disk(partial(self._cache.charge, self._run, booked), None)
            try:
                return await self._send(key, request, booking, booked)
            finally:
                self._num_booked -= 1
        finally:
            flight.leave_slot()

    async def _send(self, key: str, request: ChatRequest, booking: Reservation, booked: Spent) -> ChatAnswer:
        """Ask, tell the breaker how it went, and put what it cost in the place of what was booked."""
        self._counts["requests"] += 1
        started = time.monotonic()
        try:
            answer = await self._chat.ask(request, self._limits.request_timeout_s)
        except ChatFault as fault:
            self._report(fault)
            cost = (booked.prompt_tokens, booked.completion_tokens) if fault.is_billed else (0, 0)
            spent = _minus(booking.settle(*cost), booked)
            await self._on_disk(partial(self._cache.charge, self._run, spent), None)
            raise
        except BaseException:  # a defect of ours, or the end: what it cost stays as it was booked
            self._breaker.failed()
            booking.settle(booked.prompt_tokens, booked.completion_tokens)
            raise
        self._breaker.succeeded()
        self._seconds.append(time.monotonic() - started)
        cost = (answer.prompt_tokens, answer.completion_tokens)
        if answer.notes.get("usage_missing"):
            cost = (booked.prompt_tokens, self._count(answer.text))
            self.say_once(
                "usage", "The annotator's server does not count tokens; our own count is charged to the budget"
            )
        num_sent = 1 + round(answer.notes.get("extra_requests", 0))
        self._counts.update(requests=num_sent - 1, prompt_tokens=cost[0], completion_tokens=cost[1])
        spent = _minus(booking.settle(*cost, num_sent), booked)
        return await self._on_disk(
            partial(self._cache.store, key, answer, self._chat.identity, self._run, spent), answer
        )

    async def _book(self, estimate: tuple[int, int], flight: _Flight) -> Reservation:
        """Book what a request may cost; where only what is under way stands in the way, wait for it to cost less."""
        while True:
            self._check(flight)
            booking = self._purse.reserve(*estimate)
            if booking is not None:
                self._num_booked += 1
                return booking
            if not self._num_booked:
                break
            await self._sleep(min(_LONGEST_WAIT_S, self._limits.backoff_s))
        self.say_once(
            "budget",
            "The annotator's budget (annotator.backend.budget) is spent; the run goes on with the policy gradient "
            "alone where no answer is stored",
        )
        raise AnnotationError("The annotator's budget does not cover a further request.", "over_budget")

    async def _wait_for_turn(self, flight: _Flight) -> None:
        """Pass the rate limit, one at a time, and the breaker."""
        async with self._turn:
            self._check(flight)
            await self._sleep(self._bucket.reserve())
        while True:
            self._check(flight)
            if self._breaker.admit():
                return
            wait_s = self._breaker.next_trial_s
            # a server that accepts nothing from us will not in a moment either
            if self._is_refused or time.monotonic() + wait_s >= flight.patience_ends:
                raise AnnotationError(
                    f"Nothing is sent to the annotator for {self._limits.breaker_pause_s:g} s, because "
                    f"{self._limits.breaker_failures} requests in a row have failed.",
                    "circuit_open",
                )
            await self._sleep(min(_LONGEST_WAIT_S, max(0.01, wait_s)))

    def _check(self, flight: _Flight) -> None:
        """Refuse what nobody waits for any more."""
        if not flight.num_waiting or time.monotonic() >= flight.patience_ends:
            raise AnnotationError("No rollout waits for this annotation any more; it was not asked for.", "timeout")

    def _report(self, fault: ChatFault) -> None:
        """Tell the breaker of a failed try: it is there for servers that are down, or accept nothing from us."""
        self._is_refused = fault.cause == "refused"
        is_superseded = fault.cause == "timeout" and fault.is_final  # new weights came first
        if fault.cause == "too_long":
            self._breaker.succeeded()
        elif fault.cause == "rate_limited" or is_superseded:
            self._breaker.cancelled()
        else:
            self._breaker.failed()

    async def _on_disk(self, work: Callable[[], Result], otherwise: Result) -> Result:
        """What the cache says; `otherwise` where it cannot be used."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._disk, work)
        except CacheError as error:
            self._counts["cache_errors"] += 1
            self.say_once("cache", f"{error}; annotation goes on without it")
            return otherwise


def _minus(one: Spent, other: Spent) -> Spent:
    """What has to be charged in addition; negative where less was spent than booked."""
    return Spent(
        one.requests - other.requests,
        one.prompt_tokens - other.prompt_tokens,
        one.completion_tokens - other.completion_tokens,
        one.money - other.money,
    )
