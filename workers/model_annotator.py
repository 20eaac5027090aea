"""A language model as an annotator: asks politely, pays once, and never lets one bad answer cost more than its spans.

For each request: render, look into the cache, join an identical request that is under way, else send within the limits
(concurrency, rate, circuit breaker, budget) and try again where that can help; read the answer, and send it back once
where it is outside of the protocol.

Invariants: what was answered is stored before it is used, and never asked again; a request that its rollout no longer
waits for is finished and stored all the same, but not tried again; nothing is sent that the budget does not cover.

This module must not know how a model is reached, or what spans are used for.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from trace_rl.annotation import AnnotationRequest, Answer
from trace_rl.annotation_prompts import PROMPT_VERSION, render, repair_messages, schema
from trace_rl.annotation_reading import read_reply, visible_spans
from trace_rl.annotators import LanguageModel, SelfAnnotation
from trace_rl.config.annotator import Privilege
from trace_rl.errors import AnnotationError
from trace_rl.workers.annotation_cache import AnswerCache, CacheError, key_of
from trace_rl.workers.annotation_limits import CircuitBreaker, Purse, Spent, TokenBucket
from trace_rl.workers.chat import ChatAnswer, ChatFault, ChatModel, ChatRequest


@dataclass(frozen=True)
class Telling:
    """What a model is told beside the request, and how its length is measured."""

    privileges: Collection[Privilege]
    count: Callable[[str], int]
    """Tokens of a text, by the policy's tokenizer."""
    special_tokens: Collection[str]


class _Flight:
    """A request under way, and the last round of rollouts that waits for it."""

    task: asyncio.Task[ChatAnswer]

    def __init__(self, round_: int) -> None:
        self.round = round_


