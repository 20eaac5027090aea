"""A stage that is slowed for the bench is stopped again and again, and left running at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
bench_detects = pytest.importorskip("bench_detects")
PATIENCE_S = 20.0


def test_only_the_named_processes_are_stopped_and_none_stays_so() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(["sleep", "60"]) as other, subprocess.Popen(sleeper) as named:
        try:
            with bench_detects.slowing(os.getpid(), sys.executable, slowdown=10.0):
                seen = states(named, other, until=psutil.STATUS_STOPPED)
            assert psutil.STATUS_STOPPED in seen[0]
            assert seen[1] == {psutil.STATUS_SLEEPING}
            assert psutil.STATUS_SLEEPING in states(named, until=psutil.STATUS_SLEEPING)[0]
        finally:
            named.kill()
            other.kill()


def states(*processes: subprocess.Popen[bytes], until: str) -> list[set[str]]:
    """What the processes were seen to be before the first one was as asked, or patience ended."""
    seen: list[set[str]] = [set() for _ in processes]
    end = time.monotonic() + PATIENCE_S
    while until not in seen[0] and time.monotonic() < end:
        for process, found in zip(processes, seen, strict=True):
            found.add(psutil.Process(process.pid).status())
        time.sleep(0.01)
    return seen
