"""Child processes that grade text under a deadline and are really killed when they miss it.

Why not `pebble.ProcessPool`: it sends SIGTERM first, which a child inside big-integer arithmetic never handles, and
waits 3 s for it while it holds the lock that every other child needs, so one bad response stalls the whole pool.

A child is a fresh interpreter that imports math-verify only (about half a second); no fork of a process that holds
threads, Ray or a GPU. The deadline starts when an idle, ready child is handed the text. A child that is killed, dies,
breaks the protocol or has grown (sympy caches what it computes) is replaced; the next text finds a new one. Children of
a parent that was itself killed end too: idle ones see their pipe close, busy ones are ended by a kernel timer. What
a child may do besides computing is decided in `trace_rl.workers.confinement`.

This module must not know about Ray, rollouts or metrics.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, NamedTuple

from trace_rl.errors import WorkerError
from trace_rl.workers.confinement import VIOLATION_STATUS, limit_resources, refuse_side_effects, resident_bytes

if TYPE_CHECKING:  # a child imports this module, and starts in half the time without numpy
    from trace_rl.batch import GradeCause

START_TIMEOUT_S = 60.0
"""Deadline for a child to have imported math-verify and graded a first text."""
KILL_TIMEOUT_S = 10.0
"""Deadline for the kernel to end a killed child."""
MAX_TEXT_BYTES = 2**30
"""Address space that a text may take beyond what a ready child has: one that asks for more gets a MemoryError instead
of the machine."""
MAX_KEPT_BYTES = 2**28
"""Memory that a child may still hold after a text; one with more is replaced. A new one holds 0.1 GiB."""
_FIRST = ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}")
"""Graded before a child is ready: sympy loads parts of itself on first use, which no text's deadline should pay for."""
_MAX_ERROR_CHARS = 500
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""numpy would start a thread for every core; a child has no use for them."""


class Verdict(NamedTuple):
    """A reward in [0, 1] and how it came about; `detail` is empty unless the cause is "error"."""

    reward: float
    cause: GradeCause
    detail: str = ""


class GradingPool:
    """A fixed number of children; safe to use from several threads."""

    def __init__(self, num_processes: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for _ in range(num_processes):
            self._idle.put(_Child(timeout_s))
        # As many threads as children: a thread that starts on a text always finds an idle child.
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="grading")

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (response text, reference answer) pairs, in order; bounded by the deadline of each text.

        Raises:
            WorkerError: a child cannot be started or killed.
        """
        return list(self._threads.map(self._grade_one, pairs))

    def close(self) -> None:
        """End all children; texts in progress are abandoned."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get_nowait().kill()

    def _grade_one(self, pair: tuple[str, str]) -> Verdict:
        child = self._idle.get_nowait()
        try:
            if not child.is_alive:  # ended by someone else while idle: not this text's fault
                child.kill()
                child = _Child(self._timeout_s)
            return child.grade(*pair)
        finally:
            self._idle.put(child if child.is_alive else _Child(self._timeout_s))


class _Child:
    """One grading process and our end of its pipe."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._is_ready = False
        self._pipe, theirs = Pipe()
        _bound(self._pipe, timeout_s)
        environment = os.environ | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(timeout_s)],
                pass_fds=(theirs.fileno(),),
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent
            )

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def grade(self, text: str, answer: str) -> Verdict:
        """The child's verdict; afterwards the child is ready for the next text, or dead."""
        try:
            self._wait_until_ready()
            self._pipe.send_bytes(json.dumps([text, answer]).encode())
            if not self._pipe.poll(self._timeout_s):
                self.kill()
                return Verdict(0.0, "timeout")
            reply = json.loads(self._pipe.recv_bytes())
        except BlockingIOError:  # it hangs in the middle of the text, or of the reply
            self.kill()
            return Verdict(0.0, "timeout")
        except (EOFError, OSError):
            status = self.kill()
            if status == -signal.SIGALRM:
                return Verdict(0.0, "timeout")
            if status == VIOLATION_STATUS:
                return Verdict(0.0, "error", "the text made the grading process reach for files, programs or sockets")
            return Verdict(0.0, "error", f"the grading process ended with status {status}")
        if reply["has_grown"]:
            self.kill()
        if "error" in reply:
            return Verdict(0.0, "error", reply["error"])
        return Verdict(reply["reward"], "graded")

    def kill(self) -> int:
        """End the process with SIGKILL, wait until it is gone, and return its exit status."""
        self._process.kill()
        try:
            status = self._process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise WorkerError(
                f"The grading process {self._process.pid} is still there {KILL_TIMEOUT_S:g} s after it was killed: "
                "look at the state of the machine's kernel and disks."
            ) from error
        self._pipe.close()
        return status

    def _wait_until_ready(self) -> None:
        if self._is_ready:
            return
        try:
            self._is_ready = self._pipe.poll(START_TIMEOUT_S) and self._pipe.recv_bytes() == b"ready"
        except EOFError:
            self._is_ready = False
        if not self._is_ready:
            status = self.kill()
            raise WorkerError(
                f"A grading process did not start within {START_TIMEOUT_S:g} s (exit status {status}); its standard "
                "error says why, most likely math-verify cannot be imported."
            )


def _bound(pipe: Connection, timeout_s: float) -> None:
    """Have reads and writes fail with BlockingIOError where the other side takes or gives nothing for so long."""
    seconds = int(timeout_s)
    timeval = struct.pack("@ll", seconds, max(1, int(1e6 * (timeout_s - seconds))))  # all zero would be for ever
    with socket.socket(fileno=os.dup(pipe.fileno())) as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)


def _serve(pipe: Connection, timeout_s: float) -> None:
    """The child's loop: one JSON pair in, one JSON verdict out, until the pipe closes."""
    from trace_rl.rewards import grade_text

    grade_text(*_FIRST)
    limit_resources(MAX_TEXT_BYTES)
    refuse_side_effects()
    pipe.send_bytes(b"ready")
    while True:
        try:
            text, answer = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)  # ends this process if the parent is gone by then
        try:
            reply: dict[str, float | str] = {"reward": grade_text(text, answer)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply["has_grown"] = resident_bytes() > MAX_KEPT_BYTES
        pipe.send_bytes(json.dumps(reply).encode())


def _main() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
    _serve(Connection(int(sys.argv[1])), float(sys.argv[2]))


if __name__ == "__main__":
    _main()
