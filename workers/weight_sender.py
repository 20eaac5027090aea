"""Sender side of the weight transfer: what a learner rank that sends holds.

Decides how weights leave the learner: full tensors in the manifest's order, in buckets of bounded size, with a digest
over everything that was sent. It must not know where the weights come from (DeepSpeed) or what receives them; vLLM is
imported only where the nccl backend is chosen.

Invariants: what travels has the names, order, shapes and dtypes of the manifest; beside the weights it is given, a
sender through the host's memory holds the frames that travel (`Travelling`) and one that is being filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from trace_rl.config.placement import Placement
from trace_rl.config.roles import Sync
from trace_rl.errors import ConfigError, WeightSyncError
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_ipc import BucketLender, shared_memory
from trace_rl.workers.weight_wire import (
    GlooGroup,
    ReusedMemory,
    TransferBackend,
    TransferGroup,
    Travelling,
    WeightManifest,
    plan_frames,
    transport_gist,
)


def transfer_backend(settings: Sync, placement: Placement) -> TransferBackend:
    """The configured transport. `auto`: ipc where roles share GPUs, else nccl where both have some, else gloo.

    Raises:
        ConfigError: the transport cannot work under this placement.
    """
    has_gpus = placement.generator.num_gpus > 0 and placement.learner.num_gpus > 0
    is_colocated = placement.mode == "colocated"
    if settings.backend == "auto":
        return "ipc" if is_colocated else "nccl" if has_gpus else "gloo"
    if settings.backend == "ipc" and not is_colocated:
        raise ConfigError(
            f"sync.backend is ipc, but placement.mode is {placement.mode}, so that engines and learner ranks share no "
            "GPU; set placement.mode to colocated, or sync.backend to auto"
        )
    if settings.backend == "nccl" and is_colocated:
        raise ConfigError(
            "sync.backend is nccl, but placement.mode is colocated, and NCCL connects no two processes that share a "
            "GPU; set sync.backend to ipc or auto"
        )
    if settings.backend == "nccl" and not has_gpus:
        raise ConfigError(
            f"sync.backend is nccl, but placement.generator.num_gpus is {placement.generator.num_gpus:g} and "
            f"placement.learner.num_gpus is {placement.learner.num_gpus:g}, and both need GPUs; set sync.backend to "
            "gloo or auto"
        )
    return settings.backend


class _Link(Protocol):
    def send(self, manifest: WeightManifest, weights: Iterator[tuple[str, Tensor]], digest: WeightDigest) -> None: ...

    def close(self) -> None: ...


class _GlooLink:
    """Weights through the host's memory; works with and without GPUs."""

    def __init__(self, group: TransferGroup) -> None:
        self._group: GlooGroup | None = GlooGroup(group.address, group.port, 0, group.world_size, group.timeout_s)
        self._bucket_bytes = group.bucket_bytes
        self._memory = ReusedMemory()

    def send(self, manifest: WeightManifest, weights: Iterator[tuple[str, Tensor]], digest: WeightDigest) -> None:
        assert self._group is not None
        travelling = Travelling(self._group)
        for frame in plan_frames(manifest, self._bucket_bytes):
            while not travelling.has_room(frame):
                _finish(travelling)
            buffer = self._memory.take(frame.nbytes)
            for slot in frame.slots:
                name, tensor = next(weights)
                sent = frame.view(slot, buffer, manifest)
                sent.copy_(tensor)
                digest.update(name, sent)
            travelling.start(frame, buffer)
        next(weights, None)  # runs the iterable to its end
        while len(travelling):
            _finish(travelling)

    def close(self) -> None:
        self._group = None


def _finish(travelling: Travelling) -> None:
    try:
        travelling.finish()
    except RuntimeError as error:
        raise WeightSyncError(
            f"the weight sender lost an engine while sending ({transport_gist(error)}); look at the engines' errors"
        ) from error


class _NcclLink:
    """Weights from GPU to GPU, with vLLM's packed broadcast (`vllm.distributed.weight_transfer.nccl_engine`)."""

    def __init__(self, group: TransferGroup) -> None:
        from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group

        device = torch.cuda.current_device()
        self._group = stateless_init_process_group(group.address, group.port, 0, group.world_size, device)
        self._bucket_bytes = group.bucket_bytes

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
    """A learner rank that sends: announces what it will send, connects once, then sends each version.

    Args:
        rank: among the senders; above 0 only where several ranks send (`TransferGroup.num_senders`).
        device: where the rank's weights are.
    """

    def __init__(
        self,
        manifest: WeightManifest,
        backend: TransferBackend,
        rank: int = 0,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> None:
        self.manifest = manifest
        self._backend = backend
        self._rank = rank
        self._device = device
        self._link: _Link | None = None

    def connect(self, group: TransferGroup) -> None:
        """Open the group at its address and wait for every receiver; leaves a group joined before.

        Raises:
            WeightSyncError: not all receivers joined within the deadline.
        """
        self.close()
        try:
            self._link = self._open(group)
        except (RuntimeError, OSError) as error:
            raise WeightSyncError(
                f"the weight sender could not open a {self._backend} group of {group.world_size} at {group.address}:"
                f"{group.port} within {group.timeout_s:g} s ({transport_gist(error)}); look for an engine that died "
                "while starting, or a firewall between the nodes"
            ) from error

    def _open(self, group: TransferGroup) -> _Link:
        if self._backend == "ipc":
            return BucketLender(group, self._rank, shared_memory(self._device))
        return _NcclLink(group) if self._backend == "nccl" else _GlooLink(group)

    def send(self, named_weights: Iterable[tuple[str, Tensor]]) -> str:
        """Send full tensors in the manifest's order.

        The iterable is always run to its end, so it may gather sharded weights collectively.

        Returns:
            Digest of names, shapes, dtypes and bytes that were sent.

        Raises:
            WeightSyncError: the weights differ from the manifest, or a receiver is gone or too late.
        """
        if self._link is None:
            raise WeightSyncError("the weight sender was asked to send before it was connected; call connect first")
        digest, weights = WeightDigest(), iter(named_weights)
        try:
            self._link.send(self.manifest, announced(self.manifest, weights), digest)
        except BaseException:
            self.close()  # receivers that wait for the rest see the connection close instead of their deadline
            for _ in weights:  # other ranks gather to the end
                pass
            raise
        return digest.hexdigest()

    def close(self) -> None:
        """Leave the group; receivers that still wait for this sender get an error."""
        link, self._link = self._link, None
        if link is not None:
            link.close()


def announced(manifest: WeightManifest, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights, each compared with what the manifest announced.

    Raises:
        WeightSyncError: a weight differs in name, shape, dtype or place, or there are more or fewer.
    """
    count = 0
    for count, (name, tensor) in enumerate(weights, start=1):
        found = (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if count > len(manifest.names):
            raise WeightSyncError(f"the learner sent {name}, but its manifest ends after {len(manifest.names)} weights")
        expected = (manifest.names[count - 1], manifest.shapes[count - 1], manifest.dtypes[count - 1])
        if found != expected:
            raise WeightSyncError(
                f"weight {count - 1} of the learner is {found}, but its manifest announced {expected}; the order, "
                "shapes and dtypes of the weights must not change"
            )
        yield name, tensor.detach()
    if count != len(manifest.names):
        raise WeightSyncError(f"the learner sent {count} weights, but its manifest announced {len(manifest.names)}")
