"""An engine that sleeps instead of sampling: what `VllmGenerator` needs of an engine's actor.

Decides when a continuous-batching engine would have finished each completion, and waits for that. Time is counted in
decoding steps: each step writes one token of every completion in the batch and takes longer the more there are, so what
is left of a completion is known in steps whatever joins or leaves the batch. It must not know torch, vLLM or pydantic,
so that 64 of them fit on a laptop.

Invariants: at most `max_concurrent` completions are written at a time, the others wait in the order in which they came;
the length of a completion depends on its prompt and number alone, its tokens on its seed; each token carries the
version that was accepted when it was written; what is cancelled is gone at once, and its key comes in its place.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from zlib import crc32

import numpy as np

from trace_rl.batch import Cancelled, Rollout, RolloutKey, RolloutRequest
from trace_rl.errors import WeightSyncError
from trace_rl.protocols import Decoding

_UNPROVEN = -1


@dataclass(frozen=True)
class Pace:
    """How long completions are, and how fast they are written."""

    median_tokens: float
    sigma: float
    """Of the logarithm of the length, in nats; 0: all have the median length."""
    max_concurrent: int
    seconds_per_token: float
    """Of a decoding step with one completion in the batch."""
    crowding: float = 0.0
    """How much longer a step of the full batch takes, relative to that of one completion."""
    reread_seconds_per_token: float = 0.0
    """What a sync adds for each token that is written and that the new weights have to read; 0: they do not."""
    runs_through_syncs: bool = True
    """Whether new weights may come while completions are written."""


def length_of(key: RolloutKey, pace: Pace, max_tokens: int) -> int:
    """Tokens of a completion, in [1, max_tokens]; at max_tokens it is cut.

    Not by the request's seed, which the step that asks is part of: a trace is to be the same however it is scheduled.
    """
    numbers = np.random.default_rng(crc32(f"{key.prompt_id}/{key.sample}".encode()))
    length = pace.median_tokens * math.exp(pace.sigma * numbers.standard_normal())
    return min(max(1, round(length)), max_tokens)


@dataclass
class _Sequence:
    """A completion that waits or is written."""

    number: int
    """In the order of arrival."""
    request: RolloutRequest
    max_tokens: int
    length: int
    arrived: SimpleQueue[list[Rollout | Cancelled]]
    begun_at: float = 0.0
    """On the engine's clock of steps, when the first step began; its tokens are written at +1, +2, ..."""
    is_over: bool = False

    @property
    def key(self) -> RolloutKey:
        return RolloutKey(self.request.prompt.prompt_id, self.request.sample)


