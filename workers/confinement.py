"""What a grading process may do once it is ready: compute, and talk over the pipe that it has.

Nothing that it grades should ever run as code (`trace_rl.rewards` sees to that). Should a library evaluate text all the
same, the process still gets no further: an audit hook ends it before it starts a program, opens a socket, loads a
library by hand, or changes a file, and the kernel lets it write no bytes to files, open only a few of them, and take no
more than its share of memory. Who looks at its exit status sees `VIOLATION_STATUS` and counts an error.

The hook is a second line, not a sandbox: code that runs in the process can find ways around it.

This module must not know what is graded, nor who waits for it.
"""

from __future__ import annotations

import logging
import os
import resource
import sys

VIOLATION_STATUS = 77
"""Exit status of a process that tried what it may not."""
MAX_FILES = 64
"""Descriptors of a process; its imports read one file at a time."""

_REFUSED = frozenset(
    {
        "os.chmod",
        "os.chown",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.kill",
        "os.killpg",
        "os.link",
        "os.mkdir",
        "os.posix_spawn",
        "os.putenv",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.symlink",
        "os.system",
        "os.truncate",
        "os.unsetenv",
        "subprocess.Popen",
    }
)
_REFUSED_FAMILIES = ("ctypes.dl", "pty.", "shutil.", "socket.", "webbrowser.")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

logger = logging.getLogger(__name__)


def limit_resources(more_bytes: int) -> None:
    """Bound address space, files and processes of this process for good; no core dumps, no bytes into files.

    A hard limit below what is asked for stays.

    Args:
        more_bytes: address space beyond what the process has now, which depends on its libraries.
    """
    for kind, most in (
        (resource.RLIMIT_AS, _pages()[0] * resource.getpagesize() + more_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MAX_FILES),
        (resource.RLIMIT_NPROC, 0),  # the kernel exempts root from this one
    ):
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))


def refuse_side_effects() -> None:
    """From now on end this process when it tries to reach anything outside of itself.

    Modules may still be imported, but their byte code is no longer kept.
    """
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)


def resident_bytes() -> int:
    """Memory that this process holds."""
    return _pages()[1] * resource.getpagesize()


def _pages() -> tuple[int, int]:
    """Size and resident part of this process, in pages."""
    with open("/proc/self/statm", "rb") as counts:
        size, resident, *_ = counts.read().split()
    return int(size), int(resident)


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        is_refused = _is_for_writing(arguments)
    else:
        is_refused = event in _REFUSED or event.startswith(_REFUSED_FAMILIES)
    if is_refused:
        logger.error("Text that was graded tried %s with %.200r; its process ends.", event, arguments)
        os._exit(VIOLATION_STATUS)


def _is_for_writing(arguments: tuple[object, ...]) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return not set("wxa+").isdisjoint(mode)
    return isinstance(flags, int) and bool(flags & _WRITING)
