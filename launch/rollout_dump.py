"""Rollouts on disk: one JSON object a line, written by a run, read back by who annotates offline.

What is read back is enough to annotate a rollout again; it has neither prompt ids nor log-probs, and is not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from trace_rl.batch import (
    Candidates,
    FinishReason,
    GradeCause,
    GradedRollout,
    Prompt,
    Rollout,
    RoutedRollout,
    RouteFigures,
    Span,
    SpanClass,
    TokenFigures,
    TrainingSequence,
)
from trace_rl.errors import DataError

RecordT = TypeVar("RecordT", bound=BaseModel)

_FOLDER = "rollouts"  # of a run folder


@dataclass(frozen=True)
class DumpedRollout:
    """A rollout that was read back."""

    graded: GradedRollout
    spans: tuple[Span, ...]
    """What the run's own annotator marked."""


class SpanRecord(BaseModel):
    """A span in a record."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    start: int
    end: int
    span_class: SpanClass = Field(alias="class")
    type: str
    importance: float


class _Record(BaseModel):
    """What is read of a line; the rest of it is for people."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    prompt_id: str
    sample: int
    token_versions: tuple[tuple[int, PositiveInt], ...] = ()
    """Runs of tokens that weights of one version wrote: version and number of tokens."""
    policy_version: int | None = None
    """Of every token, in dumps that were written before versions were kept for each of them."""
    question: str
    answer: str
    solution: str
    metadata: dict[str, str]
    response: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    reward: float
    grade_cause: GradeCause
    feedback: str
    spans: tuple[SpanRecord, ...]

    @model_validator(mode="after")
    def _every_token_has_a_version(self) -> _Record:
        count = sum(count for _, count in self._version_runs)
        if count != len(self.token_ids):
            raise ValueError(f"token_versions has {count} tokens, but token_ids has {len(self.token_ids)}")
        return self

    @property
    def _version_runs(self) -> tuple[tuple[int, int], ...]:
        if self.policy_version is None or not self.token_ids:
            return self.token_versions
        return ((self.policy_version, len(self.token_ids)),)

    def rollout(self) -> DumpedRollout:
        """The rollout without what is not recorded."""
        rollout = Rollout(
            prompt=Prompt(self.prompt_id, self.question, self.answer, self.solution, self.metadata),
            sample=self.sample,
            prompt_token_ids=(),
            token_ids=self.token_ids,
            rollout_logprobs=np.full(len(self.token_ids), np.nan, dtype=np.float32),
            finish_reason=self.finish_reason,
            token_versions=np.concatenate(
                [np.zeros(0, dtype=np.int64), *(np.full(count, version) for version, count in self._version_runs)]
            ),
            text=self.response,
        )
        spans = tuple(Span(item.start, item.end, item.span_class, item.type, item.importance) for item in self.spans)
        return DumpedRollout(GradedRollout(rollout, self.reward, self.grade_cause, self.feedback), spans)


def record_of(item: RoutedRollout, sequence: TrainingSequence, figures: TokenFigures | None = None) -> dict[str, Any]:
    """One rollout as the dump keeps it: what was written, what it earned, and what was done with each token.

    Log-probs, entropies and divergences are in nats; null stands for what is not known, and lists that were not
    measured are left out.
    """
    graded = item.member.graded
    rollout = graded.rollout
    return {
        "prompt_id": rollout.prompt.prompt_id,
        "sample": rollout.sample,
        "token_versions": _version_runs(rollout.token_versions),
        "question": rollout.prompt.question,
        "answer": rollout.prompt.answer,
        "solution": rollout.prompt.solution,
        "metadata": dict(rollout.prompt.metadata),
        "response": rollout.text,
        "token_ids": list(rollout.token_ids),
        "finish_reason": rollout.finish_reason,
        "reward": graded.reward,
        "grade_cause": graded.cause,
        "advantage": item.advantage,
        "feedback": graded.feedback,
        "annotation_cause": item.member.annotated.cause,
        "reflection": item.member.annotated.reflection,
        "spans": [
            {
                "start": span.start,
                "end": span.end,
                "class": span.span_class,
                "type": span.type,
                "importance": span.importance,
            }
            for span in item.member.annotated.spans
        ],
        "token_advantages": sequence.advantages.tolist(),
        "pg_weight": sequence.pg_weight.tolist(),
        "rollout_logprobs": _numbers(sequence.rollout_logprobs),
        **_token_figures(figures),
        "routes": [
            {
                "route": tokens.route,
                "weight": tokens.weight,
                "positions": tokens.positions.tolist(),
                "token_weights": _numbers(sequence.route_weight[sequence.route_index == tokens.route]),
                **_route_figures(figures, tokens.route),
            }
            for tokens in item.routed
        ],
    }


