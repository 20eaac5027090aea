"""What both sides of a weight transfer agree on: what is sent, in which pieces, and the group that they meet in.

It must not know where the weights come from (DeepSpeed) or what receives them (vLLM).

Invariant: both sides derive the buckets and the frames from the manifest alone.
"""

from __future__ import annotations

import math
import re
import socket
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed import BarrierOptions, BroadcastOptions, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from trace_rl.errors import WeightSyncError, first_line
from trace_rl.workers.weight_digest import WeightDigest

TransferBackend = Literal["gloo", "nccl", "ipc", "file"]

FRAME_BYTES = 4 << 20
"""Weights go through the host's memory in frames of this size, which stay in a processor's cache, so that some are
filled and some loaded while others travel; a bucket that is smaller is one frame, and so is a weight that is larger."""
FRAMES_BYTES = 4 * FRAME_BYTES
"""As much travels at a time, or two frames."""
_SMALL_BYTES = FRAME_BYTES // 4
"""A smaller frame keeps nobody busy: norms stand alone between weights that are larger than a frame."""

_ALIGNMENT = 16


@dataclass(frozen=True)
class WeightManifest:
    """What a transfer carries, in order; the same on every side and for every version."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    """torch dtype names without the prefix, for example "bfloat16"."""

    @staticmethod
    def of(weights: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> WeightManifest:
        """Manifest of (name, full shape, dtype) triples."""
        listed = list(weights)
        return WeightManifest(
            tuple(name for name, _, _ in listed),
            tuple(tuple(int(size) for size in shape) for _, shape, _ in listed),
            tuple(str(dtype).removeprefix("torch.") for _, _, dtype in listed),
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all weights together."""
        return sum(_nbytes(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True))


@dataclass(frozen=True)
class TransferGroup:
    """Where senders and receivers meet, and what they must agree on."""

    address: str
    port: int
    world_size: int
    """The senders, as the first ranks, and every engine's workers."""
    bucket_mib: int
    timeout_s: float
    num_senders: int = 1

    @property
    def bucket_bytes(self) -> int:
        return self.bucket_mib * 2**20


@dataclass(frozen=True)
class Slot:
    """Where one weight lies in its bucket."""

    index: int
    """Position in the manifest."""
    start: int
    end: int
    """Bytes [start, end) of the bucket."""


@dataclass(frozen=True)
class Bucket:
    """Weights that travel together."""

    slots: tuple[Slot, ...]
    nbytes: int

    def view(self, slot: Slot, buffer: Tensor, manifest: WeightManifest) -> Tensor:
        """The slot's weight as a view of the bucket's byte buffer."""
        dtype = getattr(torch, manifest.dtypes[slot.index])
        return buffer[slot.start : slot.end].view(dtype).view(manifest.shapes[slot.index])

    def weights(self, buffer: Tensor, manifest: WeightManifest) -> list[tuple[str, Tensor]]:
        """All weights of the bucket by name, as views of its byte buffer."""
        return [(manifest.names[slot.index], self.view(slot, buffer, manifest)) for slot in self.slots]


def plan_buckets(manifest: WeightManifest, bucket_bytes: int) -> list[Bucket]:
    """Cut the manifest into buckets of at most `bucket_bytes`; a larger weight gets a bucket of its own."""
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    cursor = 0
    for index, (shape, dtype) in enumerate(zip(manifest.shapes, manifest.dtypes, strict=True)):
        start, size = math.ceil(cursor / _ALIGNMENT) * _ALIGNMENT, _nbytes(shape, dtype)
        if slots and start + size > bucket_bytes:
            buckets.append(Bucket(tuple(slots), cursor))
            slots, start = [], 0
        slots.append(Slot(index, start, start + size))
        cursor = start + size
    return [*buckets, Bucket(tuple(slots), cursor)] if slots else buckets


def plan_frames(manifest: WeightManifest, bucket_bytes: int) -> list[Bucket]:
    """The buckets of a transfer through the host's memory."""
    return plan_buckets(manifest, min(bucket_bytes, FRAME_BYTES))


class ReusedMemory:
    """Byte buffers in memory that is kept: a page's first touch costs several times the copy of a page."""

    def __init__(self) -> None:
        self._free: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        self.nbytes = 0
        """Of all buffers, lent or not."""

    def take(self, nbytes: int) -> Tensor:
        """A buffer with any contents, lent until nothing refers to it or to a view of it."""
        large_enough = [index for index, memory in enumerate(self._free) if memory.size >= nbytes]
        if large_enough:
            memory = self._free.pop(min(large_enough, key=lambda index: self._free[index].size))
        else:
            memory = np.empty(nbytes, dtype=np.uint8)
            self.nbytes += nbytes
        lent = memory[:nbytes]  # the tensor's storage keeps this object, and goes with its last view
        weakref.finalize(lent, self._free.append, memory)
        return torch.from_numpy(lent)


