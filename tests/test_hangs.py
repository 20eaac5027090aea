"""Every role is hung once for real, by stopping its process, and the run ends or goes on within its bound.

The roles are started as in a run, with bounds that a cold and busy machine can keep; the one that a test is about is
tightened for it. A victim is stopped when a stage begins, the loop runs into it, and afterwards the victim goes on, so
that the next one finds all roles well.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path

import psutil
import pytest
import ray
from learner_harness import run_config
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup
from rich.console import Console
from watched_run import WatchedRun

from trace_rl.absent import AbsentLedger
from trace_rl.errors import TraceError, WorkerError
from trace_rl.launch import preflight
from trace_rl.launch.display import Display
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.roles import start_roles
from trace_rl.launch.run_folder import RunFolder
from trace_rl.loop import train
from trace_rl.overlays import load_config
from trace_rl.workers.learner import DeepSpeedLearner, learner_spec, rank_actors
from trace_rl.workers.waiting import wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

CONFIGS = Path(str(resources.files("trace_rl.configs")))
BOUND_S = 3.0
MARGIN_S = 15.0
"""For what is well meanwhile, on a machine that is busy with other things."""
SMALL = [
    "sampling.prompts_per_step=4",
    "sampling.samples_per_prompt=4",
    "sampling.max_response_tokens=64",
    "teacher.max_tokens_per_batch=256",  # prompts are scored one by one, while others are sampled
    "learner.world_size=1",
    "evaluation.every=0",
    "logging.diagnostics_every=0",
    "run.steps=1000",
]


class StoppedProcess:
    """A process that neither works nor ends until it is released."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        os.kill(pid, signal.SIGSTOP)

    def release(self) -> None:
        if psutil.pid_exists(self.pid):
            os.kill(self.pid, signal.SIGCONT)


class StoppingJournal(RunJournal):
    """The run's own journal, which stops a victim as a stage begins."""

    victims: dict[str, Callable[[], int]]
    stopped: list[StoppedProcess]
    since: float

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if name in self.victims:
            self.stopped.append(StoppedProcess(self.victims.pop(name)()))
            self.since = time.monotonic()
        with super().stage(name):
            yield


class Crew:
    """All roles of one small run, and steps of it in which one of them hangs."""

    def __init__(self, folder: Path) -> None:
        config = load_config(
            [CONFIGS / "demo.yaml"],
            [*SMALL, f"run.folder={folder}"],
        )
        ready = preflight.check(config)
        self._folder = RunFolder(folder)
        self._config = ready.config
        self._journal = StoppingJournal(self._folder, config.logging, Display(Console(quiet=True), 1), [])
        self._journal.victims, self._journal.stopped = {}, []
        self.roles = start_roles(ready, self._folder, self._journal, AbsentLedger()).roles
        self._next = 0

    def step(self, **victims: Callable[[], int]) -> dict[str, float]:
        """Metrics of a step during whose stages the victims are stopped."""
        step, self._next = self._next, self._next + 1
        self._journal.victims = victims
        run = self._config.run.model_copy(update={"steps": step + 1})
        checkpoints = _NoCheckpoints()
        try:
            train(self._config.model_copy(update={"run": run}), replace(self.roles, checkpoints=checkpoints), step)
        finally:
            for process in self._journal.stopped:
                process.release()
            self._journal.stopped.clear()
        return self._journal.history[-1]

    def error_of_step(self, bound_s: float, **victims: Callable[[], int]) -> str:
        """What a step fails with, within its bound after a victim was stopped."""
        with pytest.raises(TraceError) as raised:
            self.step(**victims)
        assert time.monotonic() - self._journal.since < bound_s + MARGIN_S
        self._journal._take_stages()
        return str(raised.value)


class _NoCheckpoints:
    def save(self, *_: object) -> None:
        """Not what is looked at."""


def process_of(role: str) -> Callable[[], int]:
    """Finds the process of the one live actor of a class."""

    def find() -> int:
        from ray._private import state

        actors = [actor for actor in state.actors().values() if actor["ActorClassName"] == role]
        (pid,) = [actor["Pid"] for actor in actors if actor["State"] == "ALIVE"]
        return int(pid)

    return find


def grading_child() -> int:
    """One of the rewarder's two children."""
    children = psutil.Process(process_of("MathRewarder")()).children()
    return min(child.pid for child in children if "trace_rl.workers.grading" in child.cmdline())


