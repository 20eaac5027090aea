"""Faults of roles in a running crew: what is killed, hangs or is slow changes no figure; what is garbled is refused.

A crew without faults takes some steps; another one takes the same steps while a role of it is killed, stopped for good,
or stopped for a while, in the midst of its work. Each of its steps must give the very figures of the first crew, within
its bound. Faults come from outside, by signals, and garbled answers by a handle that stands before the actor's.

Ranks of the learner and the driver are not here: with them the run starts again (benchmarks/kill_anywhere.py, and
tests/test_restarts.py). docs/faults.md has the whole matrix.
"""

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from rich.console import Console

from trace_rl.absent import AbsentLedger
from trace_rl.errors import WorkerError
from trace_rl.launch import preflight
from trace_rl.launch.display import Display
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.roles import start_roles
from trace_rl.launch.run_folder import RunFolder
from trace_rl.loop import train
from trace_rl.overlays import load_config
from trace_rl.workers.generator import Recovery

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(900)]

CONFIGS = Path(str(resources.files("trace_rl.configs")))
DEAD_AFTER_S = 12.0
SMALL = [
    "sampling.prompts_per_step=4",
    "sampling.samples_per_prompt=4",
    "sampling.max_response_tokens=64",
    "teacher.max_tokens_per_batch=256",  # prompts are scored one by one, while others are sampled
    "learner.world_size=1",
    "teacher.weights=live",
    "evaluation.every=0",
    "logging.diagnostics_every=0",
    "logging.token_figures=known",
    "run.steps=1000",
    "health.heartbeat_every_s=0.5",
    "health.suspect_after_s=3",
    f"health.dead_after_s={DEAD_AFTER_S:g}",
]
ROLES = {  # class, the stage in which it works, and how long after its begin it is in the midst of that
    "engine": ("GeneratorEngine", "rollout", 0.15),
    "rewarder": ("MathRewarder", "rollout", 0.05),
    "annotator": ("SpanAnnotator", "rollout", 0.05),
    "teacher": ("TeacherModel", "rollout", 0.02),  # it takes the policy's weights
}
BOUNDS_S = {"kill": 90.0, "hang": 90.0 + DEAD_AFTER_S, "slow": 30.0}
"""An engine takes half a minute to start where nothing else runs; a step less than two seconds."""
CELLS = [(fault, role) for role in ROLES for fault in ("slow", "kill", "hang")]
WHILE_SCORING = ("kill", "hang")
OWN = ("time/", "clock/", "idle/", "busy/", "health/", "memory/", "sync/", "annotation/wait", "learner/duration_s")
"""Beginnings of what may differ: times, and what is told of restarts."""


def process_of(role: str) -> int:
    from ray._private import state

    actors = [actor for actor in state.actors().values() if actor["ActorClassName"] == role]
    return min(int(actor["Pid"]) for actor in actors if actor["State"] == "ALIVE")


def inflict(fault: str, pid: int) -> None:
    if fault == "kill":
        os.kill(pid, signal.SIGKILL)
        return
    os.kill(pid, signal.SIGSTOP)
    if fault == "slow":
        threading.Timer(4.0, os.kill, (pid, signal.SIGCONT)).start()


class Faulty(RunJournal):
    """The run's own journal, which has a fault happen a while after a stage has begun."""

    plan: tuple[str, str] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.plan is not None and ROLES[self.plan[1]][1] == name:
            fault, role = self.plan
            self.plan = None
            threading.Timer(ROLES[role][2], inflict, (fault, process_of(ROLES[role][0]))).start()
        with super().stage(name):
            yield


class _NoCheckpoints:
    def save(self, *_: object) -> None:
        """Not what is looked at."""


class Crew:
    def __init__(self, folder: Path, *settings: str) -> None:
        ready = preflight.check(load_config([CONFIGS / "demo.yaml"], [*SMALL, *settings, f"run.folder={folder}"]))
        self._config = ready.config
        folder.mkdir(parents=True)
        self.journal = Faulty(RunFolder(folder), ready.config.logging, Display(Console(quiet=True), 1), [])
        self.crew = start_roles(ready, RunFolder(folder), self.journal, AbsentLedger())
        self.roles = replace(self.crew.roles, checkpoints=_NoCheckpoints())
        self._next = 0

    def step(self, fault: tuple[str, str] | None = None) -> dict[str, float]:
        """What the next step says of itself."""
        step, self._next = self._next, self._next + 1
        self.journal.plan = fault
        run = self._config.run.model_copy(update={"steps": step + 1})
        train(self._config.model_copy(update={"run": run}), self.roles, step)
        return self.journal.history[-1]


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory, own_ray: None) -> Iterator[Crew]:
    made = Crew(tmp_path_factory.mktemp("faulty") / "run")
    with made.crew.watch:
        yield made


