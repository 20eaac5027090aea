"""Rollouts on disk as a run leaves them, written by the journal; and three answers to one sum, worked out by hand."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from trace_rl.batch import (
    AnnotatedRollout,
    FinishReason,
    GradeCause,
    GradedRollout,
    GroupMember,
    Prompt,
    Rollout,
    RoutedRollout,
    TrainingBatch,
    TrainingSequence,
)
from trace_rl.config.roles import Logging, Model
from trace_rl.launch.display import Display
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.model_files import EMBEDDED, load_tokenizer, resolve_model
from trace_rl.launch.run_folder import RunFolder

SUM = Prompt(
    "sum", "Start with 20. Step 1: subtract 7. Step 2: add 9.", "22",
    "Step 1: 20 - 7 = 13\nStep 2: 13 + 9 = 22\n\\boxed{22}",
)  # fmt: skip
SLIPPED = "Step 1: 20 - 7 = 14\nStep 2: 14 + 9 = 23\n\\boxed{23}"
"""Wrong: 14. As many tokens as the solution: 11 + 11 + 4 and the end of sequence."""
OFF_FORM = "13 + 9 = 23"
"""Wrong, but no line that the task's rule reads, so it marks nothing: 7 tokens and the end of sequence."""


def graded(
    text: str, sample: int, reward: float, cause: GradeCause = "graded", finish_reason: FinishReason = "stop"
) -> GradedRollout:
    """An answer to SUM in the tokens of the embedded model."""
    tokenizer = load_tokenizer(resolve_model(Model(path=EMBEDDED)))
    token_ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * (finish_reason == "stop")
    logprobs, versions = -np.ones(len(token_ids), dtype=np.float32), np.zeros(len(token_ids), dtype=np.int64)
    rollout = Rollout(SUM, sample, (), tuple(token_ids), logprobs, finish_reason, versions, text)
    return GradedRollout(rollout, reward, cause)


def unrouted(item: GradedRollout) -> RoutedRollout:
    annotated = AnnotatedRollout(item, (), "not_requested")
    return RoutedRollout(GroupMember(annotated, (annotated,)), 0.0, ())


def write_rollouts(folder: Path, step: int, rollouts: Sequence[RoutedRollout]) -> None:
    """As a run would, at one step."""
    folder.mkdir(parents=True, exist_ok=True)
    display = Display(Console(file=io.StringIO()), num_steps=10)
    journal = RunJournal(RunFolder(folder), Logging(rollouts_every=1, rollouts_per_step=100), display, [])
    journal.log_rollouts(step, rollouts, TrainingBatch(step, tuple(map(_sequence, rollouts))))


def _sequence(item: RoutedRollout) -> TrainingSequence:
    """What the learner would get: only the arrays that are written down matter here."""
    none, index = np.zeros(0), np.zeros(0, dtype=np.int64)
    token_ids = item.member.rollout.token_ids
    per_token = np.zeros(len(token_ids))
    return TrainingSequence(
        key=item.key,
        prompt_token_ids=(1, 2),
        token_ids=token_ids,
        rollout_logprobs=none,
        staleness=index,
        advantages=per_token,
        pg_weight=per_token,
        route_positions=index,
        route_index=index,
        route_weight=none,
        teacher_row=index,
        teacher_hidden=np.zeros((0, 0)),
    )
