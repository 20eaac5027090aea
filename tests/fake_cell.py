"""A cell of a sweep that takes milliseconds: it keeps to the protocol of real ones and writes what a run would write.

`python fake_cell.py CONTROL CONFIG` is the cell. What it does is read from CONTROL/GROUP.json: `steps`, `step_s`, the
`values` of held-out pass@1 by step, on which tries it `breaks`, and whether it is `deaf` to being interrupted. Every
try adds a line to CONTROL/tries. `python fake_cell.py CONTROL` is a sweep of such cells, that of CONTROL/sweep.yaml.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trace_rl.launch.sweep.child import bind_to_sweep  # all that a cell imports of the project, so that it starts fast

if TYPE_CHECKING:
    from trace_rl.launch.sweep.local import LocalRunner


def runner(control: Path, folder: Path) -> LocalRunner:
    from trace_rl.launch.sweep.local import LocalRunner

    return LocalRunner(folder, (sys.executable, str(Path(__file__)), str(control)), poll_s=0.02)


def tries(control: Path) -> list[str]:
    """`begin CELL` and `end CELL` lines in the order in which they happened."""
    file = control / "tries"
    return file.read_text().splitlines() if file.exists() else []


def run_cell(control: Path, config: Path) -> None:
    bind_to_sweep()
    name, text = config.stem, config.read_text()
    folder = Path(text.rpartition("\n  folder: ")[2].partition("\n")[0])  # of run, the last section
    told = control / f"{name.rpartition('_seed-')[0]}.json"
    settings = {"steps": 2, "step_s": 0.0, "values": {}, "breaks": [], "deaf": False}
    settings |= json.loads(told.read_text()) if told.exists() else {}
    number = tries(control).count(f"begin {name}") + 1
    _append(control / "tries", f"begin {name}")
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(text)
    for step in range(settings["steps"]):
        value = settings["values"].get(str(step), 0.5)
        _append(folder / "metrics.jsonl", json.dumps({"step": step, "heldout/pass_at_1": value, "time/step_s": 1.0}))
        _sleep(settings["step_s"], settings["deaf"])
    if number in settings["breaks"]:
        print(f"error: try {number} broke")
        raise SystemExit(3)
    _append(control / "tries", f"end {name}")


def _sleep(seconds: float, is_deaf: bool) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(max(0.0, end - time.monotonic()))
        except KeyboardInterrupt:
            if not is_deaf:
                raise


def _append(file: Path, line: str) -> None:
    with file.open("a") as lines:
        lines.write(line + "\n")


def run_sweep(control: Path) -> None:
    from trace_rl.launch.sweep.record import SweepRecord, only_sweep_in
    from trace_rl.launch.sweep.schedule import SweepScheduler
    from trace_rl.sweeps import load_sweep

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    sweep = load_sweep(control / "sweep.yaml")
    with only_sweep_in(sweep.folder):
        record = SweepRecord(sweep.folder, lambda cell, kind, note: None)
        SweepScheduler(sweep, record, runner(control, sweep.folder)).run()


if __name__ == "__main__":
    arguments = [Path(argument) for argument in sys.argv[1:]]
    run_cell(*arguments) if len(arguments) == 2 else run_sweep(*arguments)
