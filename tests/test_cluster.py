"""Roles on the nodes of a cluster: where they run, that nothing of the training depends on it, and what is missing."""

import json
import socket
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from simulated_cluster import CONFIGS, run_on_nodes
from test_placement import configured

from trace_rl.errors import WorkerError
from trace_rl.launch.cluster import ray_session
from trace_rl.launch.placement import plan_placement
from trace_rl.launch.seats import take_seats

pytestmark = pytest.mark.engine

STEPS = 20
TOLERANCE = 1e-5
RUN = [
    "sampling.prompts_per_step=4",
    "sampling.samples_per_prompt=4",
    "evaluation.every=0",
    "generator.num_engines=2",
    "learner.zero_stage=3",
    "logging.diagnostics_every=0",
    "placement.start_timeout_s=900",
]
NODES = [
    {"num_cpus": 3, "resources": {"sampling": 1, "training": 1}},
    {"num_cpus": 3, "resources": {"sampling": 1, "training": 1}, "node_ip_address": "127.0.0.2"},
    {"num_cpus": 3, "resources": {"scoring": 3}, "node_ip_address": "127.0.0.3"},
]
"""Each of the first two holds an engine and a rank of the learner, the third all others; addresses differ, so that
roles find each other as on several machines."""
HELD = [
    "placement.generator.custom={sampling: 1}",
    "placement.learner.custom={training: 1}",
    *(f"placement.{role}.custom={{scoring: 1}}" for role in ("teacher", "annotator", "rewarder")),
]


def steps_of(folder: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "reward/mean" in record]


def largest_gap(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Largest difference of a number that does not tell a time."""
    gaps = [0.0]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        names = [name for name in one if not name.endswith("_s") and not name.startswith(("idle/", "memory/"))]
        gaps += [abs(one[name] - other[name]) for name in names]
    assert len(gaps) > 50 * len(ours)
    return max(gaps)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_nodes_train_as_one_does(tmp_path: Path) -> None:
    from test_pipeline import trace_rl

    overrides = [*RUN, f"run.steps={STEPS}"]
    (tmp_path / "one").mkdir()
    trace_rl("train", CONFIGS / "demo.yaml", *overrides, cwd=tmp_path / "one")
    found = run_on_nodes(NODES, [*overrides, *HELD], tmp_path, timeout_s=1800)
    assert found["error"] == ""
    assert found["left"] == {"groups": ["REMOVED"], "free_cpus": 9.0, "cpus": 9.0}
    there, here = steps_of(tmp_path / "runs" / "demo"), steps_of(tmp_path / "one" / "runs" / "demo")
    assert len(there) == STEPS and there[-1]["learner/grad_norm"] > 0
    gap = largest_gap(there, here)
    print(f"largest difference {gap:.3g}, {found['seconds']:.0f} s on three nodes, actors {found['actors']}")
    assert gap <= TOLERANCE
    where = defaultdict(list)
    for name, node, _ in found["actors"]:
        where[name].append(found["nodes"][node])
    assert sorted(where) == ["GeneratorEngine", "LearnerRank", "MathRewarder", "SpanAnnotator", "TeacherModel"]
    for name, resource in (("GeneratorEngine", "sampling"), ("LearnerRank", "training")):
        assert len(where[name]) == 2 and all(resource in node for node in where[name])
    assert all("scoring" in node for name in ("TeacherModel", "SpanAnnotator", "MathRewarder") for node in where[name])
    for name in ("GeneratorEngine", "LearnerRank"):
        assert len({(node, address) for kind, node, address in found["actors"] if kind == name}) == 2
    assert len({address for *_, address in found["actors"]}) == 3


def test_an_address_where_nothing_listens_is_told_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with (
            pytest.raises(WorkerError, match=rf"joined at placement\.ray_address='{address}' \(.*refused\); check the"),
            ray_session(configured(placement={"ray_address": address}), tmp_path),
        ):
            pass
    assert time.monotonic() - started < 5


def refused(timeout_s: float, **placement: Any) -> tuple[str, float]:
    """The sentence on a run that does not fit the session's Ray, and how long it took."""
    config = configured(placement={"resources_timeout_s": timeout_s, **placement})
    started = time.monotonic()
    with pytest.raises(WorkerError) as raised:
        take_seats(plan_placement(config), config.placement)
    return str(raised.value), time.monotonic() - started


def test_a_private_ray_that_is_too_small_is_told_at_once(local_ray: None) -> None:
    sentence, took_s = refused(60, teacher={"num_gpus": 1})
    assert sentence.startswith(
        "this machine has not got the resources of all roles: the teacher needs 1 GPU on one node"
    )
    assert took_s < 5


def test_a_cluster_that_is_too_small_is_waited_for_and_then_told(local_ray: None) -> None:
    import ray

    sentence, took_s = refused(3, ray_address="host:1", annotator={"num_cpus": 0, "custom": {"attic": 2}})
    assert sentence.startswith(
        "the cluster at placement.ray_address=host:1 has not got the resources of all roles within 3 s "
        "(placement.resources_timeout_s): the annotator needs 2 attic on one node (placement.annotator.custom.attic),"
    )
    assert 3 <= took_s < 20
    assert "PENDING" not in {group["state"] for group in ray.util.placement_group_table().values()}
    config = configured(placement={role: {"num_cpus": 0.1} for role in ("generator", "teacher", "learner")})
    seats = take_seats(plan_placement(config), config.placement)
    assert seats.is_one_machine
    seats.give_back()
    assert {ray.util.placement_group_table(seats.group)["state"]} == {"REMOVED"}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The steps of a run in which every role has its own place."""
    return layout_run(tmp_path_factory.mktemp("plain"))


def layout_run(folder: Path, *overrides: str) -> list[dict[str, float]]:
    """The steps of a short run with an evaluation and a checkpoint in its midst."""
    from test_pipeline import trace_rl

    short = ["run.steps=4", "run.checkpoint_every=2", "evaluation.every=2", "evaluation.num_prompts=8"]
    trace_rl("train", CONFIGS / "demo.yaml", *RUN, *short, *overrides, cwd=folder)
    return steps_of(folder / "runs" / "demo")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("zero_stage", "teacher"), [("2", "own"), ("3", "with_generator")])
def test_turns_on_shared_gpus_change_nothing(
    plain_run: list[dict[str, float]], tmp_path: Path, zero_stage: str, teacher: str
) -> None:
    layout = ["placement.mode=colocated", f"placement.teacher_place={teacher}", f"learner.zero_stage={zero_stage}"]
    turns = layout_run(tmp_path, *layout)
    assert all(step.pop("sync/turns_s") > 0 for step in turns)
    gap = largest_gap(turns, plain_run)
    print(f"largest difference {gap:.3g} under ZeRO-{zero_stage}")
    assert gap <= TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_workers_share_an_engine_and_take_every_sync(tmp_path: Path) -> None:
    steps = layout_run(tmp_path, "generator.num_engines=1", "generator.tensor_parallel=2")
    for step in steps:
        assert step["sync/canary_gap_max_nats"] <= 1e-4
        assert step["mismatch/logprob_gap_max_nats"] <= 1e-4
    assert steps[-1]["learner/grad_norm"] > 0
