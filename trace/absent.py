"""Stand-ins for the roles that a method without routes does not start; they refuse any real work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from trace_rl.batch import AnnotatedRollout, GradedRollout, SpanClass, TeacherRequest, TeacherRows
from trace_rl.protocols import StoredFile


class AbsentAnnotator:
    """Passes every rollout on without spans."""

    def annotate(
        self, graded: Iterable[GradedRollout], span_classes: frozenset[SpanClass]
    ) -> Iterator[AnnotatedRollout]:
        if span_classes:
            raise ValueError(f"span classes {sorted(span_classes)} were asked for, but this run has no annotator")
        for item in graded:
            yield AnnotatedRollout(item, (), "not_requested")

    def metrics(self) -> Mapping[str, float]:
        return {}


class AbsentTeacher:
    """Has nothing to score, to refresh or to save."""

    def refresh(self, step: int) -> bool:
        return False

    def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherRows]:
        if requests:
            raise ValueError(f"{len(requests)} teacher requests were made, but this run has no teacher")
        return []

    def save(self, path: Path) -> Mapping[str, StoredFile]:
        return {}

    def load(self, path: Path) -> None:
        return None
