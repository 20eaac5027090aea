"""What an actor says of itself: an id for each of its lives, and signs of life, with its memory, to its run's board.

Light to import: roles import it, and checks that start nothing import roles. Who reads the board is
`trace_rl.workers.heartbeat`, who waits for another life `trace_rl.workers.revival`.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
import uuid
from typing import Any, NamedTuple

_GIB = 2**30
_VARIABLE = "TRACE_RL_HEARTBEAT"


class Memory(NamedTuple):
    """Peaks over the life of a process, in GiB."""

    host: float
    """Resident pages, shared ones too."""
    device: float
    """In use on its first GPU, whoever uses it; 0 without one."""


def new_life() -> str:
    """An id for `life`, to be made as an actor starts."""
    return uuid.uuid4().hex


def variables(board: str, role: str, every_s: float) -> dict[str, str]:
    """Environment by which the process of a role knows whom to tell what."""
    return {_VARIABLE: f"{board}|{role}|{every_s:g}"}


def begin(life: str) -> None:
    """Give signs of life from now on, where the environment says so; called by an actor once it has been made."""
    told = os.environ.get(_VARIABLE)
    if told:
        board, role, every_s = told.split("|")
        threading.Thread(target=_beat, args=(board, role, float(every_s), life), daemon=True, name="heartbeat").start()


def _beat(name: str, role: str, every_s: float, life: str) -> None:
    import ray
    from ray.exceptions import RayError

    board: Any = None
    device_gib = 0.0
    while True:
        device_gib = max(device_gib, _device_gib())
        host_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
        try:
            board = board or ray.get_actor(name)
            board.beat.remote(role, life, Memory(host_gib, device_gib))
        except (RayError, ValueError):  # it is being started again
            board = None
        time.sleep(every_s)


def _device_gib() -> float:
    torch = sys.modules.get("torch")
    if torch is None or not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return 0.0
    try:
        return float(torch.cuda.device_memory_used(0) / _GIB)
    except Exception:  # NVML is missing or forbidden, which costs a figure and nothing else
        return 0.0