class SleepingEngine:
    """One engine inside its actor: `ray.remote(SleepingEngine).options(max_concurrency=8).remote(...)`."""

    def __init__(self, index: int, pace: Pace) -> None:
        self._name = f"sleeping engine {index}"
        self._pace = pace
        self._lock = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._ends: list[tuple[float, int]] = []
        """A heap: on the clock of steps, when each completion will be done, and its number."""
        self._version = _UNPROVEN
        self._switches: list[tuple[float, int]] = []
        """On the clock of steps, from when which version writes."""
        self._steps = 0.0
        """The clock of steps: how many the engine has done."""
        self._settled_at = time.monotonic()
        """Until when steps are counted; in the future while the engine is held up."""
        self._busy_s = 0.0
        self._read_at = self._settled_at
        threading.Thread(target=self._serve, name=self._name, daemon=True).start()

    def ready(self) -> str:
        """The engine's name, once it can be used."""
        return self._name

    def generate(
        self, requests: Sequence[RolloutRequest], decoding: Decoding, max_tokens: int
    ) -> Iterator[list[Rollout | Cancelled]]:
        """One completion a request; yields those that were done in the same step, or the key of a cancelled one.

        Raises:
            WeightSyncError: the weights of this engine are not proven.
        """
        arrived: SimpleQueue[list[Rollout | Cancelled]] = SimpleQueue()
        with self._lock:
            if self._version == _UNPROVEN:
                raise WeightSyncError(f"{self._name} was asked for rollouts while its weights are unproven")
            for request in requests:
                length = length_of(RolloutKey(request.prompt.prompt_id, request.sample), self._pace, max_tokens)
                self._waiting.append(_Sequence(next(self._numbers), request, max_tokens, length, arrived))
            self._settle()
            self._lock.notify()
        missing = len(requests)
        while missing:
            done = arrived.get()
            yield done
            missing -= len(done)

    def cancel(self, keys: Sequence[RolloutKey]) -> None:
        """Give up completions that wait or are written."""
        chosen = {RolloutKey(*key) for key in keys}
        with self._lock:
            self._settle()
            for sequence in [each for each in (*self._waiting, *self._running.values()) if each.key in chosen]:
                sequence.is_over = True
                self._running.pop(sequence.number, None)
                sequence.arrived.put([Cancelled(sequence.key)])
            self._waiting = deque(each for each in self._waiting if not each.is_over)
            self._settle()
            self._lock.notify()

    def receive_weights(self, duration_s: float) -> None:
        """Stand still for so long; the weights are unproven until `accept`.

        Raises:
            WeightSyncError: completions are being written, and must not run through syncs.
        """
        with self._lock:
            self._settle()
            if self._running and not self._pace.runs_through_syncs:
                raise WeightSyncError(f"{self._name} got weights while {len(self._running)} completions were written")
            self._version = _UNPROVEN
            written = sum(self._steps - sequence.begun_at for sequence in self._running.values())
            self._hold_up(duration_s + written * self._pace.reread_seconds_per_token)
            self._lock.notify()
        time.sleep(duration_s)

    def accept(self, version: int) -> None:
        """Write all tokens that are still to come as `version`."""
        with self._lock:
            self._settle()
            self._version = version
            self._switches.append((self._steps, version))

    def busy_frac(self) -> float:
        """Share of places in the batch that were taken, over the time since the last call."""
        with self._lock:
            self._settle()
            now = time.monotonic()
            offered_s = (now - self._read_at) * self._pace.max_concurrent
            busy_s, self._busy_s, self._read_at = self._busy_s, 0.0, now
        return busy_s / offered_s

    def _step_s(self) -> float:
        """Seconds of a step with the present batch."""
        pace = self._pace
        fullness = max(0, len(self._running) - 1) / max(1, pace.max_concurrent - 1)
        return pace.seconds_per_token * (1 + pace.crowding * fullness)

    def _hold_up(self, duration_s: float) -> None:
        self._settled_at = max(self._settled_at, time.monotonic()) + duration_s

    def _settle(self) -> None:
        """Count the steps until now, hand out what is done, and fill the batch; the lock is held."""
        now = time.monotonic()
        while True:
            left_s = max(0.0, now - self._settled_at)
            done_at = self._ends[0][0] if self._ends else math.inf
            step_s = self._step_s()
            passed_s = min(left_s, max(0.0, done_at - self._steps) * step_s) if self._running else left_s
            self._busy_s += passed_s * len(self._running)
            self._settled_at += passed_s
            if self._running:
                self._steps = done_at if passed_s < left_s else self._steps + passed_s / step_s
            is_changed = self._hand_out() | self._fill()
            if not is_changed:
                return

    def _hand_out(self) -> bool:
        """Whether any completion was done."""
        done: dict[int, tuple[SimpleQueue[list[Rollout | Cancelled]], list[Rollout | Cancelled]]] = {}
        is_changed = False
        while self._ends and self._ends[0][0] <= self._steps + 1e-9:
            _, number = heapq.heappop(self._ends)
            is_changed = True
            if (sequence := self._running.pop(number, None)) is not None:
                done.setdefault(id(sequence.arrived), (sequence.arrived, []))[1].append(self._rollout(sequence))
        for arrived, rollouts in done.values():
            arrived.put(rollouts)
        return is_changed

    def _fill(self) -> bool:
        """Whether any completion was begun."""
        is_changed = False
        while self._waiting and len(self._running) < self._pace.max_concurrent:
            sequence = self._waiting.popleft()
            sequence.begun_at = self._steps
            self._running[sequence.number] = sequence
            heapq.heappush(self._ends, (self._steps + sequence.length, sequence.number))
            is_changed = True
        return is_changed

    def _rollout(self, sequence: _Sequence) -> Rollout:
        request, length = sequence.request, sequence.length
        numbers = np.random.default_rng(request.seed)
        token_ids = tuple(numbers.integers(1000, 150_000, length).tolist())
        ends = np.array([at for at, _ in self._switches[1:]])
        written_at = sequence.begun_at + 1 + np.arange(length)
        versions = np.array([version for _, version in self._switches])
        return Rollout(
            prompt=request.prompt,
            sample=request.sample,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=token_ids,
            rollout_logprobs=-numbers.random(length, dtype=np.float32),
            finish_reason="length" if length == sequence.max_tokens else "stop",
            token_versions=versions[np.searchsorted(ends, written_at - 1e-9)],
            text="so it is 4, " * (length // 4) + ("4" if request.seed % 2 else "5"),
        )

    def _serve(self) -> None:
        """The engine's life: settle, sleep until the next completion is done."""
        with self._lock:
            while True:
                self._settle()
                self._lock.wait(self._patience_s())

    def _patience_s(self) -> float | None:
        if not self._running:
            return None
        held_s = max(0.0, self._settled_at - time.monotonic())
        return held_s + max(0.0, self._ends[0][0] - self._steps) * self._step_s()
