"""Faults of whole runs: they end, by themselves, with the weights of a run to which nothing happened.

Each run is the command of a user, in processes of its own; faults come from outside. Faults of the roles that are
replaced while a run goes on: test_fault_matrix.py. docs/faults.md has the whole matrix.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from simulated_cluster import run_on_nodes

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
launched_run = pytest.importorskip("launched_run")
LaunchedRun = launched_run.LaunchedRun

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(900)]

STEPS = 8
DEAD_AFTER_S = 12.0
SMALL = [
    f"run.steps={STEPS}",
    "run.checkpoint_every=2",
    "run.resume=auto",
    "sampling.prompts_per_step=4",
    "sampling.samples_per_prompt=4",
    "sampling.max_response_tokens=64",
    "teacher.max_tokens_per_batch=256",  # prompts are scored one by one, while others are sampled
    "learner.world_size=2",
    "evaluation.every=0",
    "logging.diagnostics_every=0",
    "logging.token_figures=known",
    "health.heartbeat_every_s=0.5",
    "health.suspect_after_s=3",
    f"health.dead_after_s={DEAD_AFTER_S:g}",
]
START_S = 180.0
"""All roles, on two busy cores; where nothing else runs half a minute."""
CLOCK = """
import os, time
real, file = time.time, os.environ["MOVED_CLOCK"]
def moved():
    try:
        with open(file) as opened:
            return real() + float(opened.read())
    except (OSError, ValueError):
        return real()
time.time = moved
"""


def steps_done(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return sum("time/step_s" in json.loads(line) for line in lines)


def wait_for_step(run: LaunchedRun, folder: Path, step: int) -> None:
    patience = time.monotonic() + START_S
    while steps_done(folder) < step:
        assert run.driver.poll() is None, f"the run ended before step {step}"
        assert time.monotonic() < patience, f"step {step} has not come"
        time.sleep(0.05)


def outcome(
    folder: Path, fault: Callable[[LaunchedRun], None] = lambda run: None, environment: dict[str, str] | None = None
) -> tuple[str, float, int]:
    """Digest of the weights in the end, seconds, and how often the command was given."""
    started = time.monotonic()
    for launches in range(1, 4):
        with launched_run.launched(folder, SMALL, folder.with_suffix(".log"), environment) as run:
            if launches == 1:
                wait_for_step(run, folder, 3)
                fault(run)
            if run.driver.wait(600) == 0:
                return launched_run.final_weights(folder, STEPS), time.monotonic() - started, launches
    raise AssertionError(folder.with_suffix(".log").read_text()[-3000:])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, float]]:
    weights, seconds, _ = outcome(tmp_path_factory.mktemp("whole") / "run")
    yield weights, seconds


def rank(run: LaunchedRun) -> int:
    pid: int = run.roles()["learner"][-1]
    return pid


def hang_rank(run: LaunchedRun) -> None:
    os.kill(rank(run), signal.SIGSTOP)


def kill_rank(run: LaunchedRun) -> None:
    os.kill(rank(run), signal.SIGKILL)


def slow(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(pid, signal.SIGCONT)


def slow_rank(run: LaunchedRun) -> None:
    slow(rank(run))


def slow_driver(run: LaunchedRun) -> None:
    slow(run.driver.pid)


def kill_driver(run: LaunchedRun) -> None:
    run.driver.kill()


def hang_driver(run: LaunchedRun) -> None:
    """What a scheduler does with a job that is mute."""
    os.kill(run.driver.pid, signal.SIGSTOP)
    time.sleep(5)
    run.driver.kill()


CELLS = [  # fault, commands that it takes, bound of the time beyond that of a run without
    (slow_rank, 1, 5 + 20),
    (kill_rank, 1, START_S + 30),
    (hang_rank, 1, DEAD_AFTER_S + START_S + 30),
    (slow_driver, 1, 5 + 20),
    (kill_driver, 2, START_S + 60),
    (hang_driver, 2, START_S + 60),
]


@pytest.mark.parametrize(("fault", "launches", "bound_s"), CELLS, ids=[cell[0].__name__ for cell in CELLS])
def test_a_run_ends_with_the_weights_of_a_run_without_the_fault(
    fault: Callable[[LaunchedRun], None],
    launches: int,
    bound_s: float,
    expected: tuple[str, float],
    tmp_path: Path,
) -> None:
    weights, seconds, given = outcome(tmp_path / "run", fault)
    print(f"{fault.__name__}: {seconds - expected[1]:+.1f} s")
    assert weights == expected[0]
    assert given == launches
    assert seconds < expected[1] + bound_s
    if "rank" in fault.__name__ and fault is not slow_rank:
        assert "learner rank" in (tmp_path / "run.log").read_text()  # the suspect is named


def test_a_clock_that_jumps_changes_nothing(expected: tuple[str, float], tmp_path: Path) -> None:
    """A day forward and then back to the day before, for every process of the run."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    clock = tmp_path / "clock"

    def jump(run: LaunchedRun) -> None:
        clock.write_text("86400")
        wait_for_step(run, tmp_path / "run", 5)
        clock.write_text("-86400")

    environment = {"PYTHONPATH": str(tmp_path), "MOVED_CLOCK": str(clock)}
    weights, seconds, launches = outcome(tmp_path / "run", jump, environment)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    starts = [line["clock/step_started_s"] for line in lines if "clock/step_started_s" in line]
    assert max(starts) - min(starts) > 86400  # the clock was moved
    assert (weights, launches) == (expected[0], 1)
    assert seconds < expected[1] + 30


NODES = [
    {"num_cpus": 3, "resources": {"scoring": 3}},
    *({"num_cpus": 1, "resources": {"work": 1}, "node_ip_address": f"127.0.0.{last}"} for last in (2, 3, 4)),
]
"""The engine and the learner's rank take a node each, and one is spare."""
HELD = [
    "learner.world_size=1",
    *(f"placement.{role}.custom={{work: 1}}" for role in ("generator", "learner")),
    *(f"placement.{role}.custom={{scoring: 1}}" for role in ("teacher", "annotator", "rewarder")),
    "placement.start_timeout_s=600",
]


@pytest.fixture(scope="module")
def expected_on_nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    return on_nodes(tmp_path_factory.mktemp("nodes"))


def on_nodes(folder: Path, lost: str = "") -> tuple[str, float]:
    found = run_on_nodes(NODES, [*SMALL, *HELD, f"run.folder={folder / 'run'}"], folder, 800, lost)
    assert found["error"] == ""
    assert found["lost"] == ([lost] if lost else [])
    return launched_run.final_weights(folder / "run", STEPS), found["seconds"]


@pytest.mark.parametrize("role", ["GeneratorEngine", "LearnerRank"])
def test_the_work_of_a_lost_node_goes_on_elsewhere(
    role: str, expected_on_nodes: tuple[str, float], tmp_path: Path
) -> None:
    weights, seconds = on_nodes(tmp_path, lost=role)
    print(f"{role}: {seconds - expected_on_nodes[1]:+.1f} s")
    assert weights == expected_on_nodes[0]
    assert seconds < expected_on_nodes[1] + START_S + 60