def _token_figures(figures: TokenFigures | None) -> dict[str, Any]:
    if figures is None:
        return {}
    return {
        "policy_logprobs": _numbers(figures.policy_logprobs),
        "policy_entropy": _numbers(figures.policy_entropy),
    }


def _route_figures(figures: TokenFigures | None, route: int) -> dict[str, Any]:
    """Of the tokens of a route, in the order of their positions."""
    found: Sequence[RouteFigures] = () if figures is None else figures.routes
    return {
        name: value
        for item in found
        if item.statistics.route == route
        for name, value in (
            ("divergence", _numbers(item.statistics.divergence)),
            ("policy_logprobs", _numbers(item.statistics.policy_logprobs)),
            ("teacher_logprobs", _numbers(item.statistics.teacher_logprobs)),
            ("policy_candidates", _candidates(item.policy)),
            ("teacher_candidates", _candidates(item.teacher)),
        )
    }


def _candidates(candidates: Candidates) -> list[list[tuple[int, float | None]]]:
    return [
        list(zip(ids.tolist(), _numbers(logprobs), strict=True))
        for ids, logprobs in zip(candidates.token_ids, candidates.logprobs, strict=True)
    ]


def _numbers(values: Float[np.ndarray, " row"]) -> list[float | None]:
    """With the digits that a float16 has and some more: they are looked at, not computed with."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.tolist()]


def _version_runs(versions: Int[np.ndarray, " time"]) -> list[list[int]]:
    return [[version, len(list(run))] for version, run in groupby(versions.tolist())]


def run_folder_of(path: Path) -> Path:
    """The folder of the run whose dump this is, or that of a file which belongs to none."""
    folder = (path.parent if path.is_file() else path).resolve()
    return folder.parent if folder.name == _FOLDER and not (folder / _FOLDER).is_dir() else folder


def config_of(path: Path) -> Path:
    """The configuration of the run whose dump this is.

    Raises:
        DataError: there are no rollouts, or no configuration beside them.
    """
    dump_files(path)
    file = run_folder_of(path) / "config.yaml"
    if not file.is_file():
        raise DataError(
            f"{file} does not exist, so nothing is known of the run that wrote these rollouts; name its YAML files "
            f"behind {path}"
        )
    return file


def dump_files(path: Path) -> list[Path]:
    """The files of a dump: one file, or those of a run folder or its folder of rollouts, in the order of the steps.

    Raises:
        DataError: there is none.
    """
    if path.is_file():
        return [path]
    files = sorted((path / _FOLDER).glob("step-*.jsonl")) or sorted(path.glob("step-*.jsonl"))
    if not files:
        found = "holds no rollouts" if path.is_dir() else "does not exist"
        raise DataError(
            f"{path} {found}; give a run folder (logging.rollouts_every decides which steps are kept), or a JSONL file "
            "of its folder rollouts/"
        )
    return files


def read_dump(files: Sequence[Path]) -> list[DumpedRollout]:
    """The rollouts of several files in order.

    Raises:
        DataError: a line is not a rollout that a run has written; names file and line.
    """
    return [record.rollout() for file in files for record in read_lines(file, _Record)]


def read_lines(file: Path, schema: type[RecordT]) -> list[RecordT]:
    """What `schema` reads of each rollout of a file.

    Raises:
        DataError: a line is not a rollout that a run has written; names file and line.
    """
    found = []
    *lines, last = file.read_bytes().split(b"\n")  # not splitlines: a response may hold other ends of lines
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        try:
            found.append(schema.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise DataError(
                f"{file}:{number} is not a rollout as trace-rl writes them ({place}: {first['msg']}); remove the "
                "line, or record the rollouts again with this version"
            ) from error
    return found
