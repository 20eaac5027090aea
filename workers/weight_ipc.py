"""Weights by shared memory: engines read buckets in place, out of the memory of the learner rank that they share with.

Decides the protocol by which a rank lends a bucket and knows when it was read. Every rank lends, because an engine's
worker can open the memory of its own GPU only; it finds the rank that is on it by what the ranks tell of themselves.
Two buffers take turns, each shared once a sync, so that a sync opens two handles a worker however many weights there
are, and the control plane is a gloo group. It must not know where the weights come from or what reads them.

vLLM's own ipc engine is not used because it takes one call of `update_weights` a bucket; this one takes one a sync. The
handles are those of torch (`reduce_tensor`), as there. Without GPUs engines and ranks share the memory of their node.

Invariant: buffer b is written again only after the barrier that follows its readers' last access.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trace_rl.errors import WeightSyncError
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_wire import Bucket, GlooGroup, TransferGroup, WeightManifest, plan_buckets, transport_gist

_BUFFERS = 2
_NODE_MEMORY = Path("/dev/shm")
_BUCKET = "weights-"
_DEVICE = 6  # where `reduce_tensor` names the GPU


class SharedMemory(Protocol):
    """Memory that another process can read while it is held here."""

    def place(self) -> str:
        """What processes that can read each other's memory have in common."""
        ...

    def allocate(self, nbytes: int) -> tuple[Tensor, str]:
        """A byte buffer, and the handle by which others open it."""
        ...

    def open(self, handle: str) -> Tensor:
        """The buffer of another process."""
        ...

    def settle(self) -> None:
        """Wait until what was written is there, and what was read has been read."""
        ...

    def retire(self, handle: str) -> None:
        """Everyone has opened the buffer, or nobody will."""
        ...

    def reclaim(self) -> None:
        """Let go of buffers that others have stopped using."""
        ...


def shared_memory(device: torch.device) -> SharedMemory:
    """The memory that weights on this device are lent through."""
    return GpuMemory(device) if device.type == "cuda" else NodeMemory()


