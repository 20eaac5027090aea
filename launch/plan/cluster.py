"""What is at hand for a run: the nodes of the cluster that it would join, or this machine, and their GPUs' memory.

A cluster is joined for a moment and nothing in it is taken. Must not know what a run needs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trace_rl.config.run import RunConfig
from trace_rl.launch.cluster import ray_session
from trace_rl.launch.placement import Node
from trace_rl.launch.seats import free_nodes, nodes
from trace_rl.workers import environment

_CARD_MIB = {
    "T4": 15360, "A10G": 23028, "L4": 23034, "L40S": 46068, "A100": 40960, "A100-40G": 40960, "A100-80G": 81920,
    "H100": 81559, "H200": 143771, "B200": 183359,
}  # fmt: skip
"""Memory that nvidia-smi reports of cards (most of them in modal-labs/modal-client#2797), by Ray's names of them
(ray.util.accelerators). Of A100 there are two sizes, of which Ray gives the one beside the name of both."""
_TYPE = "accelerator_type:"
_MIB = 2**20


@dataclass(frozen=True)
class AtHand:
    """What there is."""

    nodes: Sequence[Node]
    """With all that they have, whoever uses it."""
    free: Sequence[Node]
    """With what nobody uses."""
    gpu_bytes: int | None
    """Of the smallest GPU; None where it is not known."""


def at_hand(config: RunConfig) -> AtHand:
    """The cluster at placement.ray_address, or this machine as a private Ray would offer it.

    Raises:
        WorkerError: the cluster cannot be joined.
    """
    if config.placement.ray_address == "local":
        gpus = local_gpus()
        cpus = config.placement.ray_cpus or config.cpus_for_roles
        here = [Node("this machine", {"CPU": float(cpus), "GPU": float(len(gpus))})]
        return AtHand(here, here, min(gpus, default=None))
    with ray_session(config, Path()):
        found = nodes()
        return AtHand(found, free_nodes(), gpu_memory(found))


def card_memory(name: str) -> int | None:
    """Bytes of a card by its name; None where it is not known."""
    return _CARD_MIB.get(name, 0) * _MIB or None


def known_gpu_memory(config: RunConfig) -> int | None:
    """Bytes of the GPUs that a run will have, as far as this machine tells without joining a cluster."""
    return min(local_gpus(), default=None) if config.placement.ray_address == "local" else None


def gpu_memory(found: Iterable[Node]) -> int | None:
    """Bytes of the smallest GPU among nodes, by the types that they name; None where that of one is not known."""
    sizes = []
    for node in found:
        if node.free.get("GPU"):
            types = [name.removeprefix(_TYPE) for name in node.free if name.startswith(_TYPE)]
            sizes.append(max((_CARD_MIB.get(name, 0) for name in types), default=0))
    return min(sizes) * _MIB or None if sizes else None


def local_gpus() -> list[int]:
    """Bytes of each GPU of this machine that this process may use; empty without a driver."""
    if not environment.has_gpu():
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    sizes = [int(line) * _MIB for line in told.split()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return sizes if visible is None else sizes[: len([name for name in visible.split(",") if name.strip()])]
