"""The journal: one JSON line a record, stage times apart, stored rollouts with their spans; and the trackers."""

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from trace_rl.batch import (
    AnnotatedRollout,
    GradedRollout,
    GroupMember,
    Prompt,
    Rollout,
    RoutedRollout,
    RoutedTokens,
    Span,
    TrainingBatch,
    TrainingSequence,
)
from trace_rl.config.roles import Logging
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError
from trace_rl.launch.display import Display
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.run_folder import RunFolder
from trace_rl.launch.trackers import check_installed, open_trackers

HELDOUT = {
    "heldout/pass_at_1": 0.25,
    "heldout/samples": 64.0,
    "heldout/length_mean_tokens": 30.0,
    "heldout/truncated_frac": 0.0,
}


class ListTracker:
    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.records.append((step, dict(metrics)))

    def close(self) -> None:
        self.is_closed = True


def make_journal(folder: Path, tracker: ListTracker | None = None, **logging: Any) -> RunJournal:
    display = Display(Console(file=io.StringIO()), num_steps=10)
    return RunJournal(RunFolder(folder), Logging(**logging), display, [tracker] if tracker else [])


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_rollout(sample: int) -> RoutedRollout:
    rollout = Rollout(
        prompt=Prompt("p", "größer?", "7", "4 + 3 = 7", {"task": "sums"}),
        sample=sample,
        prompt_token_ids=(1, 2),
        token_ids=(5, 6, 7),
        rollout_logprobs=np.array([-1.0, -2.0, -0.5], dtype=np.float32),
        finish_reason="stop",
        token_versions=np.array([3, 4, 4]),
        text="größer",
    )
    annotated = AnnotatedRollout(GradedRollout(rollout, 1.0, "graded"), (Span(1, 3, "key", "arith"),), "annotated")
    return RoutedRollout(GroupMember(annotated, (annotated,)), 0.5, (RoutedTokens(0, np.array([1, 2]), 0.375),))


def batch_of(*routed: RoutedRollout) -> TrainingBatch:
    """What the learner would get: only the arrays that are written down matter here."""
    none, index = np.zeros(0), np.zeros(0, dtype=np.int64)
    return TrainingBatch(
        0,
        tuple(
            TrainingSequence(
                key=item.key,
                prompt_token_ids=(1, 2),
                token_ids=item.member.rollout.token_ids,
                rollout_logprobs=none,
                staleness=index,
                advantages=np.array([0.5, 0.5, 0.75]),
                pg_weight=np.array([1.0, 0.25, 0.25]),
                route_positions=index,
                route_index=index,
                route_weight=none,
                teacher_row=index,
                teacher_hidden=np.zeros((0, 0)),
            )
            for item in routed
        ),
    )


