"""Sender side of the weight transfer and the wire format: what the learner's rank 0 holds.

Decides how weights travel: full tensors in the manifest's order, by broadcast from rank 0 of a group of their own, in
buckets of bounded size, with a digest over everything that was sent. It must not know where the weights come from
(DeepSpeed) or what receives them; vLLM is imported only where the nccl backend is chosen.

Invariants: both sides derive the buckets from the manifest alone, and both compute `WeightDigest` over the tensors as
they travelled, so equal digests mean equal names, order, shapes, dtypes and bytes.
"""

from __future__ import annotations

import hashlib
import math
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from trace_rl.config.placement import Placement
from trace_rl.config.roles import Sync
from trace_rl.errors import WeightSyncError, first_line

TransferBackend = Literal["gloo", "nccl"]

_ALIGNMENT = 16
_CHECKSUM_SLICE = 1 << 22


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

    @property
    def nbytes(self) -> int:
        """Bytes of all weights together."""
        return sum(_nbytes(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True))


@dataclass(frozen=True)
class TransferGroup:
    """Where the sender waits for the receivers, and what both sides must agree on."""

    address: str
    port: int
    world_size: int
    """The sender, as rank 0, and every engine's workers."""
    bucket_mib: int
    timeout_s: float


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
    """Weights that travel in one broadcast."""

    slots: tuple[Slot, ...]
    nbytes: int

    def view(self, slot: Slot, buffer: Tensor, manifest: WeightManifest) -> Tensor:
        """The slot's weight as a view of the bucket's byte buffer."""
        dtype = getattr(torch, manifest.dtypes[slot.index])
        return buffer[slot.start : slot.end].view(dtype).view(manifest.shapes[slot.index])


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


class WeightDigest:
    """Running digest over names, shapes, dtypes and contents, in order.

    Tensors on a CPU are hashed byte by byte (BLAKE2b); on an accelerator they are summed up where they are
    (`checksum`), which catches any change of a single word but is no cryptographic hash.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._sums: list[Tensor] = []

    def update(self, name: str, tensor: Tensor) -> None:
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.device.type == "cpu":
            self._hash.update(_bytes(tensor).numpy().data)
        else:
            self._sums.append(checksum(tensor))

    def hexdigest(self) -> str:
        """Digest of everything so far; waits for the accelerator where there is one."""
        final = self._hash.copy()
        if self._sums:
            final.update(torch.stack(self._sums).cpu().numpy().data)
        return final.hexdigest()


def checksum(tensor: Tensor) -> Tensor:
    """Position-weighted sum of the tensor's words, sum_i w[i] * (2 i + 1) mod 2**64, as an int64 scalar on its device.

    The odd weights are invertible mod 2**64, so any change of one word changes the sum.
    """
    words = _bytes(tensor).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHECKSUM_SLICE):  # in slices: the int64 copy is up to 8 times as large
        part = words[start : start + _CHECKSUM_SLICE].to(torch.int64)
        total += (part * (2 * torch.arange(start, start + part.numel(), device=tensor.device) + 1)).sum()
    return total


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


def transfer_backend(settings: Sync, placement: Placement) -> TransferBackend:
    """The configured transport; `auto` is nccl where generator and learner both have GPUs."""
    if settings.backend != "auto":
        return settings.backend
    has_gpus = placement.generator.num_gpus > 0 and placement.learner.num_gpus > 0
    return "nccl" if has_gpus else "gloo"


class GlooGroup:
    """A gloo group of the sender (rank 0) and the receivers, apart from torch's global process group."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._store = TCPStore(
            address, port, world_size, is_master=rank == 0, timeout=self._timeout, wait_for_workers=False
        )
        self._group: Any = ProcessGroupGloo(self._store, rank, world_size, self._timeout)

    def broadcast(self, buffer: Tensor) -> None:
        """Send (rank 0) or fill (others) a CPU byte buffer. Raises RuntimeError when a peer is gone or too late."""
        options = BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = self._timeout
        self._group.broadcast([buffer], options).wait(self._timeout)


class _Link(Protocol):
    def send(self, manifest: WeightManifest, weights: Iterator[tuple[str, Tensor]], digest: WeightDigest) -> None: ...

    def close(self) -> None: ...


