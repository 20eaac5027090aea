"""What a report tells of runs: groups, means with intervals, differing settings, charts and tables."""

import json
from pathlib import Path

import numpy as np
import pytest
from pages_data import write_run
from typer.testing import CliRunner

from trace_rl.errors import DataError
from trace_rl.launch.cli import app
from trace_rl.launch.pages.charts import sections, summary_table
from trace_rl.launch.pages.recorded_runs import Group, differing_settings, grouped, read_run, smoothed


def groups_of(tmp_path: Path, *prefixes: str) -> list[Group]:
    runs = [
        write_run(tmp_path / "trace-s0", seed=0),
        write_run(tmp_path / "trace-s1", seed=2),
        write_run(tmp_path / "grpo-s0", seed=0, learning_rate=0.5),
    ]
    return grouped([read_run(run) for run in runs], prefixes)


def test_runs_that_differ_in_the_seed_only_are_one_group(tmp_path: Path) -> None:
    found = [(group.name, [run.name for run in group.runs]) for group in groups_of(tmp_path)]
    assert found == [("trace", ["trace-s0", "trace-s1"]), ("grpo-s0", ["grpo-s0"])]


def test_groups_may_be_named_by_prefixes(tmp_path: Path) -> None:
    found = {group.name: len(group.runs) for group in groups_of(tmp_path, "trace-s1", "trace")}
    assert found == {"trace": 1, "trace-s1": 1, "grpo-s0": 1}


def test_a_curve_is_the_mean_over_runs_with_its_t_interval(tmp_path: Path) -> None:
    trace, grpo = groups_of(tmp_path)
    curve = trace.curve("reward/mean")
    # rewards 0 + step and 2 + step: mean 1 + step, standard error sqrt(2) / sqrt(2) = 1, t(0.975, 1) = 12.706
    assert curve.mean.tolist() == [1, 2, 3, 4, 5, 6]
    assert curve.low[0] == pytest.approx(1 - 12.7062, abs=1e-3)
    assert curve.high[5] == pytest.approx(6 + 12.7062, abs=1e-3)
    alone = grpo.curve("reward/mean")
    assert alone.num_runs == 1 and alone.low.tolist() == alone.high.tolist() == alone.mean.tolist()


def test_a_curve_has_the_steps_that_all_runs_have(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a-1", seed=1, steps=3), write_run(tmp_path / "a-2", seed=2, steps=5)]
    (group,) = grouped([read_run(run) for run in runs], [])
    assert group.curve("reward/mean").steps == (0, 1, 2)


def test_a_running_mean_looks_back_only() -> None:
    assert smoothed([1, 3, 5, 9], 2).tolist() == [1, 2, 4, 7]
    assert smoothed([1, 3], 1).tolist() == [1, 3]


def test_settings_that_differ_are_listed_without_seed_and_name(tmp_path: Path) -> None:
    assert differing_settings(groups_of(tmp_path)) == [("learner.optimizer.learning_rate", ["0.001", "0.5"])]


def test_a_group_of_unlike_runs_shows_all_their_values(tmp_path: Path) -> None:
    (group,) = grouped(groups_of(tmp_path)[0].runs[:1] + groups_of(tmp_path / "more")[1].runs, ["trace", "grpo"])[:1]
    mixed = Group("mixed", (*group.runs, *groups_of(tmp_path / "again")[1].runs))
    assert differing_settings([mixed]) == [("learner.optimizer.learning_rate", ["0.001 | 0.5"])]


def test_the_summary_tells_seeds_and_intervals(tmp_path: Path) -> None:
    table = summary_table(groups_of(tmp_path))
    trace, grpo = (dict(zip(table["head"], row, strict=True)) for row in table["rows"])
    # last pass@1 0 and 20 %: mean 10, standard error 10, so 10 +- 127.1 points
    assert (trace["runs"], trace["seeds"], trace["pass@1 % last"]) == ("2", "0, 2", "10.0 [-117.1, 137.1]")
    assert (grpo["pass@1 % first"], grpo["pass@1 % last"], grpo["gain, points"]) == ("50.0", "0.0", "-50.0")
    assert grpo["s a step"] == "3"


def test_sections_hold_what_was_recorded(tmp_path: Path) -> None:
    found = {section["title"]: section for section in sections(groups_of(tmp_path))}
    assert list(found) == ["Learning", "Health", "Time of a step by stage", "Annotation", "Settings that differ"]
    assert {chart["metric"] for chart in found["Health"]["charts"]} == {
        "policy/entropy_nats",
        "response/length_mean_tokens",
        "route/key_spans/value_nats",
    }
    learning = found["Learning"]["charts"][0]
    assert [trace.get("isBand", False) for trace in learning["traces"]] == [True, False, False]
    stages = found["Time of a step by stage"]["charts"][0]
    assert [(trace["name"], trace["stackgroup"], trace["y"][0]) for trace in stages["traces"]] == [
        ("rollout", "time", 2.0),
        ("learner", "time", 1.0),
    ]
    types = found["Annotation"]["charts"][1]
    assert types["traces"][0]["x"] == ["arith", "copy"] and types["traces"][0]["y"] == [0.75, 0.25]
    assert types["table"]["rows"][0] == ["trace", "36 (75%)", "12 (25%)"]
    json.dumps(list(found.values()), allow_nan=False)


def test_further_sets_of_an_evaluation_have_their_charts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0]["eval/longer/pass_at_1"], lines[-1]["eval/longer/pass_at_1"] = 0.25, 0.75
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    charts = sections(grouped([read_run(run)], []))[0]["charts"]
    (found,) = [chart for chart in charts if chart["metric"] == "eval/longer/pass_at_1"]
    assert found["title"] == "pass@1 on longer"
    assert [trace["y"] for trace in found["traces"]] == [[0.25, 0.75]]


def test_names_of_runs_are_no_markup_for_plotly(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / "<a href='x'>b"))]
    text = json.dumps([chart["traces"] for section in sections(grouped(runs, [])) for chart in section["charts"]])
    assert "<a" not in text and "&lt;a href='x'&gt;b" in text


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", **{"learner/grad_norm": float("nan")})
    assert read_run(run).series("learner/grad_norm") == {}


def test_a_line_that_a_killed_run_cut_off_is_ignored_and_others_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    file = run / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 6, "rew')
    assert len(read_run(run).steps) == 6
    file.write_text('{"step": 6, "rew\n' + whole)
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is not a record of a step"):
        read_run(run)
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl, so it is no run folder"):
        read_run(tmp_path)


def test_the_command_writes_the_report(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    runs = [str(write_run(tmp_path / name, seed=seed)) for seed, name in enumerate(("a-0", "a-1"))]
    result = CliRunner().invoke(app, ["report", *runs, "--out", str(out)])
    assert result.exit_code == 0, result.output
    text = out.read_text(encoding="utf-8")
    assert "<title>Report: a</title>" in text and "Content-Security-Policy" in text
    assert np.all([f'"{name}"' in text for name in ("heldout/pass_at_1", "policy/entropy_nats")])