class GpuMemory:
    """Memory of one GPU, by CUDA's interprocess handles."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def place(self) -> str:
        return str(torch.cuda.get_device_properties(self._device).uuid)

    def allocate(self, nbytes: int) -> tuple[Tensor, str]:
        from torch.multiprocessing.reductions import reduce_tensor

        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        _, parts = reduce_tensor(buffer)
        return buffer, to_text(parts)

    def open(self, handle: str) -> Tensor:
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        return rebuild_cuda_tensor(*from_text(handle, self._device.index or 0))

    def settle(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def retire(self, handle: str) -> None:
        """Nothing: torch counts who holds it."""

    def reclaim(self) -> None:
        torch.cuda.ipc_collect()


class NodeMemory:
    """Memory of the node, by files that were never on a disk."""

    def place(self) -> str:
        return f"the memory of {socket.gethostname()}"

    def allocate(self, nbytes: int) -> tuple[Tensor, str]:
        descriptor, path = tempfile.mkstemp(prefix=_BUCKET, dir=_NODE_MEMORY)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)  # too little memory is an error here, not a signal on writing
            return self._map(path, nbytes), f"{nbytes}:{path}"
        except OSError as error:
            os.unlink(path)
            raise WeightSyncError(
                f"{_NODE_MEMORY} has no room for a bucket of {nbytes / 2**20:.0f} MiB ({error.strerror}); make it "
                "larger, lower sync.bucket_mib, or set sync.backend to gloo"
            ) from error
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)

    def open(self, handle: str) -> Tensor:
        nbytes, _, path = handle.partition(":")
        if not path.startswith(f"{_NODE_MEMORY}/{_BUCKET}") or ".." in path:  # a peer says it
            raise WeightSyncError(
                f"a learner rank lends {path!r}, which is no bucket of {_NODE_MEMORY}; look at its log"
            )
        return self._map(path, int(nbytes))

    def settle(self) -> None:
        """Nothing: what is written is there."""

    def retire(self, handle: str) -> None:
        os.unlink(handle.partition(":")[2])

    def reclaim(self) -> None:
        """Nothing: memory without a name goes with its last user."""

    def _map(self, path: str, nbytes: int) -> Tensor:
        return torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)


class BucketLender:
    """A learner rank, which lends its buckets to the engines' workers that share memory with it.

    Args:
        rank: among the senders.
    """

    def __init__(self, group: TransferGroup, rank: int, memory: SharedMemory) -> None:
        self._group: GlooGroup | None = GlooGroup(group.address, group.port, rank, group.world_size, group.timeout_s)
        self._bucket_bytes = group.bucket_bytes
        self._memory = memory
        self._round = 0

    def send(self, manifest: WeightManifest, weights: Iterator[tuple[str, Tensor]], digest: WeightDigest) -> None:
        """Lend all weights, bucket by bucket; returns when every engine has read them.

        Raises:
            WeightSyncError: an engine or another rank is gone or too late, or there is no room for two buckets.
        """
        assert self._group is not None
        group, buckets = self._group, plan_buckets(manifest, self._bucket_bytes)
        buffers = self._share_buffers(group, max((bucket.nbytes for bucket in buckets), default=1))
        for number, bucket in enumerate(buckets):
            for slot in bucket.slots:
                name, tensor = next(weights)
                lent = bucket.view(slot, buffers[number % _BUFFERS], manifest)
                lent.copy_(tensor)
                digest.update(name, lent)
            self._memory.settle()
            _meet(group)  # bucket `number` is there, and the one before has been read
        next(weights, None)  # runs the iterable to its end
        _meet(group)
        del buffers
        self._memory.reclaim()

    def _share_buffers(self, group: GlooGroup, nbytes: int) -> list[Tensor]:
        shared = [self._memory.allocate(nbytes) for _ in range(_BUFFERS)]
        try:
            offer = {"place": self._memory.place(), "handles": [handle for _, handle in shared]}
            group.tell(f"offer {self._round}", json.dumps(offer))
            self._round += 1
            _meet(group)  # everyone has opened them
        finally:
            for _, handle in shared:
                self._memory.retire(handle)
        return [buffer for buffer, _ in shared]

    def close(self) -> None:
        self._group = None


class BucketReader:
    """An engine's worker, which reads the buckets of the learner rank that it shares memory with.

    Args:
        rank: in the group, after the senders.
    """

    def __init__(self, group: TransferGroup, rank: int, memory: SharedMemory) -> None:
        self._group = GlooGroup(group.address, group.port, rank, group.world_size, group.timeout_s)
        self._num_senders = group.num_senders
        self._bucket_bytes = group.bucket_bytes
        self._memory = memory
        self._round = 0

    def buckets(self, manifest: WeightManifest) -> Iterator[tuple[Bucket, Tensor]]:
        """Every bucket with a copy of its bytes, on the device of the memory.

        A copy, because layers keep weights until they are complete, and a bucket is overwritten by the next but one.

        Raises:
            WeightSyncError: no rank shares this worker's memory, or a rank or another engine is gone or too late.
        """
        lent = self._open()
        for number, bucket in enumerate(plan_buckets(manifest, self._bucket_bytes)):
            _meet(self._group)
            copy = lent[number % _BUFFERS][: bucket.nbytes].clone()
            self._memory.settle()
            yield bucket, copy
        del lent
        _meet(self._group)

    def _open(self) -> list[Tensor]:
        try:
            offers = [json.loads(offer) for offer in self._group.told(f"offer {self._round}", self._num_senders)]
        except RuntimeError as error:
            raise _lost(error) from error
        self._round += 1
        place = self._memory.place()
        handles: list[list[str]] = [offer["handles"] for offer in offers if offer["place"] == place]
        if not handles:
            raise WeightSyncError(
                f"this engine's worker is on {place}, but the learner's ranks are on "
                f"{', '.join(sorted(offer['place'] for offer in offers))}; sync.backend=ipc needs a rank on the same, "
                "look at placement.mode"
            )
        opened = [self._memory.open(handle) for handle in handles[0]]
        _meet(self._group)
        return opened


def _meet(group: GlooGroup) -> None:
    """Wait until every rank and every worker is here."""
    try:
        group.barrier()
    except RuntimeError as error:
        raise _lost(error) from error


def _lost(error: RuntimeError) -> WeightSyncError:
    return WeightSyncError(
        f"lost a learner rank or an engine while weights were shared ({transport_gist(error)}); look at their errors"
    )


def to_text(parts: Sequence[Any]) -> str:
    """What `reduce_tensor` says of a byte buffer but for its classes: numbers and bytes, so that nothing is pickled."""
    size, _, offset = parts[1:4]
    rest = [part.hex() if isinstance(part, bytes) else part for part in parts[_DEVICE + 1 :]]
    return json.dumps([size[0], offset, [isinstance(part, bytes) for part in parts[_DEVICE + 1 :]], rest])


def from_text(text: str, device: int) -> list[Any]:
    """Arguments of `rebuild_cuda_tensor`, on the GPU that has this number here."""
    nbytes, offset, are_bytes, rest = json.loads(text)
    parts = [bytes.fromhex(part) if is_bytes else part for part, is_bytes in zip(rest, are_bytes, strict=True)]
    return [Tensor, (nbytes,), (1,), offset, torch.TypedStorage, torch.uint8, device, *parts]
