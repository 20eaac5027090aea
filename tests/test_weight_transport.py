"""How many calls a sync takes, which ranks take part where, and files that engines read once they are complete."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from trace_rl.config.roles import Sync
from trace_rl.errors import WeightSyncError
from trace_rl.workers.generator_engine import WeightReceipt
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_file import StoredManifest, keep_only, read_version, write_version
from trace_rl.workers.weight_ipc import BucketReader, NodeMemory
from trace_rl.workers.weight_sender import WeightSender
from trace_rl.workers.weight_sync import ProvenWeightSync, canary_sequences
from trace_rl.workers.weight_transport import transport_of
from trace_rl.workers.weight_wire import (
    GlooGroup,
    ReusedMemory,
    TransferBackend,
    TransferGroup,
    WeightManifest,
    free_address,
    receive_frames,
)

pytestmark = pytest.mark.engine

CANARY = canary_sequences(300, count=1, length=4)


class Rank:
    """A learner rank with some random weights; starting processes is dear, so each plays one part after another."""

    def play(self, rank: int, num_weights: int, backend: TransferBackend) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weights = {f"w{n}": torch.randn(64, generator=generator) for n in range(num_weights)}
        self.manifest = WeightManifest.of((n, tuple(w.shape), w.dtype) for n, w in self._weights.items())
        self._sender = WeightSender(self.manifest, backend, rank)

    def describe(self) -> WeightManifest:
        return self.manifest

    def connect(self, group: TransferGroup) -> None:
        self._sender.connect(group)

    def send(self) -> str:
        return self._sender.send(iter(self._weights.items()))

    @ray.method(num_returns=2)
    def write(self, version: int, folder: str) -> tuple[StoredManifest, str]:
        return write_version(Path(folder), version, self.manifest, iter(self._weights.items()), 1 << 20)

    def keep_only(self, version: int, folder: str) -> None:
        keep_only(Path(folder), version)

    def logprobs(self) -> list[np.ndarray]:
        return [np.zeros(3, dtype=np.float32)]


class Ranks:
    """`trace_rl.workers.weight_transport.WeightSource` over rank actors."""

    def __init__(self, actors: Sequence[Any], backend: TransferBackend) -> None:
        self._actors = actors
        self.num_senders = len(actors) if backend == "ipc" else 1

    def rendezvous(self) -> tuple[str, int]:
        return free_address(is_single_node=True)

    def describe_weights(self) -> WeightManifest:
        return ray.get(self._actors[0].describe.remote(), timeout=60)

    def connect_sender(self, group: TransferGroup) -> list[Any]:
        return [actor.connect.remote(group) for actor in self._actors[: self.num_senders]]

    def send_weights(self, version: int) -> list[Any]:
        return [actor.send.remote() for actor in self._actors[: self.num_senders]]

    def write_weights(self, version: int, folder: str) -> tuple[Any, list[Any]]:
        manifest, digest = self._actors[0].write.remote(version, folder)
        return manifest, [digest]

    def keep_only(self, version: int, folder: str) -> Any:
        return self._actors[0].keep_only.remote(version, folder)

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        return ray.get(self._actors[0].logprobs.remote(), timeout=60)


class Engine:
    """Stands in for a `GeneratorEngine`: its workers take weights as vLLM's do, and no model computes with them."""

    def play(self, num_workers: int, backend: TransferBackend) -> None:
        self._backend = backend
        self._num_workers = num_workers
        self._folders: list[list[str]] = []

    def join_transfer(self, group: TransferGroup, rank: int) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._bucket_bytes = group.bucket_bytes
        self._pool = ThreadPoolExecutor(self._num_workers)
        self._links = list(self._pool.map(lambda worker: self._link(group, rank + worker), range(self._num_workers)))

    def _link(self, group: TransferGroup, rank: int) -> Any:
        if self._backend == "ipc":
            return BucketReader(group, rank, NodeMemory())
        return GlooGroup(group.address, group.port, rank, group.world_size, group.timeout_s)

    def receive_weights(self, manifest: WeightManifest, version: int) -> WeightReceipt:
        if isinstance(manifest, StoredManifest):
            self._folders.append(sorted(path.name for path in Path(manifest.folder).parent.iterdir()))
            digest = WeightDigest()
            for _ in read_version(manifest, digest):
                pass
            return WeightReceipt(version, digest.hexdigest())
        (found,) = set(self._pool.map(lambda link: self._receive(link, manifest), self._links))
        return WeightReceipt(version, found)

    def _receive(self, link: Any, manifest: WeightManifest) -> str:
        digest = WeightDigest()
        if isinstance(link, BucketReader):
            for bucket, buffer in link.buckets(manifest):
                for name, weight in bucket.weights(buffer, manifest):
                    digest.update(name, weight)
            return digest.hexdigest()
        for _ in receive_frames(link, manifest, self._bucket_bytes, ReusedMemory(), digest):
            pass
        return digest.hexdigest()

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        return [np.zeros(3, dtype=np.float32) for _ in sequences]

    def accept(self, version: int) -> None:
        pass

    def folders(self) -> list[list[str]]:
        """What was in the shared folder at each update."""
        return self._folders


