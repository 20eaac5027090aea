"""The environment of an actor follows from what it takes of the cluster, and not from the machine of the driver."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from trace_rl.config.run import RunConfig
from trace_rl.launch.placement import plan_placement
from trace_rl.launch.seats import Seats, actor_of
from trace_rl.workers import environment

LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def of_role_in_a_fresh_process(gpus: str | None, is_one_machine: bool, **variables: str) -> dict[str, str]:
    """What `of_role` gives in a driver whose user has set these variables, behind the driver's own `apply`."""
    code = (
        "from trace_rl.workers import environment; environment.apply();"
        f"print(environment.of_role({gpus!r}, {is_one_machine}))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = eval(done.stdout)
    return found


def test_a_role_on_gpus_gets_nothing_of_the_cpu_profile_although_the_driver_has_it() -> None:
    found = of_role_in_a_fresh_process(None, False)
    assert found["TOKENIZERS_PARALLELISM"] == "false"
    assert not found.keys() & {"DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", *LOOPBACK}


def test_a_role_on_cpus_is_kept_off_the_gpus_of_its_node() -> None:
    found = of_role_in_a_fresh_process("", False)
    assert (found["DS_ACCELERATOR"], found["OMP_NUM_THREADS"], found["CUDA_VISIBLE_DEVICES"]) == ("cpu", "1", "")
    assert not found.keys() & LOOPBACK.keys()


@pytest.mark.parametrize(("num_cpus", "threads"), [(0.5, "1"), (1.0, "1"), (2.9, "2"), (8, "8")])
def test_a_role_on_cpus_has_the_threads_that_the_configuration_gives_it(
    monkeypatch: pytest.MonkeyPatch, num_cpus: float, threads: str
) -> None:
    monkeypatch.setattr(environment, "_SET_BY_USER", {})
    assert environment.of_role("", False, num_cpus)["OMP_NUM_THREADS"] == threads
    assert "OMP_NUM_THREADS" not in environment.of_role("0", False, num_cpus)


def test_what_a_parent_has_applied_is_not_taken_for_the_users() -> None:
    parent = "import os; from trace_rl.workers import environment; environment.apply(); print(dict(os.environ))"
    done = subprocess.run([sys.executable, "-c", parent], env={}, capture_output=True, text=True, timeout=60)
    inherited: dict[str, str] = eval(done.stdout)
    assert inherited["TOKENIZERS_PARALLELISM"] == "false"
    assert not of_role_in_a_fresh_process(None, False, **inherited).keys() & LOOPBACK.keys()
    found = of_role_in_a_fresh_process("", False, **{**inherited, "OMP_NUM_THREADS": "7"})
    assert found["OMP_NUM_THREADS"] == "7"  # set in between
    code = "from trace_rl.workers import environment; print(environment.of_role('', False, 4)['OMP_NUM_THREADS'])"
    done = subprocess.run([sys.executable, "-c", code], env=inherited, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "4", done.stderr


def test_a_guest_is_shown_the_gpus_of_its_hosts() -> None:
    found = of_role_in_a_fresh_process("2,5", True)
    assert found["CUDA_VISIBLE_DEVICES"] == "2,5" and "DS_ACCELERATOR" not in found
    assert LOOPBACK.items() <= found.items()


def test_what_the_user_has_set_wins() -> None:
    found = of_role_in_a_fresh_process("", True, OMP_NUM_THREADS="7", GLOO_SOCKET_IFNAME="eth1")
    assert (found["OMP_NUM_THREADS"], found["GLOO_SOCKET_IFNAME"], found["VLLM_HOST_IP"]) == ("7", "eth1", "127.0.0.1")
    found = of_role_in_a_fresh_process(None, False, OMP_NUM_THREADS="7", GLOO_SOCKET_IFNAME="eth1")
    assert "OMP_NUM_THREADS" not in found  # of the CPU profile
    assert found["GLOO_SOCKET_IFNAME"] == "eth1"


def test_a_process_without_visible_gpus_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not environment.has_gpu()


class Witness:
    """Tells what a role's process sees."""

    def ready(self) -> Mapping[str, str | None]:
        import os

        names = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME")
        return {name: os.environ.get(name) for name in names}


@pytest.fixture
def seats_of_fake_gpus() -> Any:
    """A Ray that believes in two GPUs, in a process of its own: this one may have joined another."""
    code = """
import sys, tempfile
sys.path.insert(0, {folder!r})
from trace_rl.workers import environment
environment.apply()
environment.protect_private_ray()
import ray
from test_environment import look
with tempfile.TemporaryDirectory(prefix="te", dir="/tmp") as folder:
    ray.init(address="local", num_cpus=3, num_gpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder,
             object_store_memory=100 * 2**20)
    ray.cloudpickle.register_pickle_by_value(sys.modules["test_environment"])
    print("FOUND", look())
    ray.shutdown()
"""
    folder = __file__.rsplit("/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", code.format(folder=folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return eval(done.stdout.partition("FOUND ")[2])


def look() -> dict[str, Any]:
    """What every role of a colocated run sees, with the very code that starts roles."""
    import ray

    from trace_rl.launch.seats import take_seats

    placement = {
        "mode": "colocated",
        "teacher_place": "with_generator",
        "learner": {"num_cpus": 0.5, "num_gpus": 1},
        "generator": {"num_cpus": 0.25},
        "teacher": {"num_cpus": 0.5},
        "rewarder": {"num_cpus": 0.5},
    }
    routes = {"r": {"selector": {"rollouts": "correct", "tokens": "key_spans"}, "action": "fkl"}}
    config = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "algorithm": {"routes": routes},
            "generator": {"tensor_parallel": 2},
            "learner": {"world_size": 2},
            "placement": placement,
        }
    )
    seats: Seats = take_seats(plan_placement(config), config.placement)
    started: dict[str, Any] = {}
    for role in seats.plan.seats:  # hosts before guests
        started[role] = actor_of(Witness, seats.place(role, started)).remote()
    return {role: ray.get(actor.ready.remote(), timeout=60) for role, actor in started.items()}


@pytest.mark.engine
def test_ray_shows_hosts_and_guests_the_same_gpus_and_others_none(seats_of_fake_gpus: dict[str, Any]) -> None:
    seen = {role: found["CUDA_VISIBLE_DEVICES"] for role, found in seats_of_fake_gpus.items()}
    ranks = [seen["learner rank 0"], seen["learner rank 1"]]
    assert sorted(ranks) == ["0", "1"]
    assert seen["generator engine 0"] == ",".join(ranks) == seen["the teacher"]
    assert seen["the rewarder"] == seen["the annotator"] == ""
    profiles = {role: found["DS_ACCELERATOR"] for role, found in seats_of_fake_gpus.items()}
    assert profiles["the rewarder"] == "cpu"
    assert {found["GLOO_SOCKET_IFNAME"] for found in seats_of_fake_gpus.values()} == {"lo"}