@pytest.fixture(scope="module")
def crew(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    made = Crew(tmp_path_factory.mktemp("hangs"))
    metrics = made.step()  # everything is warm and well
    assert metrics["route/key_spans/rows"] > 0
    yield made
    give_seats_back()


def give_seats_back() -> None:
    """Other modules need them, and this Ray goes on."""
    for group, state in ray.util.placement_group_table().items():
        if state["state"] == "CREATED":
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def test_a_hung_annotator_costs_the_step_its_wait_and_the_spans(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = crew.roles.annotator._settings
    monkeypatch.setattr(crew.roles.annotator, "_settings", patient.model_copy(update={"step_wait_s": BOUND_S}))
    metrics = crew.step(rollout=process_of("SpanAnnotator"))
    assert BOUND_S <= metrics["annotation/wait_s"] < BOUND_S + MARGIN_S
    assert metrics["annotation/failed/timeout"] > 0 and metrics["route/token_frac"] == 0
    assert crew.step()["route/token_frac"] > 0  # the next step has an annotator again


def test_a_hung_grading_process_costs_one_reward(crew: Crew) -> None:
    assert crew.step(rollout=grading_child)["reward/timeouts"] == 1
    assert crew.step()["reward/timeouts"] == 0


def test_a_hung_rewarder_is_named_during_rollout(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = crew.roles.grader._settings
    monkeypatch.setattr(crew.roles.grader, "_settings", patient.model_copy(update={"timeout_s": 0.25}))
    monkeypatch.setattr("trace_rl.workers.rewarder.START_TIMEOUT_S", 1.0)
    monkeypatch.setattr("trace_rl.workers.rewarder.RESPONSE_MARGIN_S", 0.25)
    # 16 rollouts on two processes: 1 + 0.25 + 8 x (0.25 + 0.25) = 5.25 s, once they are sampled
    said = crew.error_of_step(5.25, rollout=process_of("MathRewarder"))
    assert said.startswith("The rewarder did not answer for rollout") and "rewarder.timeout_s" in said
    assert_placed(said, "MathRewarder")


def test_a_hung_teacher_is_named(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew.roles.teacher, "_timeout_s", BOUND_S)
    said = crew.error_of_step(BOUND_S, rollout=process_of("TeacherModel"))
    assert said.startswith(f"the teacher did not finish scoring within {BOUND_S:g} s")
    assert_placed(said, "TeacherModel")


def test_a_hung_learner_rank_is_named_during_training(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew.roles.learner, "_step_timeout_s", BOUND_S)
    said = crew.error_of_step(BOUND_S, learner=process_of("LearnerRank"))
    assert said.startswith(f"learner rank 0 did not finish calling train_step within {BOUND_S:g} s")
    assert_placed(said, "LearnerRank")


@pytest.mark.parametrize(
    ("role", "name"), [("GeneratorEngine", "generator engine 0"), ("LearnerRank", "learner rank 0")]
)
def test_who_hangs_is_named_during_the_sync_and_the_next_sync_joins_anew(
    crew: Crew, monkeypatch: pytest.MonkeyPatch, role: str, name: str
) -> None:
    with monkeypatch.context() as patch:
        patient = crew.roles.weight_sync._settings
        patch.setattr(crew.roles.weight_sync, "_settings", patient.model_copy(update={"timeout_s": BOUND_S}))
        said = crew.error_of_step(BOUND_S, sync=process_of(role))
    assert name in said and "(sync.timeout_s)" in said
    assert crew.step()["sync/canary_gap_max_nats"] < 1e-3


def test_a_hung_engine_is_named_during_rollout(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one, because the engine still has to finish what it was asked for."""
    monkeypatch.setattr(crew.roles.generator, "timeout_s", BOUND_S)
    said = crew.error_of_step(BOUND_S, rollout=process_of("GeneratorEngine"))
    assert f"before the deadline of {BOUND_S:g} s (placement.step_timeout_s) from generator engine 0" in said


@pytest.mark.slow
def test_a_run_with_a_hung_engine_ends_and_leaves_no_process_behind(tmp_path: Path) -> None:
    arguments = ["train", CONFIGS / "demo.yaml", *SMALL, "placement.step_timeout_s=20", "run.max_restarts=0"]
    with WatchedRun(arguments, tmp_path, {}) as run:
        run.wait_until(lambda: "step    2/1000" in run.printed, "under way", 300)
        (engine,) = [pid for pid, line in run.processes().items() if line.startswith("ray::GeneratorEngine")]
        StoppedProcess(engine)
        assert run.wait(20 + 4 * MARGIN_S) == 1  # asserts as well that no process is left
    error = run.printed[run.printed.index("error: ") :]
    assert "generator engine 0" in error and "Traceback" not in error
    assert len(list((tmp_path / "runs/demo/logs").glob(f"worker-*-{engine}.out"))) == 1


def test_a_learner_rank_that_hangs_while_it_starts_is_named_and_all_ranks_are_ended(
    local_ray: None, model_path: str, tmp_path: Path
) -> None:
    config = run_config(model_path, world_size=2)
    placement = config.placement.model_copy(update={"start_timeout_s": BOUND_S})
    ranks = rank_actors(learner_spec(config), [{"num_cpus": 0}] * 2)
    pids = [wait_for(rank.__ray_call__.remote(lambda _: os.getpid()), 120, "the rank", "loading") for rank in ranks]
    StoppedProcess(pids[1])
    started = time.monotonic()
    late = rf"^learner rank (0, )?1 did not finish .* within {BOUND_S:g} s .*start_timeout_s"
    with pytest.raises(WorkerError, match=late) as raised:
        DeepSpeedLearner(config.model_copy(update={"placement": placement}), tmp_path, ranks)
    assert time.monotonic() - started < 2 * BOUND_S + MARGIN_S
    assert re.search(rf"rank 1: node \S+, log \S+-{pids[1]}\.err", str(raised.value))
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank is left behind"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_private_ray_that_hangs_itself_is_ended(part: str) -> None:
    """In a process of its own, because the tests' Ray is still needed."""
    subprocess.run([sys.executable, "-c", HANGING_RAY, part], timeout=120, check=True)


HANGING_RAY = """
import os, signal, sys, tempfile
from trace_rl.workers import environment
environment.apply()
environment.protect_private_ray()
import psutil, ray
from trace_rl.launch import ending
with tempfile.TemporaryDirectory(prefix="te", dir="/tmp") as folder:
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=folder)
    (hung,) = ray._private.worker._global_node.all_processes[sys.argv[1]]
    parts = psutil.Process().children(recursive=True)
    os.kill(hung.process.pid, signal.SIGSTOP)
    ending._PATIENCE_S = 3.0
    ending.end_ray()
    _, left = psutil.wait_procs(parts, timeout=20)
    assert not left, left
"""


def assert_placed(said: str, role: str) -> None:
    """The log of the role's process is named."""
    assert f"-{process_of(role)()}.err" in said
