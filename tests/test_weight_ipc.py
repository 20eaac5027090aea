"""Weights lent by shared memory: who reads whose, that buffers turn over safely, and what fails how.

Threads stand for ranks and workers, and the node's memory for that of GPUs: the protocol is the same.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trace_rl.errors import WeightSyncError
from trace_rl.workers import weight_ipc
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_ipc import BucketLender, BucketReader, NodeMemory, from_text, to_text
from trace_rl.workers.weight_wire import TransferGroup, WeightManifest, free_address

Weights = dict[str, torch.Tensor]


class PartOfNode(NodeMemory):
    """Memory that only processes of one place can open, as that of a GPU."""

    def __init__(self, place: str) -> None:
        self._place = place
        self.num_opened = 0

    def place(self) -> str:
        return self._place

    def open(self, handle: str) -> torch.Tensor:
        self.num_opened += 1
        return super().open(handle)


def weights_of(seed: int, count: int = 9) -> Weights:
    """Nine float32 weights of 400 KiB, of which two fill a bucket of 1 MiB, and one of 3 MiB."""
    generator = torch.Generator().manual_seed(seed)
    weights = {f"w{number}": torch.randn(100, 1024, generator=generator) for number in range(count)}
    return weights | {"large": torch.randn(768, 1024, generator=generator)}


def run_all(*works: Callable[[], object]) -> list[BaseException | None]:
    """Run everyone at once; how each ended."""
    ends: list[BaseException | None] = [None] * len(works)

    def run(place: int) -> None:
        try:
            works[place]()
        except BaseException as error:
            ends[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return ends


class Party:
    """Two ranks on GPUs A and B, each with the same weights, and two workers beside them."""

    def __init__(self, places: tuple[str, ...] = ("B", "A"), timeout_s: float = 20) -> None:
        self.manifest = WeightManifest.of((n, tuple(w.shape), w.dtype) for n, w in weights_of(0).items())
        senders = 2
        address, port = free_address(is_single_node=True)
        group = TransferGroup(address, port, senders + len(places), 1, timeout_s, senders)
        self.memories = [PartOfNode(place) for place in places]
        self.lenders: list[BucketLender] = []
        self.readers: list[BucketReader] = []
        self.sent: dict[int, str] = {}
        self.received: dict[int, Weights] = {}
        self.digests: dict[int, str] = {}
        lent: dict[int, BucketLender] = {}
        read: dict[int, BucketReader] = {}

        def lender(rank: int) -> Callable[[], object]:
            return lambda: lent.update({rank: BucketLender(group, rank, PartOfNode("AB"[rank]))})

        def reader(number: int) -> Callable[[], object]:
            memory = self.memories[number]
            return lambda: read.update({number: BucketReader(group, senders + number, memory)})

        joined = run_all(*(lender(rank) for rank in range(senders)), *(reader(n) for n in range(len(places))))
        assert joined == [None] * group.world_size
        self.lenders = [lent[rank] for rank in range(senders)]
        self.readers = [read[number] for number in range(len(places))]

    def lend(self, rank: int, weights: Weights) -> None:
        digest = WeightDigest()
        self.lenders[rank].send(self.manifest, iter(weights.items()), digest)
        self.sent[rank] = digest.hexdigest()

    def read(self, number: int) -> None:
        digest, found = WeightDigest(), {}
        for bucket, buffer in self.readers[number].buckets(self.manifest):
            for name, weight in bucket.weights(buffer, self.manifest):
                digest.update(name, weight)
                found[name] = weight
        self.received[number], self.digests[number] = found, digest.hexdigest()

    def sync(self, *seeds: int) -> list[BaseException | None]:
        """Each rank lends the weights of its seed."""
        lending = [lambda rank=rank, seed=seed: self.lend(rank, weights_of(seed)) for rank, seed in enumerate(seeds)]
        return run_all(*lending, *(lambda number=n: self.read(number) for n in range(len(self.readers))))


def test_every_worker_reads_the_rank_that_shares_its_gpu() -> None:
    party = Party(("B", "A"))
    assert party.sync(1, 2) == [None] * 4  # ranks would have the same weights; here one sees who was read
    for number, seed in ((0, 2), (1, 1)):
        expected = weights_of(seed)
        assert list(party.received[number]) == list(expected)
        assert all(torch.equal(party.received[number][name], expected[name]) for name in expected)
    assert [party.digests[0], party.digests[1]] == [party.sent[1], party.sent[0]]


def test_two_handles_a_version_however_many_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_ipc, "_NODE_MEMORY", tmp_path)
    party = Party(("A", "A"))
    for version in range(3):
        assert party.sync(version, version) == [None] * 4
        assert party.digests == {0: party.sent[0], 1: party.sent[0]}
    assert [memory.num_opened for memory in party.memories] == [6, 6]
    assert list(tmp_path.iterdir()) == []  # nothing is left of what was lent


def test_a_worker_without_a_rank_beside_it_is_told_so() -> None:
    party = Party(("A", "C"), timeout_s=3)
    ends = party.sync(1, 1)
    assert isinstance(ends[3], WeightSyncError)
    assert str(ends[3]).startswith("this engine's worker is on C, but the learner's ranks are on A, B;")


def test_a_rank_that_fails_ends_the_others_in_time() -> None:
    party = Party(timeout_s=3)
    weights = weights_of(1)
    weights["w5"] = weights["w5"].view(1024, 100).reshape(-1)[:7]  # does not fit where it belongs
    ends = run_all(
        lambda: party.lend(0, weights),
        lambda: party.lend(1, weights_of(1)),
        lambda: party.read(0),
        lambda: party.read(1),
    )
    assert isinstance(ends[0], RuntimeError)  # its own
    assert all("lost a learner rank or an engine" in str(end) for end in ends[1:])


def test_no_room_for_a_bucket_is_one_sentence() -> None:
    with pytest.raises(WeightSyncError, match=r"/dev/shm has no room for a bucket of 1099511627776 MiB .*bucket_mib"):
        NodeMemory().allocate(1 << 60)
    assert not list(Path("/dev/shm").glob("weights-*"))


def test_a_handle_of_a_gpu_survives_its_text() -> None:
    # what torch's reduce_tensor says of a byte buffer of 1,000 bytes that begins at byte 512 of its storage
    rest = (b"\x00\xffhandle", 4096, 256, False, b"counter\x80", 3, b"event", True)
    parts = (torch.Tensor, torch.Size([1000]), (1,), 512, torch.TypedStorage, torch.uint8, 5, *rest)
    assert from_text(to_text(parts), device=2) == [
        torch.Tensor,
        (1000,),
        (1,),
        512,
        torch.TypedStorage,
        torch.uint8,
        2,
        *rest,
    ]
