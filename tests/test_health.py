"""The states of a role as a table; and a process that is really stopped is noticed, killed and back."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import ray

from trace_rl.config.health import Health
from trace_rl.errors import WorkerError
from trace_rl.workers import life
from trace_rl.workers.health import TRANSITIONS, Event, State, follow, heard
from trace_rl.workers.heartbeat import HeartbeatWatch, open_board
from trace_rl.workers.life import new_life
from trace_rl.workers.revival import life_of
from trace_rl.workers.waiting import wait_for

STATES, EVENTS = get_args(State), get_args(Event)


def walk(*events: Event) -> State:
    state: State = "healthy"
    for event in events:
        state = follow(state, event)
    return state


def test_a_role_that_is_silent_for_a_while_is_suspect_and_well_again_with_a_sign() -> None:
    assert walk("silent") == "suspect"
    assert walk("silent", "silent", "beat") == "healthy"


def test_a_role_is_not_condemned_by_one_look() -> None:
    assert walk("mute") == "suspect" and walk("mute", "mute") == "quarantined"


def test_a_role_that_died_is_used_again_once_it_is_back_and_proven_only() -> None:
    assert walk("lost", "beat", "proven") == "quarantined"
    assert walk("lost", "back", "beat", "silent") == "syncing"
    assert walk("lost", "back", "proven") == "healthy"


@pytest.mark.parametrize(("state", "event"), list(itertools.product(STATES, EVENTS)))
def test_every_state_and_event_leads_where_the_table_says_or_nowhere(state: State, event: Event) -> None:
    assert follow(state, event) == TRANSITIONS.get((state, event), state)


def test_the_dead_stay_dead_and_only_a_proof_makes_a_returned_role_healthy() -> None:
    assert not [key for key in TRANSITIONS if key[0] == "dead"]
    healthy = {key for key, state in TRANSITIONS.items() if state == "healthy"}
    assert healthy == {("suspect", "beat"), ("syncing", "proven")}
    reachable, seen = {"healthy"}, set()
    while reachable - seen:
        state = (reachable - seen).pop()
        seen.add(state)
        reachable |= {after for (before, _), after in TRANSITIONS.items() if before == state}
    assert reachable == set(STATES)


@pytest.mark.parametrize(
    ("silent_s", "event"), [(0, "beat"), (5, "beat"), (5.1, "silent"), (9, "silent"), (9.1, "mute")]
)
def test_silence_is_judged_by_its_length(silent_s: float, event: Event) -> None:
    assert heard(silent_s, suspect_after_s=5, dead_after_s=9) == event


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="each must be longer than the one before"):
        Health(heartbeat_every_s=10, suspect_after_s=10, dead_after_s=300)


class Role:
    def __init__(self) -> None:
        self._life = new_life()
        life.begin(self._life)

    def life(self) -> str:
        return self._life

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def role(local_ray: None) -> Iterator[tuple[Any, Any]]:
    """(board, an actor that gives signs of life on it four times a second)."""
    board, name = open_board()
    variables = life.variables(name, "the role", 0.25)
    options = {"num_cpus": 0, "max_restarts": 1, "runtime_env": {"env_vars": variables}}
    actor = ray.remote(Role).options(**options).remote()
    yield board, actor
    ray.kill(actor)
    ray.kill(board)


def wait_until(is_so: Callable[[], bool], bound_s: float) -> None:
    deadline = time.monotonic() + bound_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.engine
def test_a_process_that_hangs_is_named_killed_and_started_again(
    role: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    board, actor = role
    life, pid = life_of(actor, "the role", 60), ray.get(actor.pid.remote(), timeout=60)
    settings = Health(heartbeat_every_s=0.25, suspect_after_s=1, dead_after_s=3)
    proven: list[str] = []
    with HeartbeatWatch(board, {"the role": actor}, settings, lambda _, life: life in proven) as watch:
        time.sleep(1.5)
        figures = watch.metrics()
        assert 0.01 < figures.pop("memory/role_host_peak_gib") < 4
        assert figures == {"health/not_healthy_roles": 0.0, "health/restarts": 0.0}
        os.kill(pid, signal.SIGSTOP)
        call = actor.pid.remote()
        with pytest.raises(
            WorkerError, match=r"the role died while working: it gave no sign of life for \d+ s \(health"
        ):
            wait_for(call, 30, "the role", "working")
        assert "the role has given no sign of life for" in caplog.text
        again = life_of(actor, "the role", 60)
        assert again != life
        wait_until(lambda: watch.metrics()["health/restarts"] == 1, 20)
        assert watch.metrics()["health/not_healthy_roles"] == 1, "its weights are not proven"
        proven.append(again)
        wait_until(lambda: watch.metrics()["health/not_healthy_roles"] == 0, 20)


@pytest.mark.engine
def test_a_pause_that_ends_in_time_kills_nobody(role: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    board, actor = role
    life, pid = life_of(actor, "the role", 60), ray.get(actor.pid.remote(), timeout=60)
    settings = Health(heartbeat_every_s=0.25, suspect_after_s=0.75, dead_after_s=60)
    with HeartbeatWatch(board, {"the role": actor}, settings, lambda *_: True) as watch:
        time.sleep(1)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: watch.metrics()["health/not_healthy_roles"] == 1, 10)
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: watch.metrics()["health/not_healthy_roles"] == 0, 10)
    assert life_of(actor, "the role", 60) == life
