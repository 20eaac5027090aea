"""A run on a cluster of several Ray nodes on this machine, in a process of its own; says where everyone worked.

`python simulated_cluster.py NODES OVERRIDES LOST FOUND`: NODES and OVERRIDES are JSON, FOUND is the file to write. A
node is what `ray.cluster_utils.Cluster.add_node` takes. The run is the demo's, by the very code of `trace-rl train`.
Where LOST is a class of actors, the node of the first of them is killed once three steps are done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_rl.workers import environment

CONFIGS = Path(__file__).parent.parent / "configs"


def run_on_nodes(
    nodes: Sequence[Mapping[str, Any]], overrides: Sequence[str], cwd: Path, timeout_s: float, lost: str = ""
) -> dict[str, Any]:
    """What `main` found.

    Returns:
        error: of the run, '' where it ended well; seconds: of the run; nodes: the resources of each by its id; actors:
        [class, id of its node, address of that] of each that was alive before the first step; lost: [`lost`] once its
        node was killed; left: state of each
        placement group behind the session, and free CPUs.
    """
    found = cwd / "found.json"
    command = [sys.executable, __file__, json.dumps(list(nodes)), json.dumps(list(overrides)), lost, str(found)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert found.is_file(), done.stdout + done.stderr
    read: dict[str, Any] = json.loads(found.read_text())
    return read


def main(nodes: list[dict[str, Any]], overrides: list[str], lost: str, target: Path) -> None:
    """Start the nodes, train, look at what is left, and end the nodes."""
    environment.apply()
    environment.protect_private_ray()
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="sc", dir="/tmp") as folder:  # socket paths below it must stay short
        os.environ["RAY_TMPDIR"] = folder  # Ray notes the address of a cluster where other users of it would look
        (Path(folder) / "ray").mkdir()
        common = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={**common, "temp_dir": folder, **nodes[0]})
        try:
            for node in nodes[1:]:
                cluster.add_node(object_store_memory=common["object_store_memory"], **node)
            cluster.wait_for_nodes()
            found = train_on(cluster, overrides, lost)
            ray.init(address=cluster.address, log_to_driver=False)
            found["left"] = left_behind()
            ray.shutdown()
        finally:
            cluster.shutdown()
    target.write_text(json.dumps(found))


def train_on(cluster: Any, overrides: list[str], lost: str) -> dict[str, Any]:
    """Run the demo on a cluster; where its actors were."""
    from rich.console import Console

    from trace_rl.errors import TraceError
    from trace_rl.launch import train
    from trace_rl.launch.run_folder import RunFolder
    from trace_rl.overlays import load_config

    found: dict[str, Any] = {"error": "", "nodes": {}, "actors": [], "lost": []}
    loop = train.train
    config = load_config([CONFIGS / "demo.yaml"], [*overrides, f"placement.ray_address={cluster.address}"])

    def lose() -> None:
        node = next(node for name, node, _ in found["actors"] if name == lost)
        metrics = RunFolder(Path(config.run.folder)).metrics
        while not metrics.exists() or metrics.read_text().count("time/step_s") < 3:
            time.sleep(0.05)
        (held,) = [each for each in cluster.worker_nodes if each.node_id == node]
        cluster.remove_node(held, allow_graceful=False)
        found["lost"].append(lost)

    def observed(*args: Any, **kwargs: Any) -> None:
        if not found["actors"]:
            found["nodes"], found["actors"] = who_is_where()
            if lost:
                threading.Thread(target=lose, daemon=True).start()
        loop(*args, **kwargs)

    train.train = observed
    started = time.monotonic()
    try:
        train.run(config, Console(quiet=True))
    except TraceError as error:
        found["error"] = str(error)
    return {**found, "seconds": time.monotonic() - started}


def who_is_where() -> tuple[dict[str, Any], list[list[str]]]:
    """Resources of nodes, and actors, as Ray tells them."""
    import ray
    from ray._private.state import actors

    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return nodes, [
        [actor["ActorClassName"], actor["Address"]["NodeID"], actor["Address"]["IPAddress"]] for actor in alive
    ]


def left_behind() -> dict[str, Any]:
    """State of placement groups, and CPUs that are free, once Ray had a moment to tidy up."""
    import ray

    for _ in range(100):
        groups = [group["state"] for group in ray.util.placement_group_table().values()]
        free, whole = ray.available_resources().get("CPU", 0.0), ray.cluster_resources()["CPU"]
        if free == whole:
            break
        time.sleep(0.1)
    return {"groups": groups, "free_cpus": free, "cpus": whole}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
