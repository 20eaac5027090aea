"""The run folder: which one is taken, what a resumed run finds; and the summary."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from file_role import make_checkpoints

from trace_rl.config.run import RunConfig
from trace_rl.launch.run_folder import RunFolder, open_run_folder, trim_metrics, write_config
from trace_rl.launch.summary import Evaluation, Outcome, summarise_run
from trace_rl.overlays import load_config


def make_config(folder: Path, **run: Any) -> RunConfig:
    settings = {"name": "demo", "folder": f"{folder}/{{name}}", **run}
    return RunConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, "run": settings})


def test_the_folder_carries_the_name_of_the_run(tmp_path: Path) -> None:
    folder = open_run_folder(make_config(tmp_path / "runs"))
    assert folder.path == tmp_path / "runs" / "demo"
    assert folder.path.is_dir()


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path)
    taken = []
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            folder = open_run_folder(config)
            write_config(folder, config)
            taken.append(folder.path.name)
    assert taken == ["demo", "demo-2", "demo-3"]
    assert "holds a run already" in caplog.text
    assert "run.resume=auto" in caplog.text


def test_a_run_that_may_be_resumed_keeps_its_folder(tmp_path: Path) -> None:
    config = make_config(tmp_path, resume="auto")
    for _ in range(2):
        folder = open_run_folder(config)
        write_config(folder, config)
        assert folder.path.name == "demo"


def test_the_written_configuration_reads_back(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder = open_run_folder(config)
    write_config(folder, config)
    assert load_config([folder.config]) == config


def test_changed_settings_are_named_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_run_folder(make_config(tmp_path, steps=10))
    write_config(folder, make_config(tmp_path, steps=10))
    with caplog.at_level(logging.WARNING):
        write_config(folder, make_config(tmp_path, steps=10))
        assert caplog.text == ""
        write_config(folder, make_config(tmp_path, steps=20))
    assert "resuming with changed settings: run.steps = 20 (was 10)" in caplog.text


def test_a_changed_value_that_stands_elsewhere_too_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(tmp_path)
    folder = open_run_folder(config)
    write_config(folder, config)
    evaluation = config.evaluation.model_copy(update={"samples_per_prompt": 8})  # as sampling.samples_per_prompt is
    with caplog.at_level(logging.WARNING):
        write_config(folder, config.model_copy(update={"evaluation": evaluation}))
    assert "evaluation.samples_per_prompt = 8 (was 1)" in caplog.text


METRICS = [
    {"step": 0, "heldout/pass_at_1": 0.5},
    {"step": 0, "reward/mean": 0.1},
    {"step": 1, "reward/mean": 0.2},
    {"step": 2, "heldout/pass_at_1": 0.6},
    {"step": 2, "reward/mean": 0.3},
    {"step": 3, "reward/mean": 0.4},
]


def write_metrics(folder: Path, ending: str = "") -> RunFolder:
    run_folder = RunFolder(folder)
    run_folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in METRICS) + ending)
    return run_folder


def test_metrics_of_steps_that_run_again_are_dropped_and_kept_aside(tmp_path: Path) -> None:
    # A checkpoint of step 2 holds steps 0 and 1 and was written after the evaluation that followed them.
    folder = write_metrics(tmp_path)
    before = folder.metrics.read_text()
    trim_metrics(folder, 2)
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == METRICS[:4]
    assert (tmp_path / "metrics.before-resume-000002.jsonl").read_text() == before


def test_a_line_that_was_being_written_when_the_run_was_killed_is_dropped(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path, ending='{"step": 4, "rew')
    trim_metrics(folder, 4)
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == METRICS


def test_a_fresh_start_in_an_old_folder_drops_everything(tmp_path: Path) -> None:
    # run.resume=auto without a complete checkpoint: the evaluation before the first step is done again too
    folder = write_metrics(tmp_path)
    trim_metrics(folder, 0)
    assert folder.metrics.read_text() == ""
    assert (tmp_path / "metrics.before-resume-000000.jsonl").is_file()


def test_nothing_is_copied_where_nothing_is_dropped(tmp_path: Path) -> None:
    trim_metrics(RunFolder(tmp_path), 3)
    folder = write_metrics(tmp_path)
    trim_metrics(folder, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_summary_says_what_was_gained_and_where_to_look(tmp_path: Path) -> None:
    checkpoints, *_ = make_checkpoints(tmp_path)
    checkpoints.save(60, {}, [])
    config = make_config(tmp_path, steps=60)
    # 40 samples: evaluation.num_prompts asks for 64, but there may be fewer held-out rows
    evaluations = [Evaluation(0, 0.5, 40), Evaluation(20, 0.6, 40), Evaluation(60, 0.825, 40)]
    outcome = Outcome(evaluations, duration_s=301.4, peak_memory_gib=3.25)
    text = summarise_run(config, RunFolder(tmp_path), outcome)
    assert text.startswith("# demo: 60 steps of policy gradient clipped\n")
    assert "pass@1 after 0 steps: 50.0%" in text
    assert "pass@1 after 60 steps: 82.5% (+32.5 points, 40 samples at temperature 1)" in text
    assert "301 s" in text
    assert str(tmp_path / "metrics.jsonl") in text
    assert str(tmp_path / "checkpoints" / "step-000060" / "hf") in text


def test_the_summary_of_a_run_without_evaluations_or_checkpoints(tmp_path: Path) -> None:
    route = {"selector": {"rollouts": "correct", "tokens": "key_spans"}, "action": "fkl"}
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "data": {"path": "d"}, "algorithm": {"routes": {"key_spans": route}}}
    )
    text = summarise_run(config, RunFolder(tmp_path), Outcome([], 1.0, 1.0))
    assert "policy gradient clipped + fkl on key_spans" in text
    assert "pass@1" not in text
    assert "trained model" not in text
