"""What every benchmark tells of itself: the machine and versions its figures belong to, as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from trace_rl.workers import environment


def describe_machine(packages: Iterable[str]) -> dict[str, Any]:
    """Hardware, and the versions of those packages that are installed."""
    return {
        "python": platform.python_version(),
        "cpu": _cpu_model() or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "has_gpu": environment.has_gpu(),
        **{package: version for package in packages if (version := version_of(package))},
    }


def version_of(package: str) -> str:
    """Version of an installed package; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def git_state() -> str:
    """Commit of this working tree, and whether files differ from it; says so outside of one, as in a Ray job."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here, capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "no git"
    return found.stdout.strip()


def one_line(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def publish(name: str, report: dict[str, Any], text: str, out: Path | None) -> None:
    """Print the Markdown, and write it with the JSON to a folder where one is given."""
    typer.echo(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (out / f"{name}.md").write_text(text, encoding="utf-8")


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
