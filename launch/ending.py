"""Ends Ray for this process within a bound, also where a process of Ray itself hangs.

`ray.shutdown` waits for the word of the node's own process without a deadline; hung workers do not hold it up. Must not
know roles or runs.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import psutil
import ray

logger = logging.getLogger(__name__)

_PATIENCE_S = 30.0
"""A shutdown takes two seconds."""


def end_ray() -> None:
    """`ray.shutdown`; the processes of a private Ray that do not answer are killed.

    A node of a cluster that was joined is not ours to kill: there, a warning says what is waited for.
    """
    is_over = threading.Event()
    node = ray._private.worker._global_node
    watchdog = threading.Thread(target=_end_what_hangs, args=(node, is_over), daemon=True, name="end of Ray")
    watchdog.start()
    try:
        ray.shutdown()
    finally:
        is_over.set()


def _end_what_hangs(node: Any, is_over: threading.Event) -> None:
    if is_over.wait(_PATIENCE_S):
        return
    started = [info.process.pid for infos in node.all_processes.values() for info in infos]
    parts = [psutil.Process(pid) for pid in started if psutil.pid_exists(pid)]
    if not parts:
        logger.warning("Ray's own process on this node does not let go; end this program with Ctrl-C or kill")
    for process in [*(child for part in parts for child in part.children(recursive=True)), *parts]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
