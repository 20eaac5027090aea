"""The rewarder over Ray: rollouts stream through, and what went wrong is counted apart."""

import os
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
import ray

from trace_rl.batch import FinishReason, Prompt, Rollout
from trace_rl.config.roles import Rewarder
from trace_rl.errors import WorkerError
from trace_rl.workers.rewarder import MAX_CONCURRENT_CALLS, MathRewarder, RayGrader

pytestmark = pytest.mark.engine
SETTINGS = Rewarder(num_processes=2, timeout_s=1.0)


class ObservedRewarder(MathRewarder):
    """The real actor, which also tells its process id."""

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture(scope="module")
def actor(local_ray: None) -> Iterator[object]:
    options = {"num_cpus": 0.5, "max_concurrency": MAX_CONCURRENT_CALLS}
    made = ray.remote(ObservedRewarder).options(**options).remote(SETTINGS)
    assert ray.get(made.ready.remote(), timeout=60)
    yield made
    ray.kill(made)


def rollout(index: int, text: str, answer: str = "70", finish_reason: FinishReason = "stop") -> Rollout:
    prompt = Prompt(f"p{index}", "question", answer)
    return Rollout(prompt, 0, (1,), (2, 3), np.zeros(2), finish_reason, np.array([0, 0]), text)


def test_rollouts_are_graded_and_marked_with_the_cause(actor: object) -> None:
    grader = RayGrader(actor, SETTINGS)
    rollouts = [
        rollout(0, "\\boxed{70}"),
        rollout(1, "\\boxed{71}"),
        rollout(2, "no idea"),
        rollout(3, "\\boxed{70}", finish_reason="length"),
        rollout(4, "\\boxed{9^{9^{9^9}}}"),
        rollout(5, "\\boxed{1}", answer=""),
    ]
    graded = {item.rollout.prompt.prompt_id: (item.reward, item.cause) for item in grader.grade(iter(rollouts))}
    assert graded == {
        "p0": (1.0, "graded"),
        "p1": (0.0, "graded"),
        "p2": (0.0, "graded"),
        "p3": (0.0, "truncated"),
        "p4": (0.0, "timeout"),
        "p5": (0.0, "error"),
    }


def test_many_small_rollouts_cost_little(actor: object) -> None:
    """Distinct wrong answers, so that nothing is served by a shortcut; about 1 ms each on an idle core."""
    started = time.monotonic()
    graded = list(RayGrader(actor, SETTINGS).grade(rollout(i, f"so \\boxed{{{i + 1000}}}") for i in range(500)))
    assert len(graded) == 500 and not any(item.reward for item in graded)
    assert time.monotonic() - started < 10


def test_a_dead_actor_is_named(local_ray: None) -> None:
    actor = ray.remote(ObservedRewarder).options(num_cpus=0.5, max_concurrency=2).remote(SETTINGS)
    assert ray.get(actor.ready.remote(), timeout=60)
    grading = psutil.Process(ray.get(actor.pid.remote(), timeout=60)).children()
    assert len(grading) == 2

    def rollouts() -> Iterator[Rollout]:
        yield rollout(0, "\\boxed{9^{9^{9^9}}}")
        time.sleep(0.2)
        ray.kill(actor)

    with pytest.raises(WorkerError, match="the rewarder died while grading"):
        list(RayGrader(actor, SETTINGS).grade(rollouts()))
    gone, alive = psutil.wait_procs(grading, timeout=2 * SETTINGS.timeout_s + 5)
    assert len(gone) == 2 and not alive
