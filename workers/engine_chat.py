"""Engines of the run as a `ChatModel`: the policy itself, its start weights, or another local model annotates.

Decides which engine is asked and how long it is waited for. It must not know what is asked, or how an engine finds room
for it beside rollouts.

Invariant: whatever becomes of an engine is a `ChatFault` here, so that a dead annotator costs spans, not the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from zlib import crc32

from ray.exceptions import RayError

from trace_rl.workers.chat import ChatAnswer, ChatFault, ChatRequest
from trace_rl.workers.generator_engine import CHAT_THREADS
from trace_rl.workers.waiting import first_cause, worker_error

_GRACE_S = 5.0  # for an engine's own timeout to arrive, which says more


class EngineChat:
    """Asks the engine that has seen the request's prefix.

    Args:
        engines: actor handles of `GeneratorEngine` with `max_concurrency=ENGINE_THREADS`; at most `CHAT_THREADS`
            requests are under way at each, the others wait here.
        identity: what makes two answers the same model's.
        grace_s: how much longer than its own deadline an engine is waited for, in seconds.
    """

    def __init__(self, engines: Sequence[Any], identity: str, grace_s: float = _GRACE_S) -> None:
        self.identity = identity
        self._grace_s = grace_s
        self._engines = [(engine, asyncio.Semaphore(CHAT_THREADS)) for engine in engines]

    async def ask(self, request: ChatRequest, timeout_s: float) -> ChatAnswer:
        """See `ChatModel.ask`."""
        index = crc32(request.affinity.encode()) % len(self._engines)
        engine, places = self._engines[index]
        try:
            async with asyncio.timeout(timeout_s + self._grace_s), places:
                answer: ChatAnswer = await engine.complete.remote(request, timeout_s)
                return answer
        except TimeoutError as error:
            raise ChatFault(
                f"engine {index} of the annotator did not answer within {timeout_s:g} s; look at its log", "timeout"
            ) from error
        except RayError as error:
            cause = first_cause(error)
            if isinstance(cause, ChatFault):
                raise cause from None
            said = worker_error(error, f"engine {index} of the annotator", "answering a chat request")
            raise ChatFault(str(said), "unreachable", is_final=True) from cause
