"""A run of `trace-rl train` as a process of its own: started, watched by role, and ended without leftovers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trace_rl.launch.run_folder import RunFolder

DEMO = Path(__file__).parent.parent / "configs/demo.yaml"
DRIVER = "driver"
PROCESSES = {
    "engine": "ray::GeneratorEngine",
    "learner": "ray::LearnerRank",
    "teacher": "ray::TeacherModel",
    "rewarder": "ray::MathRewarder",
    "annotator": "ray::SpanAnnotator",
}
"""Role -> how the titles of its processes begin."""
_MARK = "TRACE_RL_LAUNCHED_RUN"
_PATIENCE_S = 20.0


@dataclass(frozen=True)
class LaunchedRun:
    """A run that is going on."""

    driver: subprocess.Popen[bytes]
    mark: str
    """In the environment of all of its processes, also of those that Ray started."""
    printed: Path
    """What it prints."""

    def finish(self, limit_s: float) -> None:
        """Wait until it has ended well.

        Raises:
            RuntimeError: it failed, or takes longer; with the end of what it printed.
        """
        try:
            code = self.driver.wait(limit_s)
            what = f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            code, what = -1, f"took longer than {limit_s:.0f} s"
        if code:
            raise RuntimeError(f"the run {what}:\n{self.last_words}")

    @property
    def last_words(self) -> str:
        """The end of what it printed."""
        return self.printed.read_text(encoding="utf-8", errors="replace")[-2000:]

    def processes(self) -> dict[int, str]:
        """Process id -> its title."""
        sought = f"{_MARK}={self.mark}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if sought in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # it ended meanwhile, or is another user's
                continue
        return found

    def roles(self) -> Mapping[str, Sequence[int]]:
        """Role -> its processes, oldest first; the driver is one."""
        processes = self.processes()
        found = {
            role: sorted(pid for pid, line in processes.items() if line.startswith(title))
            for role, title in PROCESSES.items()
        }
        return {DRIVER: [self.driver.pid], **{role: pids for role, pids in found.items() if pids}}


@contextmanager
def launched(
    folder: Path,
    settings: Sequence[str],
    printed: Path,
    environment: Mapping[str, str] | None = None,
    configs: Sequence[Path] = (DEMO,),
) -> Iterator[LaunchedRun]:
    """A run of these configurations with these overrides; at the end of the block nothing of it is left.

    Args:
        folder: of the run.
        printed: what it prints is added to this file.
        environment: what it gets beside ours.
    """
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "trace_rl.launch.cli", "train", *map(str, configs), *settings]
    command += [f"run.folder={folder}"]
    with printed.open("ab") as file:
        env = {**os.environ, **(environment or {}), _MARK: mark}
        driver = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    run = LaunchedRun(driver, mark, printed)
    try:
        yield run
    finally:
        _end_all(run)


def step_records(folder: Path) -> list[dict[str, float]]:
    """What a run has recorded of its steps, without its evaluations."""
    lines = RunFolder(folder).metrics.read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "time/step_s" in record]


def final_weights(folder: Path, steps: int) -> str:
    """SHA-256 of the weights that a run has left.

    Raises:
        RuntimeError: it has no checkpoint of its last step.
    """
    step, checkpoint = RunFolder(folder).complete_checkpoints()[-1]
    files = sorted((checkpoint / "hf").glob("*.safetensors"))
    if step != steps or not files:
        raise RuntimeError(f"{folder} ended after {step} of {steps} steps, with {len(files)} files of weights")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _end_all(run: LaunchedRun) -> None:
    """Wait for the processes that a driver has left behind, and kill those that stay."""
    patience = time.monotonic() + _PATIENCE_S
    while left := run.processes():
        for pid in left if time.monotonic() > patience else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
