"""What an actor says of itself: an id for each of its lives, and signs of life to the board of its run.

Light to import: roles import it, and checks that start nothing import roles. Who reads the board is
`trace_rl.workers.heartbeat`, who waits for another life `trace_rl.workers.revival`.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from typing import Any

_VARIABLE = "TRACE_RL_HEARTBEAT"


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
    while True:
        try:
            board = board or ray.get_actor(name)
            board.beat.remote(role, life)
        except (RayError, ValueError):  # it is being started again
            board = None
        time.sleep(every_s)
