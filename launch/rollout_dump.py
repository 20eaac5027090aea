"""Rollouts on disk: one JSON object a line, written by a run, read back by who annotates offline.

What is read back is enough to annotate a rollout again; it has neither prompt ids nor log-probs, and is not trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trace_rl.batch import GradedRollout, Prompt, Rollout, RoutedRollout, Span, TrainingSequence
from trace_rl.errors import DataError


@dataclass(frozen=True)
class DumpedRollout:
    """A rollout that was read back."""

    graded: GradedRollout
    spans: tuple[Span, ...]
    """What the run's own annotator marked."""


def record_of(item: RoutedRollout, sequence: TrainingSequence) -> dict[str, Any]:
    """One rollout as the dump keeps it: what was written, what it earned, and what was done with each token."""
    graded = item.member.graded
    rollout = graded.rollout
    return {
        "prompt_id": rollout.prompt.prompt_id,
        "sample": rollout.sample,
        "policy_version": rollout.policy_version,
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
        "routes": [
            {"route": tokens.route, "weight": tokens.weight, "positions": tokens.positions.tolist()}
            for tokens in item.routed
        ],
    }


def dump_files(path: Path) -> list[Path]:
    """The files of a dump: one file, or those of a run folder or its folder of rollouts, in the order of the steps.

    Raises:
        DataError: there is none.
    """
    if path.is_file():
        return [path]
    files = sorted((path / "rollouts").glob("*.jsonl")) or sorted(path.glob("step-*.jsonl"))
    if not files:
        raise DataError(
            f"{path} holds no rollouts; give a run folder (logging.rollouts_every decides which steps are kept), or a "
            "JSONL file of its folder rollouts/"
        )
    return files


def read_dump(files: Sequence[Path]) -> list[DumpedRollout]:
    """The rollouts of several files in order.

    Raises:
        DataError: a line is not a rollout that a run has written; names file and line.
    """
    found = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(_rollout_of(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{file}:{number} is not a rollout as trace-rl writes them ({type(error).__name__}: {error}); "
                    "remove the line, or record the rollouts again with this version"
                ) from error
    return found


def _rollout_of(record: dict[str, Any]) -> DumpedRollout:
    prompt = Prompt(
        record["prompt_id"], record["question"], record["answer"], record["solution"], dict(record["metadata"])
    )
    token_ids = tuple(map(int, record["token_ids"]))
    rollout = Rollout(
        prompt=prompt,
        sample=int(record["sample"]),
        prompt_token_ids=(),
        token_ids=token_ids,
        rollout_logprobs=np.full(len(token_ids), np.nan, dtype=np.float32),
        finish_reason=record["finish_reason"],
        policy_version=int(record["policy_version"]),
        text=record["response"],
    )
    graded = GradedRollout(rollout, float(record["reward"]), record["grade_cause"], record["feedback"])
    spans = tuple(
        Span(int(span["start"]), int(span["end"]), span["class"], span["type"], float(span["importance"]))
        for span in record["spans"]
    )
    return DumpedRollout(graded, spans)
