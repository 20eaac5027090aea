"""What a user hears of a role that failed, died or hangs: the first cause, its node and its log, in a sentence."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError

from trace_rl.errors import ModelError, WeightSyncError, WorkerError
from trace_rl.workers import worker_logs
from trace_rl.workers.waiting import wait_for, worker_error

LOG = r"\(node [\d.]+, log (?P<log>/.*/worker-[0-9a-f]{56}-[0-9a-f]{8}-\d+\.err)\)$"
"""Where the process was: its whole log file, on this node."""

# What Ray 2.60 said to real failures, shortened in the middle.
KILLED_FOR_MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the node \
(IP: 10.0.0.7, ID: 355f027f1b5e) was 22.70GB used / 23.54GB limit (0.964316)
OOM kill reason: Memory usage 24373403520B exceeded threshold of 24012677120B (95.0% of 25276502016B limit)
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Actor(82faed940f02cae050913bdf01000000): job ID=01000000, task name=A.__init__, \
required resources={}, pid=13999, actual memory used=0.04GB, worker ID=1ea598a504ab5ebbd4cd)
]
Top 10 memory users: PID	MEM(GB)	COMMAND
13830	0.10	python
"""
NODE_DIED = """The actor died unexpectedly before finishing this task.
	class_name: GeneratorEngine
	actor_id: fb50dd5f79269511b3bec02e01000000
	pid: 17083
	namespace: 9a830532-de57-4ce0-8060-1c8bb895a97b
	ip: 10.0.0.7
The actor died because its node has died. Node Id: 4e590ccf4cf26609750c852050cab491d9923ff5230bc2871775bcc8
	the actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"""
UNREACHABLE = """The actor is temporarily unavailable: RpcError: RPC error: failed to connect to all addresses; last \
error: UNKNOWN: ipv4:10.0.0.7:44745: Failed to connect to remote host: Connection refused rpc_code: 14"""


class Role:
    """Ends in every way in which a process can."""

    def __init__(self, start: str = "well") -> None:
        if start == "raises":
            raise ModelError("the model has no head")
        if start == "hangs":
            time.sleep(600)

    def ready(self) -> int:
        return os.getpid()

    def is_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def leaves(self) -> None:
        print("RuntimeError: the licence has run out", file=sys.stderr, flush=True)
        sys.exit(3)

    def crashes(self) -> None:
        ctypes.string_at(0)

    def is_told_to_end(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    def raises(self) -> None:
        try:
            raise LookupError("no such row")
        except LookupError as error:
            raise MemoryError("no memory left for the KV cache") from error

    def refuses(self) -> None:
        raise WeightSyncError("two engines differ")

    def hangs(self) -> None:
        time.sleep(600)

    def asks(self, other: Any) -> None:
        ray.get(other.is_killed.remote())

    def takes(self, given: object) -> object:
        return given


@pytest.fixture
def start(local_ray: None) -> Iterator[Callable[..., Any]]:
    """Starts roles that take no room; they are ended with the test."""
    actors: list[Any] = []

    def begin(*arguments: object, **options: Any) -> Any:
        actors.append(ray.remote(Role).options(**{"num_cpus": 0, **options}).remote(*arguments))
        return actors[-1]

    yield begin
    for actor in actors:
        ray.kill(actor)


def said_of(reference: Any, timeout_s: float = 30.0) -> str:
    with pytest.raises(WorkerError) as raised:
        wait_for(reference, timeout_s, "the role", "working")
    return str(raised.value)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("end", "fate"),
    [
        ("is_killed", r"its process crashed or was killed, as by the kernel's out-of-memory killer, .* dmesg"),
        ("leaves", r'its process ended with exit code 3; its log says "RuntimeError: the licence has run out"'),
        ("crashes", r'its process crashed or was killed; its log says "Fatal Python error: Segmentation fault"'),
        ("is_told_to_end", r"its process was told to end \(SIGTERM\)"),
    ],
)
def test_a_death_is_told_with_its_kind_the_last_words_and_the_log(
    start: Callable[..., Any], end: str, fate: str
) -> None:
    assert_said(said_of(getattr(start(), end).remote()), f"the role died while working: {fate} {LOG}")


@pytest.mark.engine
def test_an_exception_is_told_without_its_stack(start: Callable[..., Any]) -> None:
    said = said_of(start().raises.remote())
    assert_said(said, rf"the role failed while working: MemoryError: no memory left for the KV cache {LOG}")
    assert len(said.splitlines()) == 1


@pytest.mark.engine
def test_an_error_of_ours_is_told_as_it_is(start: Callable[..., Any]) -> None:
    with pytest.raises(WeightSyncError, match=r"^two engines differ$"):
        wait_for(start().refuses.remote(), 30, "the role", "working")


