"""The annotator as the driver sees it: sends graded rollouts to the actor as they come, and waits within bounds.

Decides which rollouts are annotated (those whose span class is wanted and whose verdict is known) and how long a step
waits. It must not know who annotates, how replies become spans (`trace_rl.annotation`) or what spans are used for.

Invariants: no rollout is lost and none stops the run, nor does an actor that dies; an annotation is waited for no
longer than `annotator.timeout_s`, and `annotator.step_wait_s` once the last rollout that was begun with it is graded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
from ray import ObjectRef

from trace_rl.annotation import span_class_of
from trace_rl.annotation_audit import AnnotationAudit, AuditWatch
from trace_rl.batch import AnnotatedRollout, GradedRollout, SpanClass
from trace_rl.config.annotator import Annotator
from trace_rl.errors import WorkerError
from trace_rl.reply_checks import spans_fault
from trace_rl.workers.idle import IdleMeter
from trace_rl.workers.span_annotator import Annotation, AnnotationTask, Usage
from trace_rl.workers.streaming import Call, Gate, Unserved, stream
from trace_rl.workers.waiting import DEATHS, wait_for, worker_error

logger = logging.getLogger(__name__)

_GRACE_S = 10.0
"""The actor keeps its own deadline; it is taken for dead so long after that."""
_USAGE_S = 10.0
"""Deadline of the question what a step's annotations took; it is worth no more of a step's time."""


class RayAnnotator:
    """Implements `trace_rl.protocols.Annotator` over a `SpanAnnotator` actor."""

    def __init__(self, actor: Any, settings: Annotator) -> None:
        self._actor = actor
        self._settings = settings
        self._audit = AnnotationAudit()
        self._watch = AuditWatch(settings.audit)
        self._waited_s = 0.0
        self._told: set[str] = set()
        self._lock = threading.Lock()
        model = settings.backend.model
        self._gate = Gate(model.limits.concurrency if model else 2)
        self.idle = IdleMeter()

    def annotate(
        self, graded: Iterable[GradedRollout], span_classes: frozenset[SpanClass]
    ) -> Iterator[AnnotatedRollout]:
        """Annotated rollouts as they are done; those of other classes pass at once.

        Raises:
            WorkerError: the actor failed in a way of its own, which is a defect.
        """
        model = self._settings.backend.model
        open_calls: set[ObjectRef[list[Annotation]]] = set()
        call: Call[GradedRollout, Annotation] = Call(
            submit=partial(self._submit, open_calls),
            is_wanted=lambda item: is_wanted(item, span_classes),
            deadline_s=lambda num_served: self._settings.timeout_s + _GRACE_S,
            suspect="the annotator",
            doing="annotating",
            # rules are quick: what comes meanwhile travels together; models are slow: each rollout has its own call
            max_batch=1 if model else 32,
            gate=self._gate,
            drain_s=self._settings.step_wait_s,
        )
        graded_at: list[float] = []
        for item, answer in stream(_noting_the_end(graded, graded_at), call):
            annotated = _annotated(item, answer)
            if fault := spans_fault(annotated.spans, len(item.rollout.token_ids)):
                raise WorkerError(f"the annotator garbled its answer on {item.rollout.key}: {fault}; look at its log")
            self._audit.count(annotated)
            self._tell(item, answer)
            yield annotated
        if model:  # or later rollouts would queue behind those that nobody waits for
            for late in tuple(open_calls):
                ray.cancel(late)
        with self._lock:
            self._waited_s += time.monotonic() - graded_at[0] if graded_at else 0.0

    def _tell(self, item: GradedRollout, answer: Annotation | Unserved) -> None:
        """Say of each cause of failure once a run what was wrong; how often it is, metrics tell."""
        if isinstance(answer, Annotation) and answer.detail and answer.cause not in self._told:
            self._told.add(answer.cause)
            prompt_id, sample = item.rollout.key
            logger.warning("Sample %d of %s goes on without spans: %s", sample, prompt_id, answer.detail)

    def metrics(self) -> dict[str, float]:
        """What the annotations since the last call were worth (`trace_rl.annotation_audit`) and what they took."""
        with self._lock:
            waited_s, self._waited_s = self._waited_s, 0.0
        metrics = {**self._audit.read(), "annotation/wait_s": waited_s}
        for warning in self._watch.observe(metrics):
            logger.warning(warning)
        return {**metrics, **self._usage()}

    def _usage(self) -> dict[str, float]:
        if self._settings.backend.model is None:
            return {}
        try:
            usage: Usage = wait_for(self._actor.usage.remote(), _USAGE_S, "the annotator", "telling its usage")
        except WorkerError as error:  # figures are no reason to stop a run; a dead actor shows at the next step
            logger.warning("%s; the step's figures lack what was asked and spent", error)
            return {}
        for notice in usage.notices:
            logger.warning(notice)
        return dict(usage.metrics)

    def _submit(
        self, open_calls: set[ObjectRef[list[Annotation]]], items: Sequence[GradedRollout]
    ) -> Future[Sequence[Annotation]]:
        tasks = [AnnotationTask.of(item) for item in items]
        reference = self._actor.annotate.remote(tasks)
        called: Future[Sequence[Annotation]] = reference.future()
        open_calls.add(reference)
        called.add_done_callback(lambda _: open_calls.discard(reference))
        self.idle.until(called)
        outcome: Future[Sequence[Annotation]] = Future()
        called.add_done_callback(lambda done: _settle(outcome, done, len(items)))
        return outcome


def _settle(outcome: Future[Sequence[Annotation]], done: Future[Sequence[Annotation]], num_items: int) -> None:
    """Pass on how a call ended; where the actor has died, Ray starts another one, and these rollouts have no spans."""
    error = done.exception()
    if error is None:
        outcome.set_result(done.result())
    elif isinstance(error, DEATHS):
        detail = f"the annotator's actor has died ({worker_error(error, 'the annotator', 'annotating')})"
        outcome.set_result([Annotation((), "unreachable", detail=detail)] * num_items)
    else:
        outcome.set_exception(error)


def _noting_the_end(graded: Iterable[GradedRollout], ended_at: list[float]) -> Iterator[GradedRollout]:
    yield from graded
    ended_at.append(time.monotonic())


def _annotated(item: GradedRollout, answer: Annotation | Unserved) -> AnnotatedRollout:
    if answer is Unserved.SKIPPED:
        return AnnotatedRollout(item, (), "not_requested")
    if answer is Unserved.LATE:
        return AnnotatedRollout(item, (), "timeout")
    return AnnotatedRollout(item, answer.spans, answer.cause, answer.audit, reflection=answer.reflection)


def is_wanted(item: GradedRollout, span_classes: frozenset[SpanClass]) -> bool:
    """Whether the rollout's class is wanted; without a verdict (the grader failed) it has no class."""
    has_verdict = item.cause in ("graded", "truncated")
    return has_verdict and bool(item.rollout.token_ids) and span_class_of(item) in span_classes
