"""Actors that Ray starts again: who is waited for, and who is not."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from trace_rl.errors import DeadlineError, WorkerError
from trace_rl.workers.life import new_life
from trace_rl.workers.revival import Lives, life_of, wait_until_ready

pytestmark = pytest.mark.engine


class Role:
    def __init__(self, fault: str = "") -> None:
        if fault == "dies":
            time.sleep(1.5)  # as one that loads weights first
            print("RuntimeError: no memory left for the weights", file=sys.stderr, flush=True)
            os._exit(3)
        if fault == "raises":
            raise MemoryError("no memory left")
        if fault == "hangs":
            time.sleep(600)
        self._life = new_life()

    def ready(self) -> bool:
        return True

    def life(self) -> str:
        return self._life

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def start(local_ray: None) -> Iterator[Callable[..., Any]]:
    actors: list[Any] = []

    def begin(fault: str = "", max_restarts: int = 10) -> Any:
        actors.append(ray.remote(Role).options(num_cpus=0, max_restarts=max_restarts).remote(fault))
        return actors[-1]

    yield begin
    for actor in actors:
        ray.kill(actor)


def kill(actor: Any) -> None:
    os.kill(ray.get(actor.pid.remote(), timeout=60), signal.SIGKILL)


def test_a_role_that_dies_as_it_starts_is_an_error_and_no_loop(start: Callable[..., Any]) -> None:
    began = time.monotonic()
    with pytest.raises(
        WorkerError, match=r'the role died while starting: .* "RuntimeError: no memory left for the wei'
    ):
        wait_until_ready(start("dies"), "the role", 120)
    assert time.monotonic() - began < 60


def test_a_role_that_raises_or_hangs_as_it_starts_is_named(start: Callable[..., Any]) -> None:
    with pytest.raises(WorkerError, match=r"the role died while starting: .*no memory left"):
        wait_until_ready(start("raises"), "the role", 60)
    with pytest.raises(DeadlineError, match="the role did not finish starting within 2 s"):
        wait_until_ready(start("hangs"), "the role", 2)
    wait_until_ready(start(), "the role", 60)


def test_a_role_that_died_is_waited_for_and_begins_another_life(start: Callable[..., Any]) -> None:
    actor = start(max_restarts=1)
    engines = Lives([actor], 60)
    life = engines.life(0)
    assert engines.recover(0, life) is False
    kill(actor)
    time.sleep(0.5)
    assert engines.recover(0, life) is True and engines.life(0) != life
    kill(actor)
    time.sleep(0.5)
    with pytest.raises(WorkerError, match="the role died while starting again"):
        life_of(actor, "the role", 60)
