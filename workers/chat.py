"""One chat request and its answer, whoever serves it: a server over HTTP or an engine of the run.

This module must not know what is asked, how often, or what an answer is worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from trace_rl.annotation_prompts import Message
from trace_rl.errors import FailureCause, TraceError


@dataclass(frozen=True)
class ChatRequest:
    """What a model is asked."""

    messages: tuple[Message, ...]
    schema: Mapping[str, Any]
    """JSON schema of the answer."""
    max_tokens: int
    temperature: float
    policy_version: int = 0
    """Version of the policy that must answer, where the policy itself is asked."""
    affinity: str = ""
    """Requests that share it share a prefix, and go to the same engine."""


@dataclass(frozen=True)
class ChatAnswer:
    """What a model has said, and what was counted for it."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    notes: Mapping[str, float] = field(default_factory=dict)


class ChatFault(TraceError):  # noqa: N818 - a try that failed is no error of the program yet
    """One try failed.

    Args:
        cause: as metrics count it.
        retry_after_s: how long the server asks to be left alone; 0 where it does not say.
        is_final: whether another try would fail in the same way.
        is_billed: whether the model may have answered all the same, which servers charge for.
    """

    def __init__(
        self,
        message: str,
        cause: FailureCause,
        retry_after_s: float = 0.0,
        is_final: bool = False,
        is_billed: bool = False,
    ) -> None:
        super().__init__(message)
        self.cause: FailureCause = cause
        self.retry_after_s = retry_after_s
        self.is_final = is_final
        self.is_billed = is_billed

    def __reduce__(self) -> tuple[type[ChatFault], tuple[str, FailureCause, float, bool, bool]]:
        return type(self), (str(self), self.cause, self.retry_after_s, self.is_final, self.is_billed)


class ChatModel(Protocol):
    """Whoever serves chat requests."""

    identity: str
    """What makes two answers the same model's; a part of the cache key."""

    async def ask(self, request: ChatRequest, timeout_s: float) -> ChatAnswer:
        """One try.

        Raises:
            ChatFault: no answer came.
        """
        ...
