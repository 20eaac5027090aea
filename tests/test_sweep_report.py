"""What a sweep measured: final values, stop rules, and the tables of its report, from run folders written by hand."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from trace_rl.config.sweep import StopRule
from trace_rl.launch.cli import app
from trace_rl.launch.sweep.outcome import broken_rule, final_value, read_records, steps_done
from trace_rl.launch.sweep.record import SweepRecord, read_states
from trace_rl.launch.sweep.report import write_report
from trace_rl.launch.sweep.tables import plan_totals, status_table
from trace_rl.overlays import dump_config
from trace_rl.sweeps import Sweep, load_sweep

SWEEP = """\
name: s
folder: {folder}/sweep
base: {{overrides: {{model.path: m, data.path: d, run.steps: 2}}}}
axes: {{kind: {{type: list, variants: {{a: {{}}, b: {{}}, c: {{}}}}}}}}
seeds: [0, 1, 2]
report: {{reference: a, metrics: [heldout/pass_at_1]}}
"""
FINAL = {"a": (0.5, 0.6, 0.7), "b": (0.6, 0.8, 0.9), "c": (0.5, 0.7, 0.7)}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(folder=tmp_path))
    return load_sweep(tmp_path / "sweep.yaml")


def finish(sweep: Sweep) -> SweepRecord:
    """All cells are finished with the values of FINAL."""
    sweep.folder.mkdir()
    record = SweepRecord(sweep.folder, lambda cell, kind, note: None)
    for cell in sweep.cells:
        value = FINAL[cell.group][cell.seed]
        write_run(cell.folder, {"step": 0, "heldout/pass_at_1": 0.1}, {"step": 0, "time/step_s": 1.0})
        write_run(cell.folder, {"step": 1, "time/step_s": 1.0}, {"step": 2, "heldout/pass_at_1": value})
        record.note(cell.name, "started", "process 1 1.0")
        record.note(cell.name, "finished")
    return record


def write_run(folder: Path, *records: dict[str, float]) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def row(text: str, group: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {group} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_final_value_is_the_mean_over_the_last_steps_that_have_it() -> None:
    records = [{"step": 1, "x": 1.0}, {"step": 8, "x": 2.0}, {"step": 9, "y": 5.0}, {"step": 10, "x": 4.0}]
    assert final_value(records, "x", 1) == 4.0
    assert final_value(records, "x", 2) == 4.0  # steps 9 and 10
    assert final_value(records, "x", 3) == 3.0  # steps 8 to 10
    assert math.isnan(final_value(records, "z", 1))


def test_a_rule_is_decided_by_the_first_value_at_its_step_or_later() -> None:
    rule = StopRule(metric="x", at_step=5, below=0.5)
    early = [{"step": 4, "x": 0.1}]
    assert broken_rule([rule], early) == ""
    assert broken_rule([rule], [*early, {"step": 6, "x": 0.5}, {"step": 7, "x": 0.1}]) == ""
    assert (
        broken_rule([rule], [*early, {"step": 6, "x": 0.4}, {"step": 7, "x": 0.9}]) == "x is 0.4 at step 6, below 0.5"
    )
    above = StopRule(metric="y", at_step=0, above=2)
    assert broken_rule([rule, above], [{"step": 0, "y": 3.0}]) == "y is 3 at step 0, above 2"
    assert broken_rule([above], [{"step": 0, "y": math.nan}]) == ""


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    write_run(tmp_path, {"step": 0, "time/step_s": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "time/st')
    assert steps_done(read_records(tmp_path)) == 1
    assert read_records(tmp_path / "nowhere") == []


def test_groups_are_compared_with_the_reference_seed_by_seed(sweep: Sweep) -> None:
    finish(sweep)
    text = write_report(sweep, read_states(sweep.folder))
    # a: mean 0.6, deviation 0.1, t(0.975, 2) = 4.3027: 0.6 -+ 4.3027 * 0.1 / sqrt(3) = 0.6 -+ 0.2484
    assert row(text, "a") == ["a", "3", "0.6", "0.3516 to 0.8484", "", "", "", "", "", ""]
    # b - a: 0.1 0.2 0.2, mean 0.16667, deviation 0.057735: -+ 0.1434; t = 5, so p = 0.0377. c - a: 0 0.1 0, t = 1,
    # p = 0.423. Holm: the smaller one twice, the larger one as it is. Permutations of three pairs: 2 of 8
    assert row(text, "b")[4:] == ["+0.1667", "0.02324 to 0.3101", "3", "0.038", "0.075", "0.25"]
    assert row(text, "c")[4:9] == ["+0.03333", "-0.1101 to 0.1768", "3", "0.42", "0.42"]


def test_what_broke_or_was_stopped_is_named_and_left_out(sweep: Sweep) -> None:
    record = finish(sweep)
    record.note("b_seed-0", "stopped", "x is 0 at step 1, below 1")
    record.note("c_seed-1", "broke", "first")
    record.note("c_seed-1", "broke", "exit code 1: error: no room")
    text = write_report(sweep, read_states(sweep.folder))
    assert "- b_seed-0: stopped, x is 0 at step 1, below 1" in text
    assert "- c_seed-1: failed, exit code 1: error: no room" in text
    assert row(text, "b")[1] == row(text, "c")[1] == "2"
    assert row(text, "b")[6] == "2"  # pairs: seeds 1 and 2


def test_a_group_without_a_pair_is_compared_with_nothing(sweep: Sweep) -> None:
    record = finish(sweep)
    for seed in (0, 1):
        record.note(f"b_seed-{seed}", "stopped", "x")
    text = write_report(sweep, read_states(sweep.folder))
    assert row(text, "b")[:4] == ["b", "1", "0.9", "-"]
    assert row(text, "b")[4:] == [""] * 6
    assert row(text, "c")[8] == row(text, "c")[7]  # the only comparison left: Holm corrects nothing


def test_only_seeds_that_both_have_are_compared(sweep: Sweep) -> None:
    finish(sweep).note("a_seed-0", "stopped", "x")
    text = write_report(sweep, read_states(sweep.folder))
    # seeds 1 and 2: b - a is 0.2 and 0.2, a difference without spread, of which no interval is known
    assert row(text, "b")[1:4:2] == ["3", "0.3872 to 1.146"]
    assert row(text, "b")[4:9] == ["+0.2", "-", "2", "-", "-"]
    assert row(text, "c")[4:7:2] == ["+0.05", "2"]


def test_status_tells_how_far_each_cell_is(sweep: Sweep) -> None:
    finish(sweep).note("b_seed-1", "broke", "killed by SIGKILL: [a]")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(status_table(sweep, read_states(sweep.folder)))
    lines = console.export_text().splitlines()
    (line,) = (line for line in lines if "b_seed-1" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "b_seed-1",
        "waiting",
        "2/2",
        "0.8",
        "1",
        "killed by SIGKILL: [a]",
    ]


def test_the_plan_counts_cells_and_steps(sweep: Sweep) -> None:
    totals = plan_totals(sweep)
    assert totals == "9 cells (3 groups x 3 seeds), 18 training steps in all, 1 at a time on this machine"


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_typo_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP.format(folder=tmp_path).replace("run.steps", "run.stesp"))
    for name in ("plan", "run", "status", "report"):
        status, printed = command(name, file)
        assert status == 1
        assert f"{file}:3: unknown key run.stesp; did you mean 'steps'?" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_the_report_is_written_and_printed(sweep: Sweep, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    status, printed = command("report", file)
    assert status == 1
    assert "no cell of" in printed
    finish(sweep)
    status, printed = command("report", file)
    assert status == 0
    assert (sweep.folder / "report.md").read_text() == printed
    assert "| b | 3 |" in printed


def test_runs_made_with_other_settings_are_not_gone_on_with(sweep: Sweep, tmp_path: Path) -> None:
    finish(sweep)
    for cell in sweep.cells:
        (cell.folder / "config.yaml").write_text(dump_config(cell.config))
    status, printed = command("run", tmp_path / "sweep.yaml", "run.steps=3")
    assert status == 1
    assert "holds a run with other settings than the sweep has now: run.steps = 3 (was 2)" in printed
    assert command("run", tmp_path / "sweep.yaml") == (0, "9 finished\n")  # nothing is left to do
