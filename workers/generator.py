"""All engines as the driver sees them: spreads requests, and yields rollouts as any engine finishes them.

Decides how requests are spread, waited for and blamed, and what becomes of those of an engine that dies; how they are
sampled is `trace_rl.workers.generator_engine`, how an engine comes back is `trace_rl.workers.weight_sync`. Must not
know rewards, routes or weights.

Invariant: each request is answered once, however often an engine dies. Where its work waits for the engine it is done
again from its beginning, all of it, so that the engine sees the very batch that it saw before: what comes of it is
bit-identical, and what had come before is passed over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from trace_rl.batch import Cancelled, Rollout, RolloutKey, RolloutRequest
from trace_rl.errors import DeadlineError, TraceError, WeightSyncError, WorkerError
from trace_rl.protocols import Decoding
from trace_rl.reply_checks import rollout_fault
from trace_rl.workers.idle import IdleMeter
from trace_rl.workers.waiting import DEATHS, first_cause, wait_for, worker_error
from trace_rl.workers.worker_logs import whereabouts_of_actor

logger = logging.getLogger(__name__)

_ARRIVAL_S = 60.0  # for rollouts that are finished and only have to be copied
_GATHER_S = 0.05  # for rollouts of other engines to come, once the first has: a look costs the driver as much as four


class Recovery(Protocol):
    """How engines that died come back (`trace_rl.workers.weight_sync.ProvenWeightSync`)."""

    def life(self, index: int) -> str:
        """The life in which an engine may be asked now."""
        ...

    def recover(self, index: int, life: str) -> bool:
        """Wait until an engine can be asked again; False where it is still in this life."""
        ...


class NoRecovery:
    """Engines that died stay dead."""

    def life(self, index: int) -> str:
        return ""

    def recover(self, index: int, life: str) -> bool:
        return False


@dataclass(eq=False)
class _Work:
    """What an engine was asked for in one call."""

    engine: int
    life: str
    requests: Sequence[RolloutRequest]
    had: frozenset[RolloutKey]
    """What came of an earlier call for the same work."""
    missing: set[RolloutKey] = field(default_factory=set)
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Prompt id -> token ids."""

    def __post_init__(self) -> None:
        self.missing = {_key(request) for request in self.requests}
        self.prompts = {request.prompt.prompt_id: request.prompt_token_ids for request in self.requests}