@pytest.fixture(scope="module")
def own_ray(local_ray: None) -> None:
    """The tests' own Ray."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, own_ray: None) -> list[dict[str, float]]:
    """What the steps say where nothing goes wrong."""
    from test_hangs import give_seats_back

    whole = Crew(tmp_path_factory.mktemp("whole") / "run")
    found = [whole.step() for _ in range(len(CELLS) + 1 + len(WHILE_SCORING))]
    give_seats_back()
    return found


def figures(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if not name.startswith(OWN)}


def test_no_fault_of_a_role_changes_a_figure(expected: list[dict[str, float]], crew: Crew) -> None:
    assert figures(crew.step()) == figures(expected[0])
    for number, (fault, role) in enumerate(CELLS, start=1):
        started = time.monotonic()
        found = crew.step((fault, role))
        took_s = time.monotonic() - started
        print(f"{fault} {role}: {took_s:.1f} s")
        assert figures(found) == figures(expected[number]), (fault, role)
        assert took_s < BOUNDS_S[fault], (fault, role)
    assert crew.crew.watch.metrics()["health/restarts"] >= 4


@dataclass
class Struck:
    """A teacher whose process meets a fault as it is asked for the first time."""

    teacher: Any
    fault: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def score(self, requests: Any) -> Any:
        fault, self.fault = self.fault, ""
        if fault:
            inflict(fault, process_of("TeacherModel"))
        return self.teacher.score(requests)


@pytest.mark.parametrize("fault", WHILE_SCORING)
def test_a_fault_of_the_teacher_while_it_scores_changes_no_figure(
    fault: str, expected: list[dict[str, float]], crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck = Struck(crew.roles.teacher, fault)
    monkeypatch.setattr(crew, "roles", replace(crew.roles, teacher=struck))
    number, started = crew._next, time.monotonic()
    assert figures(crew.step()) == figures(expected[number])
    assert not struck.fault and time.monotonic() - started < BOUNDS_S[fault]


@dataclass
class Garbling:
    """Stands before an actor and changes what one of its methods answers."""

    actor: Any
    method: str
    change: Callable[[Any], Any]

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.actor, name)
        if name != self.method:
            return real
        change = self.change

        @ray.remote(num_cpus=0)
        def changed(answer: Any) -> Any:
            return change(answer)

        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                return changed.remote(real.remote(*args))

        return Method


def with_nan(rows: Any) -> Any:
    return (
        [replace(each, hidden=np.full_like(each.hidden, np.nan)) for each in rows] if isinstance(rows, list) else rows
    )


@pytest.mark.parametrize(
    ("part", "method", "change", "sentence"),
    [
        (
            "grader",
            "grade",
            lambda all_: [each._replace(reward=float("nan")) for each in all_],
            "the rewarder garbled its",
        ),
        ("grader", "grade", lambda all_: all_[1:], "the rewarder answered"),
        ("teacher", "in_life", with_nan, "the teacher garbled its answer on"),
    ],
)
def test_a_garbled_answer_ends_the_step_and_names_the_role(
    crew: Crew, part: str, method: str, change: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = getattr(crew.roles, part)
    with monkeypatch.context() as patch:
        patch.setattr(role, "_actor", Garbling(role._actor, method, change))
        with pytest.raises(WorkerError, match=sentence):
            crew.step()
    crew.step()  # all roles are well


def test_one_of_two_engines_that_is_killed_costs_its_start_and_a_step(
    tmp_path: Path, own_ray: None, crew: Crew
) -> None:
    """Not more than the start of that very engine, until its weights are proven, and one step; the run goes on."""
    from test_hangs import give_seats_back

    give_seats_back()
    two = Crew(tmp_path / "run", "generator.num_engines=2", "placement.generator.num_cpus=0.5")
    with two.crew.watch, ThreadPoolExecutor() as threads:
        step_s = statistics.median(timed(two.step) for _ in range(4))
        killed = process_of("GeneratorEngine")
        generator = two.crew.roles.generator
        (index,) = (
            index
            for index, engine in enumerate(generator.engines)
            if ray.get(engine.__ray_call__.remote(lambda _: os.getpid()), timeout=30) == killed
        )
        back = threads.submit(timed, partial(wait_for_another_life, generator.recovery, index))
        took_s = timed(lambda: two.step(("kill", "engine")))
        start_s = back.result()
        print(f"a step {step_s:.1f} s, the engine was back after {start_s:.1f} s, the step took {took_s:.1f} s")
        assert two.crew.watch.metrics()["health/restarts"] == 1
        assert took_s - step_s <= start_s + step_s


def wait_for_another_life(recovery: Recovery, index: int) -> None:
    before, patience = recovery.life(index), time.monotonic() + 300
    while recovery.life(index) == before:
        assert time.monotonic() < patience, f"engine {index} does not come back"
        time.sleep(0.05)


def timed(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started
