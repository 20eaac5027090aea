"""The annotator: an actor that lets a rule annotate, and the driver's side of it.

Decides which rollouts are annotated (those whose span class is wanted and whose verdict is known), what happens when
an annotation fails or is late (the rollout goes on without spans), and what is counted. It must not know how segments
are cut (`trace_rl.segments`), how replies become spans (`trace_rl.annotation`) or what spans are used for.

Invariant: no rollout is lost and none stops the run; only a dead actor does.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from trace_rl.annotation import (
    AnnotationRequest,
    AnnotatorBackend,
    OracleBackend,
    readable_reflection,
    resolve,
    span_class_of,
)
from trace_rl.batch import AnnotatedRollout, AnnotationCause, GradedRollout, Prompt, Rollout, Span, SpanClass
from trace_rl.config.roles import Annotator
from trace_rl.protocols import ErrorRule
from trace_rl.segments import Detokenizer, read_tokens, segment
from trace_rl.workers.streaming import Call, Unserved, stream

logger = logging.getLogger(__name__)


class AnnotationTask(NamedTuple):
    """What the actor needs of one rollout."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """[time] the whole response."""
    num_text_tokens: int
    """Response tokens without the end-of-sequence token."""
    span_class: SpanClass


@dataclass(frozen=True)
class Annotation:
    """The actor's answer to one task; `detail` says why there is none where `cause` is "failed"."""

    spans: tuple[Span, ...]
    cause: AnnotationCause
    audit: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    reflection: str = ""


@dataclass(frozen=True)
class BackendDetokenizer:
    """A fast tokenizer's core alone: the actor needs neither transformers nor torch."""

    backend: Tokenizer

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.backend.id_to_token(token_id) for token_id in ids]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return str(self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens))


def detokenizer_of(tokenizer: Any) -> Detokenizer:
    """The part of a Hugging Face tokenizer that is sent to the actor."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return BackendDetokenizer(backend) if isinstance(backend, Tokenizer) else tokenizer


class OracleAnnotator:
    """Annotates batches of rollouts with a rule; a plain class that Ray makes an actor."""

    def __init__(self, tokenizer: Detokenizer, settings: Annotator, rule: ErrorRule) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._types = rule.types
        self._backend: AnnotatorBackend = OracleBackend(rule)

    def ready(self) -> bool:
        return True

    def annotate(self, tasks: Sequence[AnnotationTask]) -> list[Annotation]:
        """Annotations in order; a task that fails is marked and does not touch the others."""
        return [self._annotate_one(task) for task in tasks]

    def _annotate_one(self, task: AnnotationTask) -> Annotation:
        try:
            token_text = read_tokens(self._tokenizer, task.token_ids[: task.num_text_tokens])
            request = AnnotationRequest(
                task.prompt,
                task.span_class,
                segment(token_text, self._settings.segmentation),
                self._types,
                self._settings.coverage_cap,
            )
            reply = self._backend.reply(request)
            spans, audit = resolve(reply, request, token_text, len(task.token_ids))
            reflection = readable_reflection(reply, request)
        except Exception as error:  # a rule is foreign code; the rollout goes on without spans and is counted
            return Annotation((), "failed", detail=f"{type(error).__name__}: {error}")
        audit |= {"reflections": float(bool(reply.reflection)), "reflections_kept": float(bool(reflection))}
        return Annotation(spans, "annotated", audit, reflection=reflection)


class RayAnnotator:
    """Implements `trace_rl.protocols.Annotator` over an `OracleAnnotator` actor."""

    def __init__(self, actor: Any, settings: Annotator) -> None:
        self._actor = actor
        self._settings = settings
        self._counters = _Counters()

    def annotate(
        self, graded: Iterable[GradedRollout], span_classes: frozenset[SpanClass]
    ) -> Iterator[AnnotatedRollout]:
        """Annotated rollouts as they are done; those of other classes pass at once.

        Raises:
            WorkerError: the actor died.
        """
        call: Call[GradedRollout, Annotation] = Call(
            submit=self._submit,
            is_wanted=lambda item: _is_wanted(item, span_classes),
            deadline_s=lambda num_served: self._settings.timeout_s,
            suspect="the annotator",
            doing="annotating",
            max_in_flight=2,  # one at work, one that arrives meanwhile
        )
        for item, answer in stream(graded, call):
            if answer is Unserved.SKIPPED:
                yield AnnotatedRollout(item, (), "not_requested")
                continue
            annotation = Annotation((), "timeout") if isinstance(answer, Unserved) else answer
            self._counters.count(item.rollout, annotation)
            yield AnnotatedRollout(
                item, annotation.spans, annotation.cause, annotation.audit, reflection=annotation.reflection
            )

    def metrics(self) -> dict[str, float]:
        """Counters since the last call: coverage before and after the cap, empty replies, failures, types."""
        return self._counters.read()

    def _submit(self, items: Sequence[GradedRollout]) -> Future[Sequence[Annotation]]:
        future: Future[Sequence[Annotation]] = self._actor.annotate.remote([_task(item) for item in items]).future()
        return future


def _is_wanted(item: GradedRollout, span_classes: frozenset[SpanClass]) -> bool:
    """Whether the rollout's class is wanted; without a verdict (the grader failed) it has no class."""
    has_verdict = item.cause in ("graded", "truncated")
    return has_verdict and bool(item.rollout.token_ids) and span_class_of(item) in span_classes


