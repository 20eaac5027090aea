"""One process at a time writes a folder: a lock on a file in it, which tells who holds it.

Decides who may write. Must not know what is written. The lock is the kernel's (flock) and advisory: it ends with the
process that holds it, however that ends, so that nothing has to be cleaned up. NFSv4 carries it to the other nodes that
see the folder; Lustre does when it is mounted with `flock`. Where a file system knows no locks the process goes on
with a warning.

Invariants: the file stays when the lock is let go, and tells who held it last; to look takes the lock for a moment,
which `held` waits out.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trace_rl.errors import ConfigError

logger = logging.getLogger(__name__)

State = Literal["held", "free", "unknown"]
"""`unknown`: there is no such file, or it cannot be told."""

_OTHERS_LOOK_S = 0.5
_PAUSE_S = 0.05
_HOLDER_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock, or did."""

    process: int
    host: str
    since_s: float
    """Since 1970."""
    working_folder: str

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since_s))
        return f"process {self.process} on host {self.host} since {since}"


@contextmanager
def held(file: Path, what: str, instead: str) -> Iterator[None]:
    """Hold the lock for the time of the block.

    Args:
        what: begins the sentence of the refusal, for example "runs/demo is being written".
        instead: what to do then.

    Raises:
        ConfigError: another process holds it.
    """
    with file.open("a+", encoding="utf-8") as opened:
        try:
            is_held = _take(opened.fileno())
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s), so nothing keeps a second process from writing to this folder", file, error
            )
            is_held = True
        if not is_held:
            _, holder = look(file)
            raise ConfigError(f"{what} already by {holder or 'another process'}; {instead}")
        opened.truncate(0)
        opened.write(json.dumps(asdict(Holder(os.getpid(), socket.gethostname(), time.time(), os.getcwd()))) + "\n")
        opened.flush()
        yield


def look(file: Path) -> tuple[State, Holder | None]:
    """Whether the lock is held, and who holds it or was the last to."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # the file may be a pipe that nobody writes to
    except OSError:
        return "unknown", None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return "unknown", None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return "free", _holder(descriptor)
    except BlockingIOError:
        return "held", _holder(descriptor)
    except OSError:
        return "unknown", _holder(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    deadline = time.monotonic() + _OTHERS_LOOK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_S)


def _holder(descriptor: int) -> Holder | None:
    try:
        told = json.loads(os.pread(descriptor, _HOLDER_BYTES, 0))
        found = Holder(int(told["process"]), str(told["host"]), float(told["since_s"]), str(told["working_folder"]))
        time.localtime(found.since_s)  # it may be no time at all
        return found
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):  # it is being written, or torn
        return None
