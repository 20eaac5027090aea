"""Where a worker process of Ray runs, which log it writes, and what of that log tells why it ended.

Decides how a process is found behind a reference or in what Ray says of a failure; which line of a log is worth quoting
is decided by `trace_rl.workers.last_words`. Must not know roles, or what was waited for.

Invariants: nothing here raises, and no look-up takes longer than `LOOKUP_S`, because a failure must not hide behind the
search of its log; what cannot be found out is left out.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray

from trace_rl.workers.last_words import ANSI, last_words

Result = TypeVar("Result")

LOOKUP_S = 5.0
"""How long Ray's head may take to tell of an actor; it may be what hangs."""

_IN_TASK = re.compile(r"\(pid=(?P<pid>\d+), ip=(?P<node>[\w.:]+)")
_OF_DEAD = re.compile(r"^\tpid: (?P<pid>\d+)$.*?^\tip: (?P<node>[\w.:]+)$", re.MULTILINE | re.DOTALL)
_OF_OOM = re.compile(r"\(IP: (?P<node>[\w.:]+),.*?Selected to kill: .*?\bpid=(?P<pid>\d+)", re.DOTALL)

_kept: dict[str, Path] = {}


def keep_in(folder: Path) -> None:
    """Have logs of the present Ray session named by where they will lie at its end: Ray's own folder goes with it."""
    _kept[_session_name()] = folder


@dataclass(frozen=True)
class WorkerProcess:
    """A process of Ray, alive or dead."""

    node: str
    """Its node's IP address."""
    pid: int

    @property
    def place(self) -> str:
        """Node and log, for an error: "node 10.0.0.3, log runs/demo/logs/worker-...-4711.err"."""
        return f"node {self.node}, log {_quietly(self._log, f'worker-*-{self.pid}.err')}"

    def last_words(self) -> str:
        """The line of its log that tells why it ended; empty where there is none, or the log is on another node."""
        return _quietly(lambda: last_words(self._files(f"worker-*-{self.pid}.*")), "")

    def _log(self) -> str:
        pattern = f"worker-*-{self.pid}.err"
        found = self._files(pattern)
        folder = _kept.get(_session_name())
        if found:
            return str(folder / found[-1].name if folder else found[-1])
        return str(_log_folder() / pattern)

    def _files(self, pattern: str) -> list[Path]:
        """Its logs, if they lie on this node; the newest last, because the system gives process ids again."""
        if self.node != ray.util.get_node_ip_address():
            return []
        return sorted(_log_folder().glob(pattern), key=lambda file: file.stat().st_mtime)


def process_in(said: str) -> WorkerProcess | None:
    """The process in which what Ray says began: the last one of a chain that it names."""
    for pattern in (_OF_OOM, _OF_DEAD, _IN_TASK):
        if found := list(pattern.finditer(ANSI.sub("", said))):
            return WorkerProcess(found[-1]["node"], int(found[-1]["pid"]))
    return None


def whereabouts(reference: Any) -> str:
    """Where the actor that was called lives, as an error tells it; empty where that cannot be found out.

    Args:
        reference: what a call of an actor returned, or a stream of it.
    """
    return _quietly(lambda: _whereabouts(getattr(reference, "_generator_ref", reference)), "")


def whereabouts_of_actor(actor_id: str) -> str:
    """The same for the id of an actor, in hexadecimal digits."""
    from ray._private import state

    def look_up() -> str:
        actor = _in_time(lambda: state.actors(actor_id))
        if actor.get("State") == "PENDING_CREATION" and not actor["Pid"]:
            return "Ray has not started it: no node has room for it, or its environment is still being set up"
        return WorkerProcess(actor["Address"]["IPAddress"], actor["Pid"]).place if actor.get("Pid") else ""

    return _quietly(look_up, "")


def is_running(actor_id: str) -> bool:
    """Whether Ray takes the actor for alive, and is not starting it, or has given it up; True where it does not say."""
    from ray._private import state

    return _quietly(lambda: _in_time(lambda: state.actors(actor_id)).get("State", "ALIVE") == "ALIVE", True)


def starts_of(actor_id: str) -> tuple[int, WorkerProcess | None]:
    """How often an actor was started again, and its present process; (0, None) where Ray does not say."""
    from ray._private import state

    def look_up() -> tuple[int, WorkerProcess | None]:
        actor = _in_time(lambda: state.actors(actor_id))
        process = WorkerProcess(actor["Address"]["IPAddress"], actor["Pid"]) if actor.get("Pid") else None
        return int(actor.get("NumRestarts", 0)), process

    unknown: tuple[int, WorkerProcess | None] = (0, None)
    return _quietly(look_up, unknown)


def _whereabouts(reference: ray.ObjectRef[Any]) -> str:
    return whereabouts_of_actor(reference.task_id().actor_id().hex())


def _log_folder() -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path())


def _session_name() -> str:
    return str(ray._private.worker._global_node.session_name)


def _in_time(look_up: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found within `LOOKUP_S`, else nothing; a call into Ray cannot be ended, so its thread is left behind."""
    found: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=lambda: found.put(look_up()), daemon=True, name="look up a worker").start()
    try:
        return found.get(timeout=LOOKUP_S)
    except queue.Empty:
        return {}


def _quietly(find: Callable[[], Result], otherwise: Result) -> Result:
    try:
        return find()
    except Exception:  # Ray may be down, and its inner doors may change: the failure itself is still told
        return otherwise