class VllmGenerator:
    """Spreads requests over engine actors and yields rollouts as any engine finishes them.

    Args:
        engines: actor handles of `GeneratorEngine`, in the order of their index.
        max_tokens: response budget of a completion.
        timeout_s: deadline of one call, that is of all completions that were asked for together; an engine that comes
            back has it anew.
        setting: where the deadline was set; named in errors.
        recovery: how engines come back.
        hands_over: whether the engines that are left take over what a dead one has not finished; otherwise it waits for
            the engine.
    """

    def __init__(
        self,
        engines: Sequence[Any],
        max_tokens: int,
        timeout_s: float,
        setting: str = "placement.step_timeout_s",
        recovery: Recovery | None = None,
        hands_over: bool = False,
    ) -> None:
        self.engines = list(engines)
        self.max_tokens = max_tokens
        self.timeout_s = timeout_s
        self.setting = setting
        self.recovery = recovery or NoRecovery()
        self.hands_over = hands_over
        self.away: set[int] = set()
        """Engines that others stand in for."""
        self.idle = [IdleMeter() for _ in engines]
        """Of each engine."""

    def generate(self, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        """Submit everything now; iterate to receive.

        Raises:
            WorkerError: an engine died and does not come back, failed or missed the deadline.
            WeightSyncError: an engine's weights are unproven.
        """
        collection = _Collection(self, decoding)
        collection.submit(requests)
        return collection.receive()

    def cancel(self, keys: Sequence[RolloutKey]) -> None:
        """Give up completions of open calls, on whichever engine they are.

        Raises:
            WorkerError: an engine did not answer.
        """
        answers = [engine.cancel.remote(list(keys)) for engine in self.engines]
        for index, answer in enumerate(answers):
            try:
                wait_for(answer, _ARRIVAL_S, f"generator engine {index}", "giving completions up")
            except WorkerError as error:
                if not isinstance(error.__cause__, DEATHS):  # what a dead engine was writing is given up already
                    raise

    def back(self, index: int, life: str) -> None:
        """Have an engine come back while others do its work; a failure shows at the next weight sync."""
        self.away.add(index)

        def wait() -> None:
            try:
                self.recovery.recover(index, life)
            except TraceError as error:
                logger.warning("generator engine %d does not come back: %s", index, error)
            finally:
                self.away.discard(index)

        threading.Thread(target=wait, daemon=True, name=f"return of engine {index}").start()


class _Collection:
    """One call: which engine owes what, until everything has come."""

    def __init__(self, generator: VllmGenerator, decoding: Decoding) -> None:
        self._generator = generator
        self._decoding = decoding
        self._deadline = time.monotonic() + generator.timeout_s
        self._streams: dict[Any, _Work] = {}

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Spread requests over the engines that are there."""
        generator = self._generator
        there = [index for index in range(len(generator.engines)) if index not in generator.away]
        indices = there or list(range(len(generator.engines)))
        shares = split_by_prompt(requests, [generator.idle[index].num_open for index in indices])
        for index, share in zip(indices, shares, strict=True):
            if share:
                self._ask(index, share)

    def _ask(self, index: int, requests: Sequence[RolloutRequest], had: frozenset[RolloutKey] = frozenset()) -> None:
        generator = self._generator
        life = generator.recovery.life(index)
        call = generator.engines[index].generate.options(num_returns="streaming")
        stream = call.remote(list(requests), self._decoding, generator.max_tokens)
        self._streams[stream] = _Work(index, life, requests, had)
        generator.idle[index].begin(len(requests))

    def receive(self) -> Iterator[Rollout]:
        """Everything that was asked for, as it comes."""
        while self._streams:
            failures: dict[Any, RayError] = {}
            taken: list[tuple[Any, Any]] = []
            for stream in self._ready():
                references, failure = _take_ready(stream)
                taken += [(stream, reference) for reference in references]
                if failure is not None:
                    failures[stream] = failure
                elif not references:
                    self._finish(stream)
            for stream, chunk in _fetch(taken):
                if isinstance(chunk, RayError):
                    failures.setdefault(stream, chunk)
                else:
                    yield from self._book(self._streams[stream], chunk)
            for stream, failure in failures.items():
                self._make_good(self._streams.pop(stream), failure)

    def _ready(self) -> list[Any]:
        streams = list(self._streams)
        ready, _ = ray.wait(streams, num_returns=1, timeout=max(0.0, self._deadline - time.monotonic()))
        if not ready:
            raise self._late()
        if len(streams) > 1:
            ready, _ = ray.wait(streams, num_returns=len(streams), timeout=_GATHER_S)
        return list(ready)

    def _book(self, work: _Work, chunk: Sequence[Rollout | Cancelled]) -> Iterator[Rollout]:
        self._generator.idle[work.engine].end(len(chunk))
        for item in chunk:
            if item.key not in work.missing:
                raise WorkerError(
                    f"generator engine {work.engine} sent sample {item.key.sample} of prompt {item.key.prompt_id!r} "
                    "twice, or without being asked for it; stop the run and look at its log"
                )
            work.missing.discard(item.key)
            if isinstance(item, Rollout):
                if fault := rollout_fault(item, work.prompts[item.prompt.prompt_id]):
                    raise WorkerError(
                        f"generator engine {work.engine} garbled sample {item.sample} of prompt "
                        f"{item.prompt.prompt_id!r}: {fault}; stop the run and look at its log"
                    )
                if item.key not in work.had:
                    yield item

    def _finish(self, stream: Any) -> None:
        work = self._streams.pop(stream)
        if work.missing:
            raise WorkerError(
                f"generator engine {work.engine} ended with {len(work.missing)} rollouts missing; see its log"
            )

    def _make_good(self, work: _Work, failure: RayError) -> None:
        """Have what an engine has not finished done by others, or by itself once it is back."""
        generator, index = self._generator, work.engine
        generator.idle[index].end(len(work.missing))
        cause = first_cause(failure)
        error = worker_error(failure, f"generator engine {index}", "generating")
        # an engine that died unseen and came back has unproven weights
        if not isinstance(failure, DEATHS) and not isinstance(cause, WeightSyncError):
            raise error from cause
        unfinished = [request for request in work.requests if _key(request) in work.missing - work.had]
        others = set(range(len(generator.engines))) - generator.away - {index}
        if generator.hands_over and others and isinstance(failure, DEATHS):
            logger.warning("%s; its %d unfinished rollouts go to other engines", error, len(unfinished))
            generator.back(index, work.life)
            self.submit(unfinished)
            return
        if not generator.recovery.recover(index, work.life):
            raise error from cause
        logger.warning("%s; it is back, and its %d unfinished rollouts are sampled again", error, len(unfinished))
        self._deadline = time.monotonic() + generator.timeout_s
        had = work.had | ({_key(request) for request in work.requests} - work.missing)
        self._ask(index, unfinished if generator.hands_over else work.requests, had)

    def _late(self) -> DeadlineError:
        generator = self._generator
        missing = {work.engine: len(work.missing) for work in self._streams.values()}
        late = ", ".join(f"{index} ({count} rollouts missing)" for index, count in sorted(missing.items()))
        places = {index: whereabouts_of_actor(generator.engines[index]._actor_id.hex()) for index in sorted(missing)}
        told = "; ".join(f"{index}: {place}" for index, place in places.items() if place)
        return DeadlineError(
            f"no rollout came before the deadline of {generator.timeout_s:g} s ({generator.setting}) from generator "
            f"engine {late}; look at the log, or raise the deadline if the work is that long{told and f' ({told})'}"
        )


def _key(request: RolloutRequest) -> RolloutKey:
    return RolloutKey(request.prompt.prompt_id, request.sample)


def _take_ready(stream: Any) -> tuple[list[Any], RayError | None]:
    """References to what a ready stream has, none at its end, and what went wrong behind them."""
    taken: list[Any] = []
    try:
        while not taken or stream.next_ready():
            taken.append(next(stream))
    except StopIteration:
        pass
    except RayError as error:
        return taken, error
    return taken, None


def _fetch(references: Sequence[tuple[Any, Any]]) -> Iterator[tuple[Any, list[Rollout | Cancelled] | RayError]]:
    """What is behind references, each with its stream: in one call, or one by one where that fails."""
    try:
        chunks = ray.get([reference for _, reference in references], timeout=_ARRIVAL_S)
        yield from zip((stream for stream, _ in references), chunks, strict=True)
    except RayError:
        for stream, reference in references:
            try:
                yield stream, ray.get(reference, timeout=_ARRIVAL_S)
            except RayError as error:
                yield stream, error


def split_by_prompt(requests: Sequence[RolloutRequest], loads: Sequence[int]) -> list[list[RolloutRequest]]:
    """Shares that keep each prompt's requests together, so that an engine reuses the prefix.

    Args:
        loads: how much each engine has to do already; with its share it has about as much as the others.
    """
    groups: dict[str, list[RolloutRequest]] = {}
    for request in requests:
        groups.setdefault(request.prompt.prompt_id, []).append(request)
    shares: list[list[RolloutRequest]] = [[] for _ in loads]
    for group in groups.values():
        least = min(range(len(loads)), key=lambda index: loads[index] + len(shares[index]))
        shares[least].extend(group)
    return shares
