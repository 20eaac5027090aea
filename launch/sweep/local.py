"""Cells as processes of this machine, each with a session of its own, so that one that dies takes nothing else along.

A cell's process holds on to its sweep by its standard input (`trace_rl.launch.sweep.child`): it ends itself when that
is closed, also where the sweep was killed. It is noted by id and time of creation before it may begin, so that a sweep
that goes on never runs a cell beside its former self.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from trace_rl.errors import ConfigError
from trace_rl.launch.sweep.child import GO
from trace_rl.launch.sweep.schedule import END_S, Ended, Running
from trace_rl.overlays import dump_config
from trace_rl.sweeps import Cell

COMMAND = (sys.executable, "-m", "trace_rl.launch.sweep.child")
_NOTE = "process"
_CAUSE_BYTES = 4096


@dataclass(frozen=True)
class LocalRunner:
    """Implements `Runner`."""

    folder: Path
    """Of the sweep."""
    command: Sequence[str] = COMMAND
    """Runs the configuration whose path follows; keeps to the protocol of `trace_rl.launch.sweep.child`."""
    poll_s: float = 0.5

    def start(self, cell: Cell, note: Callable[[str], None]) -> Running:
        config, printed = self.folder / "configs" / f"{cell.name}.yaml", self.folder / "printed" / f"{cell.name}.log"
        for file in (config, printed):
            file.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(dump_config(cell.config), encoding="utf-8")
        with printed.open("ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                [*self.command, str(config)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the sweep, which then ends its cells one by one
            )
        note(f"{_NOTE} {process.pid} {psutil.Process(process.pid).create_time()}")
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead already, as `ended` will find
            process.stdin.write(GO)
            process.stdin.flush()
        return LocalCell(process, printed, begin)

    def take_up(self, cell: Cell, note: str) -> Running | None:
        """Wait for the end of a process that has lost its sweep, which is on its way; kill it where it is not."""
        kind, _, found = note.partition(" ")
        if kind != _NOTE:
            raise ConfigError(
                f"the cell {cell.name} runs elsewhere ({note}); go on with the address that the sweep was run with, or "
                "end it there and give this sweep another folder"
            )
        process_id, _, created_s = found.partition(" ")
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(process_id))
            if process.create_time() == float(created_s):
                _await_end(process)
        return None


@dataclass
class LocalCell:
    """Implements `Running`."""

    process: subprocess.Popen[bytes]
    printed: Path
    begin: int
    """Where its output begins in `printed`."""

    def ended(self) -> Ended | None:
        status = self.process.poll()
        if status is None:
            return None
        return Ended(status == 0, "" if status == 0 else f"{_ending(status)}: {self._last_words()}")

    def interrupt(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            _kill_tree(psutil.Process(self.process.pid))
        self.process.wait(END_S)

    def _last_words(self) -> str:
        """Its error where it has told one, else the last line that it has printed."""
        with self.printed.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(self.begin, size - _CAUSE_BYTES))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        told = [line for line in lines if line.startswith("error: ")]
        return (told or lines or ["it printed nothing"])[-1]


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"


def _await_end(process: psutil.Process) -> None:
    try:
        process.wait(END_S)
    except psutil.TimeoutExpired:
        psutil.wait_procs(_kill_tree(process), timeout=END_S)


def _kill_tree(process: psutil.Process) -> list[psutil.Process]:
    """SIGKILL to a process and all that descend from it; who started it waits for it."""
    tree = [*process.children(recursive=True), process]
    for each in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    return tree
