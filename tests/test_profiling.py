"""Chosen steps of a run are recorded by the processes that compute, into files that any viewer of traces reads."""

import gzip
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from trace_rl.launch.profiling import ProfiledJournal
from trace_rl.workers import profiling


class Computing:
    """Multiplies in a thread of its own, as engines do."""

    def multiply(self) -> None:
        thread = threading.Thread(target=lambda: torch.ones(64, 64) @ torch.ones(64, 64))
        thread.start()
        thread.join()


class Journal:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def stage(self, name: str) -> Any:
        return nullcontext()

    def log_step(self, step: int, metrics: Any) -> None:
        self.steps.append(step)


def names(file: Path) -> list[str]:
    with gzip.open(file) as opened:
        return [event.get("name", "") for event in json.load(opened)["traceEvents"]]


def test_a_trace_holds_what_other_threads_computed_between_start_and_stop(tmp_path: Path) -> None:
    role, file = Computing(), tmp_path / "new" / f"role{profiling.SUFFIX}"
    profiling.start(role)
    role.multiply()
    assert profiling.stop(role, str(file)) == file.stat().st_size > 0
    assert names(file).count("aten::mm") == 1
    assert profiling.stop(role, str(file)) == 0  # not recorded again


@pytest.mark.engine
def test_the_steps_that_are_wanted_are_recorded_and_no_others(
    local_ray: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    role, lost = ray.remote(Computing).remote(), ray.remote(Computing).remote()
    ray.get(role.multiply.remote(), timeout=60)
    ray.get(lost.multiply.remote(), timeout=60)
    ray.kill(lost)
    inner = Journal()
    journal = ProfiledJournal(inner, {"learner rank 0": role, "teacher": lost}, tmp_path, [1, 3], next_step=1)
    for step, products in ((1, 2), (2, 5), (3, 1)):
        with journal.stage("learner"):
            for _ in range(products):
                ray.get(role.multiply.remote(), timeout=60)
        journal.log_step(step, {})
    assert inner.steps == [1, 2, 3]
    found = {file.parent.name: names(file).count("aten::mm") for file in tmp_path.rglob("*.json.gz")}
    assert found == {"step-000001": 2, "step-000003": 1}
    assert "teacher could not start its recording" in caplog.text  # and nothing else is lost
