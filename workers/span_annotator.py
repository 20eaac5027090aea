"""The annotator's actor: cuts responses into segments, asks whoever annotates, and turns replies into token spans.

Invariant: a rollout that cannot be annotated comes back without spans and with the cause; it touches no other one.
This module must not know which rollouts are wanted, what spans are used for, or how a model is reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import SecretStr

from trace_rl.annotation import (
    AnnotationReply,
    AnnotationRequest,
    AnnotatorBackend,
    Answer,
    readable_reflection,
    resolve,
    span_class_of,
)
from trace_rl.annotation_audit import rule_audit
from trace_rl.annotation_prompts import PROMPT_VERSION
from trace_rl.annotators import Api, Frozen, LanguageModel, Oracle, Parts
from trace_rl.batch import AnnotationCause, GradedRollout, Prompt, Span, SpanClass
from trace_rl.config.annotator import Annotator
from trace_rl.errors import AnnotationError
from trace_rl.protocols import ErrorRule
from trace_rl.rule_annotators import recording_line, rule_reply
from trace_rl.segments import TokenText, decode, read_tokens, segment
from trace_rl.workers import life
from trace_rl.workers.annotation_cache import AnswerCache
from trace_rl.workers.chat import ChatModel
from trace_rl.workers.life import new_life
from trace_rl.workers.model_annotator import ModelAnnotator, Telling
from trace_rl.workers.polite_chat import PoliteChat
from trace_rl.workers.token_reader import TokenReader

NO_KEY = SecretStr("")


class AnnotationTask(NamedTuple):
    """What the actor needs of one rollout."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """[time] the whole response."""
    num_text_tokens: int
    """Response tokens without the end-of-sequence token."""
    span_class: SpanClass
    policy_version: int

    @classmethod
    def of(cls, item: GradedRollout) -> AnnotationTask:
        """The task that a graded rollout with a verdict makes."""
        rollout = item.rollout
        num_text_tokens = len(rollout.token_ids) - (rollout.finish_reason == "stop")  # the last is end-of-sequence
        return cls(rollout.prompt, rollout.token_ids, num_text_tokens, span_class_of(item), rollout.newest_version)


@dataclass(frozen=True)
class Annotation:
    """The actor's answer to one task; `detail` says why there is none where `cause` is not "annotated"."""

    spans: tuple[Span, ...]
    cause: AnnotationCause
    audit: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    reflection: str = ""


class Usage(NamedTuple):
    """What asking a model took since the last look, and what a user should hear of it."""

    metrics: Mapping[str, float]
    notices: Sequence[str]


@dataclass(frozen=True)
class Surroundings:
    """What the actor is given of the run it works for."""

    types: Mapping[SpanClass, Mapping[str, str]]
    """Closed lists of types by class."""
    seed: int
    run: str
    """Names the run in the ledger of spending."""
    cache_path: str
    """File of stored answers; read only where a model is asked."""
    key: SecretStr = NO_KEY
    """Of the API; printed as asterisks wherever it turns up."""
    asks_reflections: bool = False
    """Whether a teacher reads what models say of wrong responses."""
    engines: tuple[Any, ...] = ()
    """Actor handles of the engines that annotate."""
    reader: TokenReader | None = None
    """Tokenizer of the model that is asked, where it is known and not the policy's."""