@pytest.fixture
def submissions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the actor methods that this process has submitted."""
    names: list[str] = []
    submit = ray.actor.ActorHandle._actor_method_call

    def counted(self: Any, method_name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(method_name)
        return submit(self, method_name, *args, **kwargs)

    monkeypatch.setattr(ray.actor.ActorHandle, "_actor_method_call", counted)
    return names


@pytest.fixture(scope="module")
def actors(local_ray: None) -> Iterator[list[Any]]:
    """Two for ranks and two for engines."""
    started = [ray.remote(role).options(num_cpus=0.2).remote() for role in (Rank, Rank, Engine, Engine)]
    yield started
    for actor in started:
        ray.kill(actor)


def sync_between(
    actors: list[Any],
    num_weights: int,
    backend: TransferBackend,
    folder: Path | None = None,
    num_ranks: int = 1,
    workers: int = 1,
) -> ProvenWeightSync:
    """The sync of two engines with so many workers each."""
    ranks, engines = actors[:num_ranks], actors[2:]
    played = [rank.play.remote(number, num_weights, backend) for number, rank in enumerate(ranks)]
    played += [engine.play.remote(workers, backend) for engine in engines]
    ray.get(played, timeout=120)
    source = Ranks(ranks, backend)
    settings = Sync(bucket_mib=1, timeout_s=60, folder=str(folder))
    return ProvenWeightSync(source, transport_of(source, settings, backend, workers), engines, CANARY, settings)


@pytest.mark.parametrize(
    ("backend", "calls"),
    [
        # per engine receive, score and accept; of the learner send and the canary
        ("gloo", 2 * 3 + 1 + 1),
        ("ipc", 2 * 3 + 1 + 1),
        ("file", 2 * 3 + 1 + 1 + 1),  # and clearing away
    ],
)
def test_a_sync_takes_as_many_calls_for_few_weights_as_for_many(
    actors: list[Any], submissions: list[str], tmp_path: Path, backend: TransferBackend, calls: int
) -> None:
    counts = []
    for num_weights in (2, 500):
        sync = sync_between(actors, num_weights, backend, tmp_path)
        sync.sync(1)
        submissions.clear()
        metrics = sync.sync(2)
        counts.append(len(submissions))
        assert metrics["sync/weight_bytes"] == num_weights * 64 * 4
    assert counts == [calls, calls]


@pytest.mark.parametrize("backend", ["gloo", "ipc"])
def test_every_worker_of_every_engine_takes_part(actors: list[Any], backend: TransferBackend) -> None:
    # Two engines of two workers: ranks 1 to 4 behind one sender, or 2 to 5 behind two ranks that lend.
    sync = sync_between(actors, 20, backend, num_ranks=2, workers=2)
    for version in range(2):
        assert sync.sync(version)["sync/weight_bytes"] == 20 * 64 * 4


def test_engines_read_files_when_they_are_complete_and_older_ones_go(actors: list[Any], tmp_path: Path) -> None:
    sync = sync_between(actors, 5, "file", tmp_path)
    for version in range(3):
        sync.sync(version)
        assert [path.name for path in tmp_path.iterdir()] == [f"version-{version}"]
    seen = ray.get(actors[-1].folders.remote(), timeout=60)
    assert seen == [["version-0"], ["version-0", "version-1"], ["version-1", "version-2"]]


def test_files_that_cannot_be_written_are_told_once(actors: list[Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightSyncError) as caught:
        sync_between(actors, 5, "file", tmp_path / "file").sync(1)
    assert str(caught.value).count("could not write the weights of version 1") == 1
