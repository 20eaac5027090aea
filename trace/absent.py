"""Stand-ins for what a run goes without: roles of a method without routes refuse any real work, a ledger forgets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from trace_rl.batch import AnnotatedRollout, GradedRollout, SpanClass, TeacherRequest, TeacherRows
from trace_rl.protocols import Fate, Mark, StoredFile


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


class AbsentLedger:
    """Nobody wants to know what becomes of the prompts."""

    def note(self, fate: Fate, step: int, prompts: Mapping[str, str]) -> None:
        return None

    def mark(self, mark: Mark, step: int) -> None:
        return None

    def settle(self) -> None:
        return None