def test_a_step_is_one_line_with_its_stage_times(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    with journal.stage("rollout"):
        time.sleep(0.02)
    with journal.stage("learner"):
        pass
    journal.log_step(3, {"reward/mean": 0.5})
    (record,) = records(tmp_path)
    assert (record["step"], record["reward/mean"]) == (3, 0.5)
    assert record["time/rollout_s"] >= 0.02 > record["time/learner_s"] >= 0.0
    assert record["time/step_s"] == pytest.approx(record["time/rollout_s"] + record["time/learner_s"])


def test_stage_times_belong_to_the_record_that_follows_them(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    with journal.stage("evaluation"):
        pass
    journal.log_evaluation(0, HELDOUT)
    with journal.stage("rollout"):
        pass
    journal.log_step(0, {})
    evaluation, step = records(tmp_path)
    assert "time/evaluation_s" in evaluation
    assert {name for name in step if name.startswith("time/")} == {"time/rollout_s", "time/step_s"}


def test_the_time_of_a_stage_that_failed_is_known(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    with pytest.raises(RuntimeError, match="broken"), journal.stage("teacher"):
        raise RuntimeError("broken")
    journal.log_step(0, {})
    assert "time/teacher_s" in records(tmp_path)[0]


def test_two_runs_differ_in_names_that_end_in_seconds_only(tmp_path: Path) -> None:
    lines = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        journal = make_journal(tmp_path / str(number))
        for step in range(3):
            with journal.stage("rollout"):
                time.sleep(0.002 * number)
            journal.log_step(step, {"reward/mean": 0.1 * step})
        rows = records(tmp_path / str(number))
        lines.append([{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows])
    assert lines[0] == lines[1]
    assert lines[0][2] == {"step": 2, "reward/mean": 0.2}


def test_records_are_on_disk_at_once_and_appended(tmp_path: Path) -> None:
    make_journal(tmp_path).log_step(0, {"a": 1.0})
    resumed = make_journal(tmp_path)
    resumed.log_step(1, {"a": 2.0})
    assert [record["a"] for record in records(tmp_path)] == [1.0, 2.0]


def test_evaluations_are_kept_for_the_summary(tmp_path: Path) -> None:
    journal = make_journal(tmp_path)
    journal.log_evaluation(0, HELDOUT)
    journal.log_evaluation(20, {**HELDOUT, "heldout/pass_at_1": 0.75})
    assert journal.evaluations == [(0, 0.25, 64), (20, 0.75, 64)]


def test_scores_are_told_without_reading_a_long_run_again(tmp_path: Path) -> None:
    make_journal(tmp_path).log_evaluation(0, HELDOUT)
    resumed = make_journal(tmp_path)
    assert resumed.score_at(0) == 0.25
    resumed.log_evaluation(20, {**HELDOUT, "heldout/pass_at_1": 0.75})
    (tmp_path / "metrics.jsonl").unlink()
    assert (resumed.score_at(0), resumed.score_at(10), resumed.score_at(20)) == (0.25, None, 0.75)


def test_a_resumed_run_still_knows_the_accuracy_of_the_base_model(tmp_path: Path) -> None:
    first = make_journal(tmp_path)
    first.log_evaluation(0, HELDOUT)
    first.log_step(0, {})
    resumed = make_journal(tmp_path)
    resumed.log_evaluation(20, {**HELDOUT, "heldout/pass_at_1": 0.75})
    assert resumed.evaluations == [(0, 0.25, 64), (20, 0.75, 64)]


def test_stored_rollouts_show_what_was_routed(tmp_path: Path) -> None:
    make_journal(tmp_path, rollouts_every=2).log_rollouts(4, [make_rollout(0)], batch_of(make_rollout(0)))
    text = (tmp_path / "rollouts" / "step-000004.jsonl").read_text(encoding="utf-8")
    assert "größer" in text
    assert json.loads(text) == {
        "prompt_id": "p",
        "sample": 0,
        "token_versions": [[3, 1], [4, 2]],
        "question": "größer?",
        "answer": "7",
        "solution": "4 + 3 = 7",
        "metadata": {"task": "sums"},
        "response": "größer",
        "token_ids": [5, 6, 7],
        "finish_reason": "stop",
        "reward": 1.0,
        "grade_cause": "graded",
        "advantage": 0.5,
        "feedback": "",
        "annotation_cause": "annotated",
        "reflection": "",
        "spans": [{"start": 1, "end": 3, "class": "key", "type": "arith", "importance": 1.0}],
        "pg_weight": [1.0, 0.25, 0.25],
        "token_advantages": [0.5, 0.5, 0.75],
        "rollout_logprobs": [],
        "routes": [{"route": 0, "weight": 0.375, "positions": [1, 2], "token_weights": []}],
    }


def test_rollouts_are_stored_every_few_steps_and_a_few_at_a_time(tmp_path: Path) -> None:
    journal = make_journal(tmp_path, rollouts_every=2, rollouts_per_step=3)
    for step in range(5):
        rollouts = [make_rollout(sample) for sample in range(8)]
        journal.log_rollouts(step, rollouts, batch_of(*rollouts))
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [file.name for file in files] == ["step-000000.jsonl", "step-000002.jsonl", "step-000004.jsonl"]
    assert {len(file.read_text(encoding="utf-8").splitlines()) for file in files} == {3}


def test_no_rollouts_are_stored_when_that_is_off(tmp_path: Path) -> None:
    make_journal(tmp_path, rollouts_every=0).log_rollouts(0, [make_rollout(0)], batch_of(make_rollout(0)))
    assert not (tmp_path / "rollouts").exists()


def test_trackers_see_what_the_file_holds(tmp_path: Path) -> None:
    tracker = ListTracker()
    journal = make_journal(tmp_path, tracker)
    journal.log_evaluation(0, HELDOUT)
    journal.log_step(0, {"reward/mean": 0.5})
    assert [{"step": step, **record} for step, record in tracker.records] == records(tmp_path)
    journal.close()
    assert tracker.is_closed


def config_with(**logging: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, "logging": logging})


def test_without_trackers_nothing_is_opened(tmp_path: Path) -> None:
    assert open_trackers(config_with(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an optional package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(config_with(tensorboard=True), tmp_path)
    tracker.log(0, {"reward/mean": 0.5})
    tracker.log(1, {"reward/mean": 0.75})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(0, 0.5), (1, 0.75)]


@pytest.mark.parametrize(
    ("module", "logging", "expected"),
    [
        ("wandb", {"wandb_project": "p"}, r"logging\.wandb_project is on, but .* pip install wandb"),
        ("tensorboard", {"tensorboard": True}, r"logging\.tensorboard is on, but .* install tensorboard"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, logging: dict[str, Any], expected: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # how Python marks a module that cannot be imported
    with pytest.raises(ConfigError, match=expected):
        check_installed(config_with(**logging).logging)
