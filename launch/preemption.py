"""SIGTERM, by which batch systems and Kubernetes tell a run to leave its place: it keeps what it has done, and ends.

Decides how long that may take. The run asks between its stages whether it was told (`is_asked`); where it does not end
within its grace it is interrupted as by Ctrl-C, and where that does not help within `_LAST_S` the process is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM
_LAST_S = 60.0
"""For Ray to shut down; see `trace_rl.launch.ending`."""


class Preemption:
    """`with Preemption(grace_s) as preemption:` in the main thread, once Ray has set its own handler."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._asked = threading.Event()
        self._over = threading.Event()

    def __enter__(self) -> Preemption:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        signal.signal(signal.SIGTERM, self._before)

    def is_asked(self) -> bool:
        """Whether the run was told to end."""
        return self._asked.is_set()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            return
        self._asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
        threading.Thread(target=self._insist, daemon=True, name="grace after SIGTERM").start()

    def _insist(self) -> None:
        logger.warning("SIGTERM: the run keeps what it has done and ends, within %g s", self._grace_s)
        if self._over.wait(self._grace_s):
            return
        logger.warning("The run did not end within %g s after SIGTERM (run.preemption_grace_s)", self._grace_s)
        os.kill(os.getpid(), signal.SIGINT)
        if not self._over.wait(_LAST_S):
            os._exit(EXIT_CODE)
