"""How weights get from the learner to the engines: full weights by broadcast, or adapters as Ray objects.

A transport starts what has to happen for one version and names who takes part; waiting, deadlines and the proof are
those of `trace_rl.workers.weight_sync`. Must not know versions' meaning or the canary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray import ObjectRef

from trace_rl.config.roles import Sync
from trace_rl.workers.weight_sender import TransferGroup, WeightManifest


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


class WeightSource(Protocol):
    """The learner as a broadcast sees it: an object on the driver that talks to the learner's ranks.

    Rank 0 holds a `trace_rl.workers.weight_sender.WeightSender`; the other ranks only join the gathering of sharded
    weights. Names are those of the Hugging Face checkpoint, in an order that never changes; tied weights come once.
    """

    def rendezvous(self) -> tuple[str, int]:
        """Address of rank 0's node that engines can reach, and a port that is free there (`free_address`)."""
        ...

    def describe_weights(self) -> WeightManifest:
        """Names, full shapes and dtypes of what is sent (`WeightManifest.of`); nothing is gathered."""
        ...

    def connect_sender(self, group: TransferGroup) -> ObjectRef[Any]:
        """Start `WeightSender.connect(group)` on rank 0; resolves when every engine has joined."""
        ...

    def send_weights(self, version: int) -> list[ObjectRef[str]]:
        """Start `WeightSender.send`; one reference a rank, and rank 0's resolves to the digest of what was sent."""
        ...


class Broadcast:
    """All weights, from rank 0 to every engine at once, in buckets of bounded size."""

    def __init__(self, source: WeightSource, settings: Sync) -> None:
        self._source = source
        self._settings = settings
        self._manifest = WeightManifest((), (), ())

    @property
    def nbytes(self) -> int:
        return self._manifest.nbytes

    def connect(self, engines: Mapping[str, Any]) -> tuple[str, dict[str, ObjectRef[Any]]]:
        self._manifest = self._source.describe_weights()
        address, port = self._source.rendezvous()
        settings = self._settings
        group = TransferGroup(address, port, 1 + len(engines), settings.bucket_mib, settings.timeout_s)
        joins: dict[str, ObjectRef[Any]] = {"the learner": self._source.connect_sender(group)}
        for rank, (name, engine) in enumerate(engines.items(), start=1):
            joins[name] = engine.join_transfer.remote(group, rank)
        return f"the transfer group at {address}:{port}", joins

    def start(self, engines: Mapping[str, Any], version: int) -> Transfer:
        receipts = {name: engine.receive_weights.remote(self._manifest, version) for name, engine in engines.items()}
        return Transfer(receipts, self._source.send_weights(version))


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
