"""How weights get from the learner to the engines: by broadcast, shared memory or files, or adapters as Ray objects.

A transport starts what has to happen for one version and names who takes part; waiting, deadlines and the proof are
those of `trace_rl.workers.weight_sync`. Must not know versions' meaning or the canary.

Invariant: the number of calls that a version takes depends on the numbers of engines and ranks alone, not on how many
weights there are or how large they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray import ObjectRef

from trace_rl.config.roles import Sync
from trace_rl.workers.weight_wire import TransferBackend, TransferGroup, WeightManifest


@dataclass(frozen=True)
class Transfer:
    """One version on its way."""

    receipts: Mapping[str, ObjectRef[Any]]
    """By engine: resolves to its `WeightReceipt`."""
    digests: Sequence[ObjectRef[str]]
    """By learner rank; that of rank 0 resolves to the digest of what was sent."""


class Transport(Protocol):
    """A way from the learner to its engines."""

    @property
    def nbytes(self) -> int:
        """Bytes that every engine receives; known once connected."""
        ...

    def connect(self, engines: Mapping[str, Any]) -> tuple[str, dict[str, ObjectRef[Any]]]:
        """Start to connect everyone: where that is, and what resolves when each has joined."""
        ...

    def start(self, engines: Mapping[str, Any], version: int) -> Transfer:
        """Start to move the learner's present weights as `version`."""
        ...

    def finish(self, version: int) -> dict[str, ObjectRef[Any]]:
        """Start to clear away what no engine needs, now that all have accepted `version`."""
        ...


class WeightSource(Protocol):
    """The learner as a transport of all weights sees it: an object on the driver that talks to the learner's ranks.

    The ranks that send hold a `trace_rl.workers.weight_sender.WeightSender`; the others only join the gathering of
    sharded weights. Names are those of the Hugging Face checkpoint, in an order that never changes; tied weights come
    once.
    """

    @property
    def num_senders(self) -> int:
        """Ranks that send, the first ones: all of them where engines read the memory of the rank beside them."""
        ...

    def rendezvous(self) -> tuple[str, int]:
        """Address of rank 0's node that engines can reach, and a port that is free there (`free_address`)."""
        ...

    def describe_weights(self) -> WeightManifest:
        """Names, full shapes and dtypes of what is sent (`WeightManifest.of`); nothing is gathered."""
        ...

    def connect_sender(self, group: TransferGroup) -> list[ObjectRef[Any]]:
        """Start `WeightSender.connect(group)` on every rank that sends; resolve when every engine has joined."""
        ...

    def send_weights(self, version: int) -> list[ObjectRef[str]]:
        """Start `WeightSender.send`; one reference a rank, and rank 0's resolves to the digest of what was sent."""
        ...

    def write_weights(self, version: int, folder: str) -> tuple[ObjectRef[Any], list[ObjectRef[str]]]:
        """Start `weight_file.write_version`: where the weights are, and a digest a rank, the first being theirs."""
        ...

    def keep_only(self, version: int, folder: str) -> ObjectRef[Any]:
        """Start `weight_file.keep_only` where the weights were written."""
        ...


def transport_of(source: WeightSource, settings: Sync, backend: TransferBackend, workers_per_engine: int) -> Transport:
    """The transport of all weights.

    Args:
        workers_per_engine: generator.tensor_parallel; each receives all weights and keeps its share.
    """
    if backend == "file":
        return Files(source, settings)
    return Broadcast(source, settings, workers_per_engine)


class Broadcast:
    """All weights, from the learner to every engine at once, in buckets of bounded size, in a group that all join."""

    def __init__(self, source: WeightSource, settings: Sync, workers_per_engine: int = 1) -> None:
        self._source = source
        self._settings = settings
        self._workers_per_engine = workers_per_engine
        self._manifest = WeightManifest((), (), ())

    @property
    def nbytes(self) -> int:
        return self._manifest.nbytes

    def connect(self, engines: Mapping[str, Any]) -> tuple[str, dict[str, ObjectRef[Any]]]:
        self._manifest = self._source.describe_weights()
        address, port = self._source.rendezvous()
        senders, workers = self._source.num_senders, self._workers_per_engine
        group = TransferGroup(
            address,
            port,
            senders + workers * len(engines),
            self._settings.bucket_mib,
            self._settings.timeout_s,
            senders,
        )
        joins = {f"learner rank {rank}": joined for rank, joined in enumerate(self._source.connect_sender(group))}
        for number, (name, engine) in enumerate(engines.items()):
            joins[name] = engine.join_transfer.remote(group, senders + workers * number)
        return f"the transfer group at {address}:{port}", joins

    def start(self, engines: Mapping[str, Any], version: int) -> Transfer:
        receipts = {name: engine.receive_weights.remote(self._manifest, version) for name, engine in engines.items()}
        return Transfer(receipts, self._source.send_weights(version))

    def finish(self, version: int) -> dict[str, ObjectRef[Any]]:
        return {}


class Files:
    """All weights, by files in a folder that learner and engines see; engines read once everything is written."""

    def __init__(self, source: WeightSource, settings: Sync) -> None:
        assert settings.folder is not None, "sync.backend=file needs sync.folder"
        self._source = source
        self._folder = settings.folder
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def connect(self, engines: Mapping[str, Any]) -> tuple[str, dict[str, ObjectRef[Any]]]:
        self._nbytes = self._source.describe_weights().nbytes
        return f"the folder {self._folder}", {}

    def start(self, engines: Mapping[str, Any], version: int) -> Transfer:
        manifest, digests = self._source.write_weights(version, self._folder)
        return Transfer(
            {name: engine.receive_weights.remote(manifest, version) for name, engine in engines.items()}, digests
        )

    def finish(self, version: int) -> dict[str, ObjectRef[Any]]:
        return {"learner rank 0": self._source.keep_only(version, self._folder)}


class AdapterSource(Protocol):
    """The learner as the sync of adapters sees it."""

    def describe_weights(self) -> WeightManifest:
        """Names, full shapes and dtypes of the adapters."""
        ...

    def export_adapter(self, version: int) -> tuple[ObjectRef[Any], list[ObjectRef[str]]]:
        """Start to copy the adapters: the copy, and a digest a rank, of which rank 0's is that of the copy."""
        ...


class AdapterObjects:
    """Low-rank adapters alone: small enough for Ray's object store, which every engine reads from."""

    def __init__(self, source: AdapterSource) -> None:
        self._source = source
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def connect(self, engines: Mapping[str, Any]) -> tuple[str, dict[str, ObjectRef[Any]]]:
        self._nbytes = self._source.describe_weights().nbytes
        return "the object store", {}

    def start(self, engines: Mapping[str, Any], version: int) -> Transfer:
        adapter, digests = self._source.export_adapter(version)
        return Transfer(
            {name: engine.load_adapter.remote(adapter, version) for name, engine in engines.items()}, digests
        )

    def finish(self, version: int) -> dict[str, ObjectRef[Any]]:
        return {}
