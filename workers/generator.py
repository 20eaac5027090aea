"""All engines as the driver sees them: spreads requests, and yields rollouts as any engine finishes them.

Decides how requests are spread, waited for and blamed; how they are sampled is `trace_rl.workers.generator_engine`.
Must not know rewards, routes or weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from trace_rl.batch import Rollout, RolloutKey, RolloutRequest
from trace_rl.errors import WorkerError
from trace_rl.protocols import Decoding
from trace_rl.workers.generator_engine import Cancelled
from trace_rl.workers.idle import IdleMeter
from trace_rl.workers.waiting import first_cause, wait_for, worker_error
from trace_rl.workers.worker_logs import whereabouts_of_actor

_ARRIVAL_S = 60.0  # for rollouts that are finished and only have to be copied
_GATHER_S = 0.05  # for rollouts of other engines to come, once the first has: a look costs the driver as much as four


class VllmGenerator:
    """Spreads requests over engine actors and yields rollouts as any engine finishes them.

    Args:
        engines: actor handles of `GeneratorEngine`, in the order of their index.
        max_tokens: response budget of a completion.
        timeout_s: deadline of one call, that is of all completions that were asked for together.
        setting: where the deadline was set; named in errors.
    """

    def __init__(
        self, engines: Sequence[Any], max_tokens: int, timeout_s: float, setting: str = "placement.step_timeout_s"
    ) -> None:
        self._engines = list(engines)
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._setting = setting
        self.idle = [IdleMeter() for _ in engines]
        """Of each engine."""

    def generate(self, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        """Submit everything now; iterate to receive.

        Raises:
            WorkerError: an engine died, failed or missed the deadline.
            WeightSyncError: an engine's weights are unproven.
        """
        deadline = time.monotonic() + self._timeout_s
        shares = split_by_prompt(requests, [meter.num_open for meter in self.idle])
        streams = {
            engine.generate.options(num_returns="streaming").remote(share, decoding, self._max_tokens): index
            for index, (engine, share) in enumerate(zip(self._engines, shares, strict=True))
            if share
        }
        for index, share in enumerate(shares):
            self.idle[index].begin(len(share))
        return self._collect(streams, [len(share) for share in shares], deadline)

    def cancel(self, keys: Sequence[RolloutKey]) -> None:
        """Give up completions of open calls, on whichever engine they are.

        Raises:
            WorkerError: an engine died or did not answer.
        """
        answers = [engine.cancel.remote(list(keys)) for engine in self._engines]
        for index, answer in enumerate(answers):
            wait_for(answer, _ARRIVAL_S, f"generator engine {index}", "giving completions up")

    def _collect(self, streams: dict[Any, int], missing: list[int], deadline: float) -> Iterator[Rollout]:
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._late(sorted(streams.values()), missing)
            if len(streams) > 1:
                ready, _ = ray.wait(list(streams), num_returns=len(streams), timeout=_GATHER_S)
            taken = {stream: _take_ready(stream, streams[stream]) for stream in ready}
            yield from self._received([(streams[stream], item) for stream in ready for item in taken[stream]], missing)
            for stream in ready:
                if not taken[stream]:
                    del streams[stream]
        if any(missing):
            raise WorkerError(f"generator engines ended with rollouts missing: {missing} (per engine); see their logs")

    def _late(self, engines: Sequence[int], missing: Sequence[int]) -> WorkerError:
        late = ", ".join(f"{index} ({missing[index]} rollouts missing)" for index in engines)
        places = {index: whereabouts_of_actor(self._engines[index]._actor_id.hex()) for index in engines}
        told = "; ".join(f"{index}: {place}" for index, place in places.items() if place)
        return WorkerError(
            f"no rollout came before the deadline of {self._timeout_s:g} s ({self._setting}) from generator "
            f"engine {late}; look at the log, or raise the deadline if the work is that long{told and f' ({told})'}"
        )

    def _received(self, references: Sequence[tuple[int, Any]], missing: list[int]) -> Iterator[Rollout]:
        """The rollouts behind references, each with the index of its engine."""
        for (index, _), chunk in zip(references, _fetch(references), strict=True):
            missing[index] -= len(chunk)
            self.idle[index].end(len(chunk))
            for item in chunk:
                if isinstance(item, Rollout):
                    yield item


def _take_ready(stream: Any, index: int) -> list[Any]:
    """References to what a ready stream has; none at its end."""
    taken: list[Any] = []
    try:
        while not taken or stream.next_ready():
            taken.append(next(stream))
    except StopIteration:
        pass
    except RayError as error:
        raise worker_error(error, f"generator engine {index}", "generating") from first_cause(error)
    return taken


def _fetch(references: Sequence[tuple[int, Any]]) -> list[list[Rollout | Cancelled]]:
    """What engines have sent, in one call; one by one where that fails, so that the error names its engine."""
    try:
        return ray.get([reference for _, reference in references], timeout=_ARRIVAL_S)
    except Exception:
        return [
            wait_for(reference, _ARRIVAL_S, f"generator engine {index}", "sending finished rollouts")
            for index, reference in references
        ]


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