def _task(item: GradedRollout) -> AnnotationTask:
    rollout = item.rollout
    num_text_tokens = len(rollout.token_ids) - (rollout.finish_reason == "stop")  # the last one is end-of-sequence
    return AnnotationTask(rollout.prompt, rollout.token_ids, num_text_tokens, span_class_of(item))


class _Counters:
    """What happened since the last read; the order in which rollouts come does not change a digit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._causes: Counter[str] = Counter()
        self._types: Counter[str] = Counter()
        self._audits: defaultdict[str, float] = defaultdict(float)
        self._coverage_before: list[float] = []
        self._coverage: list[float] = []
        self._num_empty = 0

    def count(self, rollout: Rollout, annotation: Annotation) -> None:
        with self._lock:
            self._causes[annotation.cause] += 1
            is_first_failure = annotation.cause == "failed" and self._causes["failed"] == 1
            if annotation.cause == "annotated":
                self._count_spans(annotation, len(rollout.token_ids))
        if is_first_failure:
            logger.warning("Rollout %s goes on without spans: %s", rollout.key, annotation.detail)

    def read(self) -> dict[str, float]:
        with self._lock:
            metrics = {
                "annotation/annotated": float(self._causes["annotated"]),
                "annotation/failed": float(self._causes["failed"]),
                "annotation/timeouts": float(self._causes["timeout"]),
                "annotation/round_trip_errors": self._audits["round_trip_errors"],
                "annotation/out_of_range": self._audits["out_of_range"],
                "annotation/unknown_types": self._audits["unknown_types"],
                "annotation/reflections": self._audits["reflections_kept"],
                "annotation/reflections_dropped": self._audits["reflections"] - self._audits["reflections_kept"],
            }
            if self._coverage:
                num_annotated = len(self._coverage)
                metrics["annotation/coverage_before_cap_frac"] = math.fsum(self._coverage_before) / num_annotated
                metrics["annotation/coverage_frac"] = math.fsum(self._coverage) / num_annotated
                metrics["annotation/empty_frac"] = self._num_empty / num_annotated
            metrics |= {f"annotation/types/{name}": float(count) for name, count in sorted(self._types.items())}
            self._reset()
        return metrics

    def _count_spans(self, annotation: Annotation, num_tokens: int) -> None:
        self._num_empty += not annotation.spans
        self._types.update(span.type for span in annotation.spans)
        self._coverage_before.append(annotation.audit["tokens_before_cap"] / num_tokens)
        self._coverage.append(annotation.audit["tokens_after_cap"] / num_tokens)
        for name in ("round_trip_errors", "out_of_range", "unknown_types", "reflections", "reflections_kept"):
            self._audits[name] += annotation.audit[name]
