"""Signs of life: every role's process gives one every few seconds, and the driver acts where they stop.

A thread in each process tells a board, an actor of its own, that it is there. A process that was stopped, that thrashes
or that holds Python's lock tells nothing, nor does one whose node is cut off; one that waits for others tells, and is
bounded by the deadlines of its callers. The driver reads the board; a role that is mute is killed, whereupon whoever
waits for it finds it dead and acts as for any death. Which state a role is in is decided by `trace_rl.workers.health`.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayError

from trace_rl.config.health import Health
from trace_rl.workers.health import State, follow, heard
from trace_rl.workers.life import Memory
from trace_rl.workers.waiting import condemn
from trace_rl.workers.worker_logs import is_running

logger = logging.getLogger(__name__)

_READ_S = 30.0


class Sign(NamedTuple):
    """The last sign of life of a role."""

    silent_s: float
    """Since it was given."""
    life: str
    memory: Memory


class Board:
    """Who gave a sign of life when; made an actor by `open_board`."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, str, Memory]] = {}

    def beat(self, role: str, life: str, memory: Memory) -> None:
        """A role is there, in this life."""
        self._last[role] = time.monotonic(), life, memory

    def read(self) -> dict[str, Sign]:
        """By role."""
        now = time.monotonic()
        return {role: Sign(now - at, life, memory) for role, (at, life, memory) in self._last.items()}


def open_board() -> tuple[Any, str]:
    """The board of a run, beside its driver, and the name by which roles find it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"heartbeats-{uuid.uuid4().hex}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"name": name, "num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return ray.remote(Board).options(**options).remote(), name


class HeartbeatWatch:
    """`with HeartbeatWatch(...):` reads the board and kills who is mute.

    Args:
        actors: by role. Those that have never given a sign are not judged: their start has a deadline of its own.
        is_proven: whether a role may be used in this life; an engine may once its weights are proven.
    """

    def __init__(
        self, board: Any, actors: Mapping[str, Any], settings: Health, is_proven: Callable[[str, str], bool]
    ) -> None:
        self._board = board
        self._actors = dict(actors)
        self._settings = settings
        self._is_proven = is_proven
        self._states: dict[str, State] = dict.fromkeys(actors, "healthy")
        self._lives: dict[str, str] = {}
        self._peaks: dict[str, Memory] = {}
        self._restarts = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat watch")

    def __enter__(self) -> HeartbeatWatch:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join(_READ_S)

    def metrics(self) -> dict[str, float]:
        """How many roles are not healthy, how many were started again so far, and the peaks of their memory."""
        states = list(self._states.values())
        found = {
            "health/not_healthy_roles": float(len(states) - states.count("healthy")),
            "health/restarts": float(self._restarts),
        }
        for role, peak in dict(self._peaks).items():
            kind = re.sub(r"^the | \d+$", "", role).replace(" ", "_")  # of several the largest
            for name, gib in peak._asdict().items():
                figure = f"memory/{kind}_{name}_peak_gib"
                if gib:
                    found[figure] = max(gib, found.get(figure, 0.0))
        return found

    def _watch(self) -> None:
        while not self._is_over.wait(self._settings.heartbeat_every_s):
            self._look()

    def _look(self) -> None:
        try:
            signs: dict[str, Sign] = ray.get(self._board.read.remote(), timeout=_READ_S)
        except (RayError, GetTimeoutError):  # the board itself was lost; roles tell its successor
            return
        for role, sign in signs.items():
            if role not in self._states or self._is_over.is_set():
                continue
            before = self._peaks.get(role, sign.memory)
            self._peaks[role] = Memory(*(max(pair) for pair in zip(before, sign.memory, strict=True)))
            self.judge(role, sign.silent_s, sign.life)

    def judge(self, role: str, silent_s: float, life: str) -> None:
        """Move a role to its next state, and act on it."""
        settings, before = self._settings, self._states[role]
        event = heard(silent_s, settings.suspect_after_s, settings.dead_after_s)
        state = follow(before, event)
        if self._lives.setdefault(role, life) != life:
            state = follow(follow(state, "lost"), "back")
            self._restarts += 1
            logger.warning("%s died and was started again", role)
        self._lives[role] = life
        if state == "syncing" and self._is_proven(role, life):
            state = follow(state, "proven")
        self._states[role] = state
        if state == "suspect" and before == "healthy":
            logger.warning("%s has given no sign of life for %.0f s", role, silent_s)
        if state == "quarantined" and before != "quarantined" and is_running(self._actors[role]._actor_id.hex()):
            sentence = (
                f"it gave no sign of life for {silent_s:.0f} s (health.dead_after_s is {settings.dead_after_s:g}) and "
                "was killed"
            )
            logger.warning("%s: %s", role, sentence)
            condemn(self._actors[role], sentence)
            ray.kill(self._actors[role], no_restart=False)