class SpanAnnotator:
    """Annotates rollouts; a plain class that Ray makes an actor with many calls open at once.

    Args:
        settings: who annotates, and how.
        rule: the task's own or the equation rule.
    """

    def __init__(
        self, tokenizer: TokenReader, settings: Annotator, rule: ErrorRule, surroundings: Surroundings
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._rule = rule
        self._surroundings = surroundings
        self._chats: list[PoliteChat] = []
        self._notices: list[str] = []
        self._is_recording_broken = False
        parts = Parts(rule, surroundings.seed, settings.coverage_cap, self._ask)
        self._backend: AnnotatorBackend = settings.backend.build(parts)
        self._is_compared = settings.audit.compare_with_rule and not isinstance(settings.backend, Oracle)
        life.begin(new_life())

    async def ready(self) -> bool:
        return True

    async def annotate(self, tasks: Sequence[AnnotationTask]) -> list[Annotation]:
        """Annotations in order; a task that fails is marked and does not touch the others.

        Cancel the call where they are not waited for any more: nothing else is sent on their behalf.
        """
        return list(await asyncio.gather(*map(self._annotate_one, tasks)))

    async def usage(self) -> Usage:
        """What the models were asked since the last call; nothing where none is."""
        metrics: dict[str, float] = {}
        notices, self._notices = self._notices, []
        for chat in self._chats:
            metrics |= chat.usage()
            notices += chat.notices()
        return Usage(metrics, notices)

    async def _annotate_one(self, task: AnnotationTask) -> Annotation:
        try:
            token_text = read_tokens(self._tokenizer, task.token_ids[: task.num_text_tokens])
            request = annotation_request(task, token_text, self._settings, self._surroundings)
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await self._backend.answer(request)
            self._record(request, answer.reply)
            spans, audit = resolve(answer.reply, request, token_text, len(task.token_ids))
            reflection = readable_reflection(answer.reply, request)
        except AnnotationError as error:
            return Annotation((), error.cause, detail=str(error))
        except TimeoutError:
            detail = f"no annotation within {self._settings.timeout_s:g} s (annotator.timeout_s)"
            return Annotation((), "timeout", detail=detail)
        except Exception as error:  # a rule is foreign code; the rollout goes on without spans and is counted
            return Annotation((), "failed", detail=f"{type(error).__name__}: {error}")
        audit |= _notes(answer, reflection)
        audit["round_trip_errors"] += self._num_misread(task, token_text, spans)
        if self._is_compared:
            audit |= self._compare(request, token_text, spans)
        return Annotation(spans, "annotated", audit, reflection=reflection)

    def _record(self, request: AnnotationRequest, reply: AnnotationReply) -> None:
        """Append a reply to the recording, if there is one; a whole line at once, so that a kill leaves no half ones
        but the last."""
        path = self._settings.record_path
        if path is None or self._is_recording_broken:
            return
        try:
            with Path(path).expanduser().open("a", encoding="utf-8") as file:
                file.write(recording_line(request, reply))
        except OSError as error:
            self._is_recording_broken = True
            self._notices.append(
                f"Replies cannot be recorded in annotator.record_path {path} ({error}); none is any more"
            )

    def _num_misread(self, task: AnnotationTask, token_text: TokenText, spans: Sequence[Span]) -> int:
        """Spans whose tokens, decoded by themselves, do not give the text that the annotator pointed at."""
        misread = 0
        for span in spans:
            char_start, char_end = token_text.char_range(span.start, span.end)
            alone = decode(self._tokenizer, task.token_ids[span.start : span.end])
            misread += alone.strip() != token_text.text[char_start:char_end].strip()  # some drop a leading blank
        return misread

    def _compare(self, request: AnnotationRequest, token_text: TokenText, spans: Sequence[Span]) -> dict[str, float]:
        """How the spans agree with those of the rule, for information alone."""
        try:
            of_rule, _ = resolve(rule_reply(self._rule, request), request, token_text, request.num_tokens)
        except Exception:  # the rule is foreign code, and nothing depends on it here
            return {}
        return rule_audit(spans, of_rule, request.num_tokens, request.span_class)

    def _ask(self, settings: LanguageModel) -> AnnotatorBackend:
        given = self._surroundings
        reader = given.reader or self._tokenizer
        telling = Telling(self._settings.privileges, reader.count, reader.special_tokens())
        cache = AnswerCache(Path(given.cache_path))
        chat = PoliteChat(
            settings,
            self._chat(settings),
            cache,
            given.run,
            self._settings.timeout_s,
            PROMPT_VERSION,
            reader.count,
        )
        self._chats.append(chat)
        return ModelAnnotator(settings, chat, telling)

    def _chat(self, settings: LanguageModel) -> ChatModel:
        given = self._surroundings
        if isinstance(settings, Api):
            from trace_rl.workers.api_annotator import ApiChat

            return ApiChat(settings, given.key)
        from trace_rl.workers.engine_chat import EngineChat

        return EngineChat(given.engines, _identity(settings, given.run))


def annotation_request(
    task: AnnotationTask, token_text: TokenText, settings: Annotator, surroundings: Surroundings
) -> AnnotationRequest:
    """What an annotator is told about a task.

    Args:
        token_text: of the response without its end-of-sequence token.
    """
    return AnnotationRequest(
        prompt=task.prompt,
        span_class=task.span_class,
        segments=segment(token_text, settings.segmentation),
        types=surroundings.types[task.span_class],
        coverage_cap=settings.coverage_cap,
        num_tokens=len(task.token_ids),
        policy_version=task.policy_version,
        asks_reflection=surroundings.asks_reflections and task.span_class == "error",
    )


def _notes(answer: Answer, reflection: str) -> dict[str, float]:
    said = {"reflections": float(bool(answer.reply.reflection)), "reflections_kept": float(bool(reflection))}
    return {**answer.notes, **said}


def _identity(settings: LanguageModel, run: str) -> str:
    """Whose answers these are: those of a policy belong to its run, those of a fixed model to its files."""
    if isinstance(settings, Frozen):
        return f"frozen:{settings.path}:{settings.dtype}"
    return f"{settings.type}:{run}"
