"""SIGTERM, by which batch systems and Kubernetes tell a run to leave its place: it keeps what it has done, and ends.

Decides how long that may take. The run asks between its stages whether it was told (`is_asked`); where it does not end
within its grace, or has nothing to keep yet, it is interrupted, and where that does not help within `_LAST_S` the
process is gone. However it ends, the exit code is `EXIT_CODE`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType

from trace_rl.errors import PreemptedError

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
        self._has_begun = False

    def __enter__(self) -> Preemption:
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises:
        PreemptedError: in place of the interruption by which the run was ended.
        """
        self._over.set()
        signal.signal(signal.SIGTERM, self._before)
        if not self.is_asked() or kind is None or not issubclass(kind, KeyboardInterrupt):
            return
        if self._has_begun:
            raise PreemptedError(
                f"the run was told to end and did not come to a checkpoint within {self._grace_s:g} s "
                "(run.preemption_grace_s); what it had checkpointed before is kept"
            ) from error
        raise PreemptedError("the run was told to end before its roles were ready; nothing new was to keep") from error

    def has_begun(self) -> None:
        """From here on a run that is told to end has something to keep."""
        self._has_begun = True

    def is_asked(self) -> bool:
        """Whether the run was told to end."""
        return self._asked.is_set()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            return
        self._asked.set()
        if not self._has_begun:
            raise KeyboardInterrupt
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