def free_address(is_single_node: bool) -> tuple[str, int]:
    """Address of this node, loopback when everything runs on it, and a TCP port that is free now.

    Another process may take the port before it is used; `connect` then fails and the sync reports it.
    """
    if is_single_node:
        address = "127.0.0.1"
    else:
        import ray

        address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, int(probe.getsockname()[1])


def open_store(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> TCPStore:
    """The rendezvous of a process group, which rank 0 serves on `address` alone.

    Left alone, torch serves it on every interface, and it asks nobody who they are.

    Args:
        port: 0: rank 0 takes one that is free.

    Raises:
        RuntimeError: rank 0 cannot have the port, or another rank does not reach it in time.
    """
    listening: int | None = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            server = socket.create_server((address, port), family=family)
        except OSError as error:
            raise RuntimeError(f"port {port} of {address} cannot be listened on: {error.strerror}") from error
        port = server.getsockname()[1]
        listening = server.detach()
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(
        address,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening,
    )


class GlooGroup:
    """A gloo group of senders (the first ranks) and receivers, apart from torch's global process group.

    Every rank calls the same methods in the same order. All raise RuntimeError when a peer is gone or too late.
    """

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._store = open_store(address, port, rank, world_size, timeout_s)
        self._group: Any = ProcessGroupGloo(self._store, rank, world_size, self._timeout)
        self._rank = rank

    def start_broadcast(self, buffer: Tensor) -> Any:
        """Start to send (rank 0) or fill (others) a CPU byte buffer; to be given to `finish`."""
        options = BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = self._timeout
        return self._group.broadcast([buffer], options)

    def finish(self, work: Any) -> None:
        """Wait for what was started."""
        work.wait(self._timeout)

    def broadcast(self, buffer: Tensor) -> None:
        """Send (rank 0) or fill (others) a CPU byte buffer."""
        self.finish(self.start_broadcast(buffer))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        options = BarrierOptions()
        options.timeout = self._timeout
        self.finish(self._group.barrier(options))

    def tell(self, topic: str, text: str) -> None:
        """Let the other ranks know something; a topic is used once."""
        self._store.set(f"{topic}/{self._rank}", text)

    def told(self, topic: str, num_ranks: int) -> list[str]:
        """What each of the first ranks tells of a topic; waits for it."""
        return [self._store.get(f"{topic}/{rank}").decode() for rank in range(num_ranks)]


class Travelling:
    """Frames on their way through a group, the oldest first: as many as `FRAMES_BYTES` allows, or two large ones."""

    def __init__(self, group: GlooGroup) -> None:
        self._group = group
        self._frames: deque[tuple[Bucket, Tensor, Any]] = deque()

    def __len__(self) -> int:
        return len(self._frames)

    def has_room(self, frame: Bucket) -> bool:
        """Whether a frame may start before the oldest has arrived."""
        sizes = [each.nbytes for each, *_ in self._frames]
        return sum(size >= _SMALL_BYTES for size in sizes) < 2 or sum(sizes) + frame.nbytes <= FRAMES_BYTES

    def start(self, frame: Bucket, buffer: Tensor) -> None:
        """Send what is in the buffer, or receive into it."""
        self._frames.append((frame, buffer, self._group.start_broadcast(buffer)))

    def oldest(self) -> Bucket:
        """The frame that `finish` waits for."""
        return self._frames[0][0]

    def finish(self) -> Tensor:
        """Wait for the oldest frame and forget it.

        Returns:
            Its buffer.

        Raises:
            RuntimeError: a peer is gone or too late.
        """
        _, buffer, work = self._frames[0]
        self._group.finish(work)
        self._frames.popleft()
        return buffer


def receive_frames(
    group: GlooGroup, manifest: WeightManifest, bucket_bytes: int, memory: ReusedMemory, digest: WeightDigest
) -> Iterator[list[tuple[str, Tensor]]]:
    """The weights of every frame in order, each taken into the digest before; others travel meanwhile.

    Raises:
        WeightSyncError: the sender is gone or too late.
    """
    waiting, travelling = deque(plan_frames(manifest, bucket_bytes)), Travelling(group)
    while waiting or len(travelling):
        while waiting and travelling.has_room(waiting[0]):
            frame = waiting.popleft()
            travelling.start(frame, memory.take(frame.nbytes))  # who takes the weights may keep views of it
        frame = travelling.oldest()
        try:
            buffer = travelling.finish()
        except RuntimeError as error:
            raise WeightSyncError(
                f"lost the weight sender while waiting for {manifest.names[frame.slots[0].index]} and what follows "
                f"({transport_gist(error)}); look at the learner's errors"
            ) from error
        weights = frame.weights(buffer, manifest)
        for name, weight in weights:
            digest.update(name, weight)
        yield weights


def transport_gist(error: BaseException) -> str:
    """What a transport error says, without the source location and the advice that gloo adds."""
    return re.sub(r"^\[\S+\]\s*", "", first_line(error)).split(". This is typically")[0]


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * int(getattr(torch, dtype).itemsize)
