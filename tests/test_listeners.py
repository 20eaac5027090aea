"""What a run on one machine listens on, and who may enter the folders of its Ray."""

import json
import subprocess
import sys
import threading
from ipaddress import ip_address

import psutil
import pytest
import torch

from trace_rl.workers.weight_wire import GlooGroup, free_address, open_store

IN_A_PRIVATE_RAY = """
import json, tempfile
from pathlib import Path
from trace_rl.workers import environment
environment.apply()
environment.protect_private_ray()
import psutil, ray
from trace_rl.config.placement import Placement
from trace_rl.launch.cluster import ray_session

class Config:
    placement = Placement(ray_cpus=1)
    cpus_for_roles = 1

with tempfile.TemporaryDirectory() as logs, ray_session(Config(), Path(logs)):
    ray.get(ray.remote(lambda: 1).remote(), timeout=120)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    me = psutil.Process()
    listening = [
        (process.name(), each.laddr.ip)
        for process in (me, *me.children(recursive=True))
        for each in process.net_connections(kind="inet")
        if each.status == psutil.CONN_LISTEN
    ]
    open_to_others = all(part.stat().st_mode & 0o077 for part in session.parents if part != Path("/"))
    told = {"listening": listening, "session": str(session), "open_to_others": open_to_others}
print("TOLD", json.dumps({**told, "is_left": session.exists() or session.parents[1].exists()}))
"""


def is_loopback(address: str) -> bool:
    """Also where a socket of both families shows an IPv4 address as ::ffff:127.0.0.1."""
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def listening_here() -> set[str]:
    """Addresses that this process and its threads listen on."""
    connections = psutil.Process().net_connections(kind="inet")
    return {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}


@pytest.mark.engine
def test_a_private_ray_listens_on_loopback_and_its_folder_is_closed_to_other_users() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_PRIVATE_RAY], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.partition("TOLD ")[2])
    assert len(told["listening"]) >= 4, told  # driver, head, raylet, worker: the measurement sees them
    assert [name for name, address in told["listening"] if not is_loopback(address)] == []
    assert not told["open_to_others"], f"every user of the machine can enter {told['session']}"
    assert not told["is_left"]


def test_a_rendezvous_listens_on_its_own_address_and_two_ranks_meet_there() -> None:
    before = listening_here()
    store = open_store("127.0.0.1", 0, rank=0, world_size=2, timeout_s=20)
    other = open_store("127.0.0.1", store.port, rank=1, world_size=2, timeout_s=20)
    other.set("word", "given")
    assert store.get("word") == b"given"
    assert listening_here() - before <= {"127.0.0.1"}


def test_a_transfer_group_of_one_machine_listens_on_loopback_alone() -> None:
    address, port = free_address(is_single_node=True)
    before, seen = listening_here(), set()
    buffers = [torch.full((4,), rank, dtype=torch.uint8) for rank in (7, 0)]

    def take_part(rank: int) -> None:
        group = GlooGroup(address, port, rank, world_size=2, timeout_s=20)
        group.broadcast(buffers[rank])
        seen.update(listening_here())
        group.barrier()

    receiver = threading.Thread(target=take_part, args=(1,))
    receiver.start()
    take_part(0)
    receiver.join(20)
    assert buffers[1].tolist() == [7, 7, 7, 7]
    assert seen and all(map(is_loopback, seen - before))


def test_a_port_that_is_taken_is_refused_in_one_sentence() -> None:
    taken = open_store("127.0.0.1", 0, rank=0, world_size=1, timeout_s=5)
    with pytest.raises(RuntimeError, match=f"port {taken.port} of 127.0.0.1 cannot be listened on: Address already"):
        open_store("127.0.0.1", taken.port, rank=0, world_size=1, timeout_s=5)
