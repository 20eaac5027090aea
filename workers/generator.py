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

from trace_rl.batch import Rollout, RolloutRequest
from trace_rl.errors import WeightSyncError, WorkerError
from trace_rl.protocols import Decoding
from trace_rl.workers.waiting import first_cause, wait_for, worker_error

_ARRIVAL_S = 60.0  # for rollouts that are finished and only have to be copied


class VllmGenerator:
    """Spreads requests over engine actors and yields rollouts as any engine finishes them.

    Args:
        engines: actor handles of `GeneratorEngine`, in the order of their index.
        max_tokens: response budget of a completion.
        timeout_s: deadline of one call.
    """

    def __init__(self, engines: Sequence[Any], max_tokens: int, timeout_s: float) -> None:
        self._engines = list(engines)
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s

    def generate(self, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        """Submit everything now; iterate to receive.

        Raises:
            WorkerError: an engine died, failed or missed the deadline.
            WeightSyncError: an engine's weights are unproven, or two engines sampled with different versions.
        """
        deadline = time.monotonic() + self._timeout_s
        shares = split_by_prompt(requests, len(self._engines))
        streams = {
            engine.generate.options(num_returns="streaming").remote(share, decoding, self._max_tokens): index
            for index, (engine, share) in enumerate(zip(self._engines, shares, strict=True))
            if share
        }
        return self._collect(streams, [len(share) for share in shares], deadline)

    def _collect(self, streams: dict[Any, int], missing: list[int], deadline: float) -> Iterator[Rollout]:
        versions: dict[int, int] = {}
        while streams:
            ready, _ = ray.wait(list(streams), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(f"{index} ({missing[index]} rollouts missing)" for index in sorted(streams.values()))
                raise WorkerError(
                    f"no rollout came before the deadline of {self._timeout_s:g} s (placement.step_timeout_s) from "
                    f"generator engine {late}; raise the deadline or look at the engine's log"
                )
            stream = ready[0]
            index = streams[stream]
            chunk = _next_chunk(stream, index)
            if chunk is None:
                del streams[stream]
                continue
            for rollout in chunk:
                missing[index] -= 1
                versions[index] = rollout.policy_version
                if len(set(versions.values())) > 1:
                    raise WeightSyncError(
                        f"generator engines sampled with different weight versions (engine: version {versions}); the "
                        "rollouts of one step must come from one proven version"
                    )
                yield rollout
        if any(missing):
            raise WorkerError(f"generator engines ended with rollouts missing: {missing} (per engine); see their logs")


def _next_chunk(stream: Any, index: int) -> list[Rollout] | None:
    """What the ready stream yields next, None at its end."""
    name = f"generator engine {index}"
    try:
        reference = next(stream)
    except StopIteration:
        return None
    except RayError as error:
        raise worker_error(error, name, "generating") from first_cause(error)
    chunk: list[Rollout] = wait_for(reference, _ARRIVAL_S, name, "sending finished rollouts")
    return chunk


def split_by_prompt(requests: Sequence[RolloutRequest], num_shares: int) -> list[list[RolloutRequest]]:
    """Shares of near equal size that keep each prompt's requests together, so that an engine reuses the prefix."""
    groups: dict[str, list[RolloutRequest]] = {}
    for request in requests:
        groups.setdefault(request.prompt.prompt_id, []).append(request)
    shares: list[list[RolloutRequest]] = [[] for _ in range(num_shares)]
    for group in groups.values():
        min(shares, key=len).extend(group)
    return shares