class _GlooLink:
    """Weights through the host's memory; works with and without GPUs."""

    def __init__(self, group: TransferGroup) -> None:
        self._group: GlooGroup | None = GlooGroup(group.address, group.port, 0, group.world_size, group.timeout_s)
        self._bucket_bytes = group.bucket_mib * 2**20

    def send(self, manifest: WeightManifest, weights: Iterator[tuple[str, Tensor]], digest: WeightDigest) -> None:
        assert self._group is not None
        for bucket in plan_buckets(manifest, self._bucket_bytes):
            buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
            for slot in bucket.slots:
                name, tensor = next(weights)
                travelling = bucket.view(slot, buffer, manifest)
                travelling.copy_(tensor)
                digest.update(name, travelling)
            self._broadcast(buffer)
        next(weights, None)  # runs the iterable to its end

    def _broadcast(self, buffer: Tensor) -> None:
        assert self._group is not None
        try:
            self._group.broadcast(buffer)
        except RuntimeError as error:
            raise WeightSyncError(
                f"the weight sender lost an engine while sending ({transport_gist(error)}); look at the engines' errors"
            ) from error

    def close(self) -> None:
        self._group = None


class _NcclLink:
    """Weights from GPU to GPU, with vLLM's packed broadcast (`vllm.distributed.weight_transfer.nccl_engine`)."""

    def __init__(self, group: TransferGroup) -> None:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        device = torch.cuda.current_device()
        self._group = stateless_init_process_group(group.address, group.port, 0, group.world_size, device)
        self._bucket_bytes = group.bucket_mib * 2**20

    def send(self, manifest: WeightManifest, weights: Iterator[tuple[str, Tensor]], digest: WeightDigest) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        def linear(item: tuple[str, Tensor]) -> Tensor:
            name, tensor = item
            contiguous = tensor.contiguous()
            digest.update(name, contiguous)
            return contiguous

        packed_nccl_broadcast_producer(
            iterator=weights, group=self._group, src=0, post_iter_func=linear, buffer_size_bytes=self._bucket_bytes
        )
        torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        self._group.destroy()


class WeightSender:
    """Rank 0 of the transfer group: announces what it will send, connects once, then sends each version."""

    def __init__(self, manifest: WeightManifest, backend: TransferBackend) -> None:
        self.manifest = manifest
        self._backend = backend
        self._link: _Link | None = None

    def connect(self, group: TransferGroup) -> None:
        """Open the group at its address and wait for every receiver; leaves a group joined before.

        Raises:
            WeightSyncError: not all receivers joined within the deadline.
        """
        self.close()
        try:
            self._link = _GlooLink(group) if self._backend == "gloo" else _NcclLink(group)
        except (RuntimeError, OSError) as error:
            raise WeightSyncError(
                f"the weight sender could not open a {self._backend} group of {group.world_size} at {group.address}:"
                f"{group.port} within {group.timeout_s:g} s ({transport_gist(error)}); look for an engine that died "
                "while starting, or a firewall between the nodes"
            ) from error

    def send(self, named_weights: Iterable[tuple[str, Tensor]]) -> str:
        """Broadcast full tensors in the manifest's order.

        The iterable is always run to its end, so it may gather sharded weights collectively.

        Returns:
            Digest of names, shapes, dtypes and bytes that were sent.

        Raises:
            WeightSyncError: the weights differ from the manifest, or a receiver is gone or too late.
        """
        if self._link is None:
            raise WeightSyncError("the weight sender was asked to send before it was connected; call connect first")
        digest = WeightDigest()
        try:
            self._link.send(self.manifest, _checked(self.manifest, named_weights), digest)
        except BaseException:
            self.close()  # receivers that wait for the rest see the connection close instead of their deadline
            raise
        return digest.hexdigest()

    def close(self) -> None:
        """Leave the group; receivers that still wait for this sender get an error."""
        link, self._link = self._link, None
        if link is not None:
            link.close()


def _checked(manifest: WeightManifest, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights, each compared with what the manifest announced."""
    count = 0
    for count, (name, tensor) in enumerate(weights, start=1):
        found = (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if count > len(manifest.names):
            raise WeightSyncError(f"the learner sent {name}, but its manifest ends after {len(manifest.names)} weights")
        announced = (manifest.names[count - 1], manifest.shapes[count - 1], manifest.dtypes[count - 1])
        if found != announced:
            raise WeightSyncError(
                f"weight {count - 1} of the learner is {found}, but its manifest announced {announced}; the order, "
                "shapes and dtypes of the weights must not change"
            )
        yield name, tensor.detach()
    if count != len(manifest.names):
        raise WeightSyncError(f"the learner sent {count} weights, but its manifest announced {len(manifest.names)}")


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * int(getattr(torch, dtype).itemsize)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def transport_gist(error: BaseException) -> str:
    """What a transport error says, without the source location and the advice that gloo adds."""
    return re.sub(r"^\[\S+\]\s*", "", first_line(error)).split(". This is typically")[0]
