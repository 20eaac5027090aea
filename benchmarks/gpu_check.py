"""Everything that one GPU can show of this framework, in one command: what is right, how fast, and what limits it.

    python benchmarks/gpu_check.py [--quick] [--sections roofs,learner] [--budget-s 540] [--out benchmarks/results]

Needs torch, Triton, transformers and what comes with them, and of this package's own requirements numpy, pydantic and
jaxtyping; xxhash for `weight_copy` alone. DeepSpeed, flash-attn and the peers of the head loss are used where they are
installed. Where the package is not installed:

    python launch/setup/view.py && PYTHONPATH=build/view python benchmarks/gpu_check.py

Sections, each a module `gpu_NAME` with cases of its own:

- `roofs`: large copies and matrix products, to which all shares refer
- `correctness`: head loss and gradients on the GPU against the CPU in float64
- `head_loss`: the fused head beside plain torch and peers
- `learner`: optimizer steps on random models, padded and packed
- `teacher`: all of a teacher's work against what spans need
- `weight_copy`: weights from one process to another
- `attention`: kernels for sequences that lie end to end

Every section runs in a process of its own, so that a GPU error or a hang in one leaves the others their GPU. A case
that cannot run says why; one that fails, or that takes longer than --case-limit-s, is told with its first line, and the
exit code is 1 in the end. gpu_check.json is written after every case, gpu_check.md at the end. With --dry-run every
case runs on the CPU at a tiny size: calls that are wrong are found without a GPU, and the files are called
gpu_check_dry, because figures of it mean nothing.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import gpu_cases
import torch
import typer
from gpu_cases import Context, Tell
from gpu_report import num_failed, to_markdown
from report import describe_machine, git_state

SECTIONS = ("roofs", "correctness", "attention", "weight_copy", "teacher", "learner", "head_loss")
"""In the order in which they run: what tells most in the least time comes first."""
START_S = 300.0
"""For a section to import what it needs."""
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "deepspeed", "vllm", "ray", "trl", "liger-kernel", "verl")


@dataclass(frozen=True)
class Files:
    """Where the record is kept."""

    folder: Path
    name: str

    def write(self, record: dict[str, Any]) -> None:
        """Replace the JSON as a whole, so that a kill never leaves half of one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{self.name}.json"
        aside = target.with_suffix(".json.part")
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        aside.replace(target)

    def write_text(self, text: str) -> None:
        (self.folder / f"{self.name}.md").write_text(text, encoding="utf-8")


def run_all(sections: list[str], context: Context, case_limit_s: float, record: dict[str, Any], files: Files) -> None:
    """Run the sections, and keep the record up to date."""
    for section in sections:
        started = time.monotonic()
        found: dict[str, Any] = {"seconds": 0.0, "cases": []}
        record["sections"][section] = found

        def tell(case: dict[str, Any], found: dict[str, Any] = found, started: float = started) -> None:
            found["cases"].append(case)
            found["seconds"] = round(time.monotonic() - started, 1)
            files.write(record)

        files.write(record)
        in_own_process(section, context, case_limit_s, tell)
        ends = [case["status"] for case in found["cases"]]
        counts = ", ".join(f"{ends.count(status)} {status}" for status in ("done", "skipped", "failed"))
        typer.echo(f"{section}: {counts}, {found['seconds']:.0f} s", err=True)


def in_own_process(section: str, context: Context, case_limit_s: float, tell: Tell) -> None:
    """Run a section in a process that cannot take the others with it; tells of every case once it has ended."""
    spawn = multiprocessing.get_context("spawn")
    events, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_section_process, args=(section, context, sender))
    process.start()
    sender.close()
    running = ""
    try:
        while True:
            limit_s = case_limit_s if running else START_S
            if not events.poll(limit_s):
                tell(_failed(running or gpu_cases.WHOLE, f"nothing happened for {limit_s:g} s; its process was killed"))
                return
            event = events.recv()
            running = event["case"] if event["status"] == "running" else ""
            if not running:
                tell(event)
    except EOFError:
        process.join(case_limit_s)
        if process.exitcode != 0:
            tell(_failed(running or gpu_cases.WHOLE, f"its process ended with {_exit_text(process.exitcode)}"))
    finally:
        process.kill()
        process.join()


def _section_process(section: str, context: Context, events: Connection) -> None:
    if context.is_gpu:
        torch.cuda.init()
    else:
        torch.set_num_threads(1)
    gpu_cases.run_section(section, context, events.send)
    events.close()


def _failed(case: str, why: str) -> dict[str, Any]:
    return {"case": case, "status": "failed", "why": why}


def _exit_text(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def gpu_facts(context: Context) -> dict[str, Any]:
    """The GPU and its driver; nothing without one."""
    if not context.is_gpu:
        return {}
    found = torch.cuda.get_device_properties(context.device)
    return {
        "gpu": found.name,
        "gpu_memory_gib": round(found.total_memory / 2**30),
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found[0].strip() if found else "unknown"


def choose(sections: str) -> list[str]:
    """The sections that are named, in the order in which they run; all where none is.

    Raises:
        BadParameter: there is none of that name.
    """
    named = [each.strip() for each in sections.split(",") if each.strip()]
    unknown = [each for each in named if each not in SECTIONS]
    if unknown:
        raise typer.BadParameter(f"--sections names {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return [each for each in SECTIONS if each in named] if named else list(SECTIONS)


def main(
    sections: Annotated[str, typer.Option(help=f"Some of {','.join(SECTIONS)}; all if none.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few repeats: less than 3 minutes.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run all code on the CPU, tiny.")] = False,
    budget_s: Annotated[float, typer.Option(min=0, help="No case is started after so many seconds.")] = 3600.0,
    case_limit_s: Annotated[float, typer.Option(min=1, help="A case that takes longer has failed.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of all inputs.")] = 0,
    code: Annotated[str, typer.Option(help="Commit of a copy that is no git checkout.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of gpu_check.json and .md.")] = Path("build"),
) -> None:
    """Run the sections, print the Markdown and write both files; exits with 1 where a case has failed."""
    chosen = choose(sections)
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here; --dry-run runs every case on the CPU at a tiny size")
    device = torch.device("cpu" if dry_run else "cuda:0")
    scale: gpu_cases.Scale = "dry" if dry_run else "quick" if quick else "full"
    context = Context(device, scale, seed, time.monotonic() + budget_s)
    record = {
        "command": shlex.join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "git": code or git_state(),
        "scale": scale,
        "seed": seed,
        "machine": describe_machine(PACKAGES) | {"has_gpu": context.is_gpu} | gpu_facts(context),
        "sections": {},
    }
    files = Files(out, "gpu_check_dry" if dry_run else "gpu_check")
    run_all(chosen, context, case_limit_s, record, files)
    text = to_markdown(record)
    files.write_text(text)
    typer.echo(text)
    if num_failed(record):
        raise typer.Exit(1)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    typer.run(main)