@pytest.mark.engine
def test_a_role_that_cannot_start_says_why(start: Callable[..., Any]) -> None:
    assert_said(said_of(start("raises").ready.remote()), rf"the role died while working: the model has no head {LOG}")


@pytest.mark.engine
def test_who_only_depends_on_the_dead_is_not_blamed(start: Callable[..., Any]) -> None:
    fate = "because the actor Role died: its process crashed or was killed"
    healthy, dying = start(), start()
    process = wait_for(dying.ready.remote(), 30, "the role", "starting")
    said = said_of(healthy.takes.remote(dying.is_killed.remote()))
    assert_said(said, rf"the role failed while working, {fate}.* {LOG}")
    assert said.endswith(f"-{process}.err)")
    assert_said(said_of(healthy.asks.remote(start())), rf"the role failed while working, {fate}.* {LOG}")


@pytest.mark.engine
@pytest.mark.parametrize("hung", ["working", "starting"])
def test_a_deadline_names_the_log_of_who_is_waited_for(start: Callable[..., Any], hung: str) -> None:
    if hung == "working":
        role = start()
        wait_for(role.ready.remote(), 30, "the role", "starting")
        said = said_of(role.hangs.remote(), 0.2)
    else:
        reference = start("hangs").ready.remote()
        deadline = time.monotonic() + 30
        while not worker_logs.whereabouts(reference).startswith("node "):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        said = said_of(reference, 0.2)
    assert_said(said, rf"the role did not finish working within 0\.2 s {LOG}")


@pytest.mark.engine
def test_a_role_that_has_no_room_is_told_from_one_that_hangs(start: Callable[..., Any]) -> None:
    said = said_of(start(num_cpus=1000).ready.remote(), 0.5)
    assert "within 0.5 s (Ray has not started it: no node has room for it" in said


@pytest.mark.engine
def test_logs_of_a_private_ray_are_named_where_they_will_be_kept(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_logs, "_kept", {})
    worker_logs.keep_in(Path("runs/demo/logs"))
    assert ", log runs/demo/logs/worker-" in said_of(start().raises.remote())


@pytest.mark.engine
@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OutOfMemoryError(KILLED_FOR_MEMORY),
            "the role died while working: Ray killed it because its node ran out of memory (22.70GB of 23.54GB were in "
            "use); give the role more room, or ask less of it (node 10.0.0.7, log ",
        ),
        (
            RayActorError("fb50dd5f79269511b3bec02e01000000", NODE_DIED),
            "the role died while working: its node went down, or lost its connection to the head node "
            "(node 10.0.0.7, log ",
        ),
        (
            ActorUnavailableError(UNREACHABLE, None),
            "the role died while working: it cannot be reached any more: its process or its node is gone, or the "
            "network between",
        ),
    ],
)
def test_what_happens_to_nodes_is_told_in_a_sentence(local_ray: None, error: RayError, sentence: str) -> None:
    said = str(worker_error(error, "the role", "working"))
    assert said.startswith(sentence)
    if "10.0.0.7" in sentence:  # not this node: its files cannot be looked at
        assert said.endswith("/logs/worker-*-17083.err)") or said.endswith("/logs/worker-*-13999.err)")
    assert len(said.splitlines()) == 1


@pytest.mark.engine
def test_a_head_node_that_does_not_answer_costs_the_place_and_little_time(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_logs, "LOOKUP_S", 0.2)
    monkeypatch.setattr("ray._private.state.actors", lambda actor_id: time.sleep(3))
    reference = start().hangs.remote()
    started = time.monotonic()
    assert said_of(reference, 0.2) == "the role did not finish working within 0.2 s; its log tells more"
    assert time.monotonic() - started < 2


@pytest.mark.engine
def test_exceptions_that_a_process_survived_are_not_its_last_words(start: Callable[..., Any]) -> None:
    role = start()
    process = worker_logs.WorkerProcess(
        ray.util.get_node_ip_address(), wait_for(role.ready.remote(), 30, "the role", "starting")
    )
    (log,) = process._files(f"worker-*-{process.pid}.err")
    with log.open("a") as file:
        file.write("ValueError: a request was odd\n" + 40 * "INFO all is well again\n")
    assert process.last_words() == ""
    with log.open("a") as file:
        file.write("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\nException ignored in atexit\n")
    assert process.last_words().startswith("torch.OutOfMemoryError: CUDA out of memory.")


def assert_said(said: str, pattern: str) -> None:
    import re

    found = re.match(pattern, said)
    assert found, said
    assert Path(found["log"]).is_file()
