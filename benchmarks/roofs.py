"""What this hardware gives at most, measured on the spot: a large matrix product, a large copy, and a plain broadcast.

    python benchmarks/roofs.py [--device cuda] [--dtype bfloat16]

Prints one JSON object. On CPUs one thread is used, as each role does (`trace_rl.workers.environment`).
"""

from __future__ import annotations

import datetime
import json
import socket
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer

from trace_rl.launch.plan.hardware import Roofs

MATMUL = 4096
CPU_MATMUL = 1536
COPY_BYTES = 2**30
CPU_COPY_BYTES = 2**28
BROADCAST_BYTES = 2**28
REPEATS = 7
PATIENCE_S = 120


def measure(device: str, dtype: str) -> tuple[Roofs, str]:
    """All roofs of a device of this machine, and what the link is."""
    link, bytes_per_s = link_bytes_per_s(device)
    found = Roofs(
        matmul_flops=matmul_flops(device, getattr(torch, dtype)),
        copy_bytes_per_s=copy_bytes_per_s(device),
        link_bytes_per_s=bytes_per_s,
    )
    return found, link


def matmul_flops(device: str | torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """Operations per second of a large matrix product: a multiplication and an addition are two."""
    size = size or (MATMUL if torch.device(device).type == "cuda" else CPU_MATMUL)
    left = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(left)
    return 2 * size**3 / seconds_of(lambda: torch.mm(left, left, out=out), device)


def copy_bytes_per_s(device: str | torch.device) -> float:
    """Bytes read plus bytes written, by a copy much larger than any cache."""
    nbytes = COPY_BYTES if torch.device(device).type == "cuda" else CPU_COPY_BYTES
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds_of(lambda: target.copy_(source), device)


def link_bytes_per_s(device: str) -> tuple[str, float]:
    """(what it went over, bytes a second) of a broadcast between two processes, each on a GPU of its own or on CPUs."""
    is_nccl = device == "cuda" and torch.cuda.device_count() > 1
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        found = manager.list()
        mp.spawn(_broadcast, args=("nccl" if is_nccl else "gloo", port, found), nprocs=2)
        rate = float(found[0])
    return ("nccl between two GPUs" if is_nccl else "gloo over loopback"), rate


def _broadcast(rank: int, backend: str, port: int, found: list[float]) -> None:
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    patience = datetime.timedelta(seconds=PATIENCE_S)
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", patience, world_size=2, rank=rank)
    data = torch.ones(BROADCAST_BYTES // 4, device=device)

    def send() -> None:
        dist.broadcast(data, 0)
        dist.barrier()

    seconds = seconds_of(send, device)
    if rank == 0:
        found.append(BROADCAST_BYTES / seconds)
    dist.destroy_process_group()


def seconds_of(work: Callable[[], object], device: str | torch.device) -> float:
    """Median over several times; the first one is not counted."""
    taken = []
    for _ in range(REPEATS + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _wait(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def main(
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    dtype: Annotated[str, typer.Option()] = "bfloat16" if torch.cuda.is_available() else "float32",
) -> None:
    """Measure and print."""
    if device == "cpu":
        torch.set_num_threads(1)
    found, link = measure(device, dtype)
    typer.echo(json.dumps({"roofs": found.model_dump(), "link": link}))


if __name__ == "__main__":
    typer.run(main)
