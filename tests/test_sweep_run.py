"""Running a sweep: order, retries, early stops, ends by signal, and going on after kill -9. Cells are real processes
that take milliseconds (fake_cell.py)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fake_cell
import psutil
import pytest

from trace_rl.errors import ConfigError
from trace_rl.launch.sweep import schedule
from trace_rl.launch.sweep.record import FILE, CellState, SweepRecord, only_sweep_in, read_states
from trace_rl.launch.sweep.schedule import SweepScheduler
from trace_rl.sweeps import Sweep, load_sweep

SWEEP = """\
name: s
folder: {folder}
base: {{overrides: {{model.path: m, data.path: d}}}}
axes: {{kind: {{type: list, variants: {{a: {{}}, b: {{}}}}}}}}
seeds: [0, 1]
"""
CELLS = ["a_seed-0", "a_seed-1", "b_seed-0", "b_seed-1"]


@pytest.fixture
def control(tmp_path: Path) -> Path:
    folder = tmp_path / "control"
    folder.mkdir()
    return folder


def make(control: Path, more: str = "", **kinds: object) -> Sweep:
    """The sweep of four cells; what the cells of a group do is told by its name."""
    for group, settings in kinds.items():
        (control / f"{group}.json").write_text(json.dumps(settings))
    (control / "sweep.yaml").write_text(SWEEP.format(folder=control.parent / "sweep") + more)
    return load_sweep(control / "sweep.yaml")


def run(sweep: Sweep, control: Path) -> list[tuple[str, str, str]]:
    """The events, in order."""
    events: list[tuple[str, str, str]] = []
    sweep.folder.mkdir(exist_ok=True)
    record = SweepRecord(sweep.folder, lambda cell, kind, note: events.append((cell, kind, note)))
    SweepScheduler(sweep, record, fake_cell.runner(control, sweep.folder)).run()
    return events


def statuses(sweep: Sweep) -> list[str]:
    states = read_states(sweep.folder)
    return [states.get(cell.name, CellState()).status for cell in sweep.cells]


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not {what} within {timeout_s:g} s"
        time.sleep(0.01)


@contextmanager
def sweep_process(control: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, fake_cell.__file__, str(control)], stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def process_of(sweep: Sweep, cell: str) -> psutil.Process:
    _, process_id, _ = read_states(sweep.folder)[cell].note.split()
    return psutil.Process(int(process_id))


def test_cells_run_one_after_another_and_each_leaves_a_run_folder(control: Path) -> None:
    sweep = make(control)
    run(sweep, control)
    assert fake_cell.tries(control) == [f"{what} {cell}" for cell in CELLS for what in ("begin", "end")]
    assert statuses(sweep) == ["finished"] * 4
    assert all((sweep.folder / cell / "metrics.jsonl").is_file() for cell in CELLS)


def test_so_many_run_at_a_time_as_the_sweep_says(control: Path) -> None:
    sweep = make(control, "parallel: 2\n", a={"step_s": 0.5}, b={"step_s": 0.5})
    running = most = 0
    for _, kind, _ in run(sweep, control):
        running += 1 if kind == "started" else -1
        most = max(most, running)
    assert most == 2


def test_finished_cells_are_not_run_again(control: Path) -> None:
    sweep = make(control)
    run(sweep, control)
    before = fake_cell.tries(control)
    assert run(sweep, control) == []
    assert fake_cell.tries(control) == before


def test_a_cell_that_breaks_once_is_tried_again_and_one_that_breaks_twice_has_failed(control: Path) -> None:
    sweep = make(control, a={"breaks": [1]}, b={"breaks": [1, 2, 3]})
    run(sweep, control)
    assert statuses(sweep) == ["finished", "finished", "failed", "failed"]
    assert [fake_cell.tries(control).count(f"begin {cell}") for cell in CELLS] == [2, 2, 2, 2]
    assert read_states(sweep.folder)["b_seed-0"].note == "exit code 3: error: try 2 broke"
    assert run(sweep, control) == []


def test_a_cell_that_is_killed_counts_as_broken_and_takes_nothing_along(control: Path) -> None:
    sweep = make(control, a={"step_s": 0.5})
    with sweep_process(control) as process:
        wait_until(lambda: "begin a_seed-0" in fake_cell.tries(control), "begun")
        process_of(sweep, "a_seed-0").kill()
        assert process.wait(30) == 0
    assert statuses(sweep) == ["finished"] * 4
    assert fake_cell.tries(control)[:3] == ["begin a_seed-0", "begin a_seed-0", "end a_seed-0"]
    assert "killed by SIGKILL" in (sweep.folder / FILE).read_text()


def test_a_killed_sweep_goes_on_without_repeating_what_is_finished(control: Path) -> None:
    sweep = make(control, b={"step_s": 0.7})
    with sweep_process(control) as process:
        wait_until(lambda: "begin b_seed-0" in fake_cell.tries(control), "at its third cell")
        orphan = process_of(sweep, "b_seed-0")
        process.kill()
    assert statuses(sweep) == ["finished", "finished", "running", "waiting"]
    events = run(sweep, control)
    assert not orphan.is_running()
    assert events[0] == ("b_seed-0", "interrupted", "the sweep was killed")
    assert statuses(sweep) == ["finished"] * 4
    tries = fake_cell.tries(control)
    assert [tries.count(f"begin {cell}") for cell in CELLS] == [1, 1, 2, 1]
    assert [tries.count(f"end {cell}") for cell in CELLS] == [1, 1, 1, 1]


def test_the_process_of_a_cell_ends_itself_where_its_sweep_is_killed(control: Path) -> None:
    sweep = make(control, a={"steps": 1000, "step_s": 0.1})
    with sweep_process(control) as process:
        wait_until(lambda: "begin a_seed-0" in fake_cell.tries(control), "begun")
        cell = process_of(sweep, "a_seed-0")
        process.kill()
        wait_until(lambda: not cell.is_running(), "ended", timeout_s=10)


def test_a_rule_stops_the_cells_that_break_it_and_no_other(control: Path) -> None:
    rule = "stop: [{metric: heldout/pass_at_1, at_step: 2, below: 0.3}]\n"
    bad = {"steps": 200, "step_s": 0.05, "values": {"0": 0.1, "1": 0.1, "2": 0.25}}
    good = {"steps": 5, "values": {"1": 0.1, "2": 0.35, "3": 0.1}}  # below it before and after the step that decides
    sweep = make(control, rule, a=bad, b=good)
    run(sweep, control)
    assert statuses(sweep) == ["stopped", "stopped", "finished", "finished"]
    reason = "heldout/pass_at_1 is 0.25 at step 2, below 0.3"
    assert read_states(sweep.folder)["a_seed-1"] == CellState("stopped", reason)
    assert run(sweep, control) == []


def test_a_cell_that_takes_too_long_is_ended_and_counts_as_broken(control: Path) -> None:
    sweep = make(control, "cell_timeout_s: 2\n", a={"steps": 1000, "step_s": 0.1})
    run(sweep, control)
    assert statuses(sweep) == ["failed", "failed", "finished", "finished"]
    assert read_states(sweep.folder)["a_seed-0"].note == "it took longer than cell_timeout_s = 2"


def test_a_cell_that_does_not_end_when_it_is_asked_is_killed(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "END_S", 0.5)
    rule = "stop: [{metric: heldout/pass_at_1, at_step: 0, above: 0.9}]\n"
    deaf = {"steps": 1000, "step_s": 0.1, "values": {"0": 1.0}, "deaf": True}
    sweep = make(control, rule, a=deaf)
    started = time.monotonic()
    run(sweep, control)
    assert time.monotonic() - started < 20
    assert statuses(sweep) == ["stopped", "stopped", "finished", "finished"]


def test_ctrl_c_ends_the_running_cell_and_the_sweep_can_go_on(control: Path) -> None:
    sweep = make(control, a={"step_s": 1.0})
    with sweep_process(control) as process:
        wait_until(lambda: "begin a_seed-0" in fake_cell.tries(control), "begun")
        cell = process_of(sweep, "a_seed-0")
        os.kill(process.pid, signal.SIGINT)
        process.wait(20)
        assert not cell.is_running()
    assert read_states(sweep.folder)["a_seed-0"] == CellState("waiting", "by the user")
    make(control, a={"step_s": 0.0})
    run(sweep, control)
    assert statuses(sweep) == ["finished"] * 4


def test_two_sweeps_cannot_share_a_folder(tmp_path: Path) -> None:
    sentence = f"the sweep in .* is run already by process {os.getpid()} on host"
    with only_sweep_in(tmp_path), pytest.raises(ConfigError, match=sentence), only_sweep_in(tmp_path):
        pass
    with only_sweep_in(tmp_path):
        pass


def test_a_line_that_a_kill_cut_off_never_happened(tmp_path: Path) -> None:
    record = SweepRecord(tmp_path, lambda cell, kind, note: None)
    record.note("x", "started", "process 1 2.0")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"time_s": 1, "cell": "x", "event": "fini')
    assert read_states(tmp_path)["x"].status == "running"
    SweepRecord(tmp_path, lambda cell, kind, note: None).note("x", "broke", "why")
    assert read_states(tmp_path)["x"] == CellState("waiting", "why", failures=1)


def test_a_cell_is_not_taken_for_another_process_of_its_number(control: Path) -> None:
    sweep = make(control)
    sweep.folder.mkdir()
    me = os.getpid()  # alive, and created at another time
    SweepRecord(sweep.folder, lambda cell, kind, note: None).note("a_seed-0", "started", f"process {me} 1.0")
    run(sweep, control)
    assert statuses(sweep) == ["finished"] * 4