class ModelAnnotator:
    """An `AnnotatorBackend` over a `ChatModel`.

    Args:
        cache: answers of this and former runs.
        run: name of the run in the cache's ledger of spending.
        patience_s: no further try is made once a rollout has waited so long.
    """

    def __init__(
        self,
        settings: LanguageModel,
        chat: ChatModel,
        telling: Telling,
        cache: AnswerCache,
        run: str,
        patience_s: float,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._chat = chat
        self._telling = telling
        self._cache = cache
        self._run = run
        self._patience_s = patience_s
        self._sleep = sleep
        limits = settings.limits
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._bucket = TokenBucket(limits.requests_per_minute)
        self._breaker = CircuitBreaker(limits.breaker_failures, limits.breaker_pause_s)
        self._purse = Purse(settings.budget, cache.spent(run))
        self._jitter = random.Random(0)
        self._under_way: dict[str, _Flight] = {}
        self._round = 0
        self._counts: Counter[str] = Counter()
        self._seconds: list[float] = []
        self._said: set[str] = set()
        self._notices: list[str] = []

    async def answer(self, request: AnnotationRequest) -> Answer:
        """See `AnnotatorBackend.answer`."""
        settings, telling = self._settings, self._telling
        shown = render(
            request,
            settings.max_spans,
            telling.privileges,
            settings.max_prompt_tokens,
            telling.count,
            telling.special_tokens,
        )
        if shown.hidden:
            self._say_once(
                "elided",
                f"A prompt of {request.prompt.prompt_id} is longer than {settings.max_prompt_tokens} "
                f"tokens (annotator.backend.max_prompt_tokens); segments {shown.hidden.start} to "
                f"{shown.hidden.stop - 1} of {len(request.segments)} are not shown",
            )
        asked = ChatRequest(
            messages=shown.messages,
            schema=schema(request, settings.max_spans),
            max_tokens=settings.max_reply_tokens,
            temperature=settings.temperature,
            policy_version=request.policy_version if isinstance(settings, SelfAnnotation) else 0,
            affinity=request.prompt.prompt_id,
        )
        said = await self._ask(asked)
        repairs = 0
        try:
            reply, num_malformed = read_reply(said.text)
        except AnnotationError as error:
            if not settings.repair:
                raise
            repairs = 1
            again = replace(asked, messages=repair_messages(shown, said.text, error))
            reply, num_malformed = read_reply((await self._ask(again)).text)
        reply, num_hidden = visible_spans(reply, shown.hidden)
        notes = {
            "malformed_spans": num_malformed,
            "hidden_spans": num_hidden,
            "elided_segments": len(shown.hidden),
            "repairs": repairs,
        }
        return Answer(reply, {name: float(count) for name, count in notes.items()})

    def usage(self) -> dict[str, float]:
        """What was sent, saved and spent since the last call; the run's total spending; seconds of a request."""
        counts, self._counts = self._counts, Counter()
        seconds, self._seconds = self._seconds, []
        spent = self._purse.spent
        names = ("requests", "retries", "cache_hits", "shared", "prompt_tokens", "completion_tokens", "cache_errors")
        usage = {f"annotation/{name}": float(counts[name]) for name in names}
        usage |= {
            f"annotation/faults/{name[6:]}": float(counts[name]) for name in sorted(counts) if name[:6] == "fault/"
        }
        usage |= {
            "annotation/run_requests": float(spent.requests),
            "annotation/run_tokens": float(spent.prompt_tokens + spent.completion_tokens),
            "annotation/run_cost": spent.money,
        }
        if seconds:
            usage["annotation/request_mean_s"] = math.fsum(seconds) / len(seconds)
        return usage

    def give_up(self) -> None:
        """The step has stopped waiting: what is being answered is stored when it comes, and nothing more is sent."""
        self._round += 1

    def notices(self) -> list[str]:
        """What a user should hear, each once; since the last call."""
        notices, self._notices = self._notices, []
        return notices

    async def close(self) -> None:
        """Give up what is under way."""
        for flight in self._under_way.values():
            flight.task.cancel()
        await self._chat.close()

    async def _ask(self, request: ChatRequest) -> ChatAnswer:
        """The answer to a request: stored, under way already, or new."""
        key = key_of(self._chat.identity, PROMPT_VERSION, request)
        flight = self._under_way.get(key)
        if flight is None:
            if (stored := self._find(key)) is not None:
                self._counts["cache_hits"] += 1
                return stored
            flight = _Flight(self._round)
            flight.task = asyncio.create_task(self._send(key, request, flight))
            self._under_way[key] = flight
            flight.task.add_done_callback(lambda done: self._finish(key, done))
        else:
            flight.round = self._round
            self._counts["shared"] += 1
        return await asyncio.shield(flight.task)  # a rollout that stops waiting does not take the answer from others

    def _finish(self, key: str, task: asyncio.Task[ChatAnswer]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # seen here, where no rollout waits for it any more

    async def _send(self, key: str, request: ChatRequest, flight: _Flight) -> ChatAnswer:
        """Try until there is an answer, another try cannot help, or nobody waits any more."""
        limits = self._settings.limits
        patience_ends = time.monotonic() + self._patience_s
        attempt = 1
        while True:
            try:
                return await self._try(key, request, flight)
            except ChatFault as fault:
                self._counts[f"fault/{fault.cause}"] += 1
                backoff_s = min(limits.backoff_max_s, limits.backoff_s * 2 ** (attempt - 1))
                wait_s = max(fault.retry_after_s, backoff_s * self._jitter.uniform(0.5, 1.0))
                is_last = fault.is_final or attempt >= limits.max_attempts
                if is_last or time.monotonic() + wait_s >= patience_ends:
                    raise AnnotationError(f"{fault} (try {attempt} of {limits.max_attempts})", fault.cause) from fault
            attempt += 1
            self._counts["retries"] += 1
            await self._sleep(wait_s)

    async def _try(self, key: str, request: ChatRequest, flight: _Flight) -> ChatAnswer:
        """One request within all limits; what it costs is booked before it is sent."""
        async with self._slots:
            if flight.round < self._round:
                raise AnnotationError("The step goes on without what was not answered in time.", "timeout")
            if not self._breaker.admit():
                raise AnnotationError(
                    f"Nothing is sent to the annotator for {self._settings.limits.breaker_pause_s:g} s, because "
                    f"{self._settings.limits.breaker_failures} requests in a row have failed.",
                    "circuit_open",
                )
            prompt_tokens = sum(self._telling.count(message.content) for message in request.messages)
            booking = self._purse.reserve(prompt_tokens, request.max_tokens)
            if booking is None:
                self._breaker.cancelled()
                self._say_once(
                    "budget",
                    "The annotator's budget (annotator.backend.budget) is spent; the run goes on with the policy "
                    "gradient alone where no answer is stored",
                )
                raise AnnotationError("The annotator's budget does not cover a further request.", "over_budget")
            try:
                await self._sleep(self._bucket.reserve())
                self._charge(Spent(requests=1))  # before it is sent: a run that is killed meanwhile has sent it
                self._counts["requests"] += 1
                started = time.monotonic()
                answer = await self._chat.ask(request, self._settings.limits.request_timeout_s)
            except BaseException as error:
                if isinstance(error, ChatFault) and error.cause == "too_long":
                    self._breaker.succeeded()  # the server works
                else:
                    self._breaker.failed()  # refusals too: a key that is not accepted is not accepted a second time
                booking.settle(0, 0)
                raise
            self._breaker.succeeded()
            self._seconds.append(time.monotonic() - started)
            num_sent = 1 + round(answer.notes.get("extra_requests", 0))
            spent = booking.settle(answer.prompt_tokens, answer.completion_tokens, num_sent)
            self._counts.update(
                requests=num_sent - 1, prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens
            )
            return self._store(key, answer, replace(spent, requests=num_sent - 1))

    def _find(self, key: str) -> ChatAnswer | None:
        try:
            return self._cache.find(key)
        except CacheError as error:
            self._cache_failed(error)
            return None

    def _store(self, key: str, answer: ChatAnswer, spent: Spent) -> ChatAnswer:
        try:
            return self._cache.store(key, answer, self._chat.identity, self._run, spent)
        except CacheError as error:
            self._cache_failed(error)
            return answer

    def _charge(self, spent: Spent) -> None:
        try:
            self._cache.charge(self._run, spent)
        except CacheError as error:
            self._cache_failed(error)

    def _cache_failed(self, error: CacheError) -> None:
        self._counts["cache_errors"] += 1
        self._say_once("cache", f"{error}; annotation goes on without it")

    def _say_once(self, topic: str, text: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            self._notices.append(text)
