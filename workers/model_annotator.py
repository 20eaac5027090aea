"""A language model as an annotator: tells it what a response is, reads what it says, and asks for one repair.

Invariant: one bad answer costs no more than its spans. This module must not know how a model is reached, what asking
costs (`trace_rl.workers.polite_chat`), or what spans are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from trace_rl.annotation import AnnotationRequest, Answer
from trace_rl.annotation_prompts import Shown, render, repair_messages, schema
from trace_rl.annotation_reading import read_reply, visible_spans
from trace_rl.annotators import LanguageModel, SelfAnnotation
from trace_rl.config.annotator import Privilege
from trace_rl.errors import AnnotationError
from trace_rl.workers.chat import ChatRequest
from trace_rl.workers.polite_chat import PoliteChat


@dataclass(frozen=True)
class Telling:
    """What a model is told beside the request, and how that is written."""

    privileges: Collection[Privilege]
    count: Callable[[str], int]
    """Tokens of a text."""
    special_tokens: Collection[str]
    """Of the model that reads it, as far as they are known."""


class ModelAnnotator:
    """An `AnnotatorBackend` over a chat."""

    def __init__(self, settings: LanguageModel, chat: PoliteChat, telling: Telling) -> None:
        self._settings = settings
        self._chat = chat
        self._telling = telling

    async def answer(self, request: AnnotationRequest) -> Answer:
        """See `AnnotatorBackend.answer`."""
        settings = self._settings
        shown = self._shown(request)
        asked = ChatRequest(
            messages=shown.messages,
            schema=schema(request, settings.max_spans),
            max_tokens=settings.max_reply_tokens,
            temperature=settings.temperature,
            policy_version=request.policy_version if isinstance(settings, SelfAnnotation) else 0,
            affinity=request.prompt.prompt_id,
        )
        said = await self._chat.ask(asked)
        num_repairs = 0
        try:
            reply, num_malformed = read_reply(said.text)
        except AnnotationError as error:
            if not settings.repair:
                raise
            num_repairs = 1
            again = replace(asked, messages=repair_messages(shown, said.text, error))
            reply, num_malformed = read_reply((await self._chat.ask(again)).text)
        reply, num_hidden = visible_spans(reply, shown.hidden)
        notes = {
            "malformed_spans": num_malformed,
            "hidden_spans": num_hidden,
            "elided_segments": len(shown.hidden),
            "repairs": num_repairs,
        }
        return Answer(reply, {name: float(count) for name, count in notes.items()})

    def _shown(self, request: AnnotationRequest) -> Shown:
        telling, limit = self._telling, self._settings.max_prompt_tokens
        shown = render(
            request, self._settings.max_spans, telling.privileges, limit, telling.count, telling.special_tokens
        )
        if shown.hidden:
            self._chat.say_once(
                "elided",
                f"A prompt of {request.prompt.prompt_id} is longer than {limit} tokens "
                f"(annotator.backend.max_prompt_tokens); segments {shown.hidden.start} to {shown.hidden.stop - 1} of "
                f"{len(request.segments)} are not shown, as in others of that length",
            )
        return shown
