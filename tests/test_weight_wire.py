"""What both sides agree on: buckets from the manifest alone, the digest of what travelled, and the transport chosen."""

import numpy as np
import pytest
import torch

from trace_rl.config.placement import Placement, Resources
from trace_rl.config.roles import Sync
from trace_rl.errors import ConfigError
from trace_rl.workers import weight_digest
from trace_rl.workers.weight_digest import WeightDigest, device_checksum
from trace_rl.workers.weight_sender import transfer_backend
from trace_rl.workers.weight_wire import (
    FRAME_BYTES,
    FRAMES_BYTES,
    ReusedMemory,
    WeightManifest,
    plan_buckets,
    plan_frames,
    receive_frames,
)


def test_buckets_are_aligned_bounded_and_in_order() -> None:
    # float32: 3 -> 12 bytes at 0, 4 -> 16 bytes at 16 (aligned), which makes 32; 5 -> 20 bytes do not fit in 48 - 32
    # and open a bucket; 100 -> 400 bytes are larger than a bucket and get one of their own.
    manifest = WeightManifest(("a", "b", "c", "d", "e"), ((3,), (2, 2), (5,), (100,), ()), ("float32",) * 5)
    buckets = plan_buckets(manifest, 48)
    assert [[(slot.index, slot.start, slot.end) for slot in bucket.slots] for bucket in buckets] == [
        [(0, 0, 12), (1, 16, 32)],
        [(2, 0, 20)],
        [(3, 0, 400)],
        [(4, 0, 4)],
    ]
    assert [bucket.nbytes for bucket in buckets] == [32, 20, 400, 4]
    assert manifest.nbytes == 4 * (3 + 4 + 5 + 100 + 1)
    assert plan_buckets(WeightManifest((), (), ()), 48) == []


def test_frames_are_buckets_unless_those_are_larger() -> None:
    quarter = FRAME_BYTES // 4 // 4  # float32 numbers in a quarter of a frame
    manifest = WeightManifest(tuple("abcdef"), ((quarter,),) * 6, ("float32",) * 6)
    assert [len(frame.slots) for frame in plan_frames(manifest, FRAME_BYTES // 2)] == [2, 2, 2]
    assert [len(frame.slots) for frame in plan_frames(manifest, 16 * FRAME_BYTES)] == [4, 2]


class Sent:
    """Stands in for a group: notes what was started and what was waited for."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def start_broadcast(self, buffer: torch.Tensor) -> int:
        self.log.append(("start", buffer.numel()))
        return buffer.numel()

    def finish(self, work: int) -> None:
        self.log.append(("finish", work))


def test_frames_travel_as_many_as_fit_or_two_of_those_that_are_larger() -> None:
    small, large = FRAMES_BYTES // 4, 2 * FRAMES_BYTES
    sizes = [small] * 5 + [large] * 3
    manifest = WeightManifest(tuple("abcdefgh"), tuple((size,) for size in sizes), ("uint8",) * 8)
    group, memory, digest = Sent(), ReusedMemory(), WeightDigest()
    names = [name for frame in receive_frames(group, manifest, 1 << 40, memory, digest) for name, _ in frame]
    assert names == list("abcdefgh")
    assert [size for what, size in group.log if what == "finish"] == sizes  # the oldest first
    kinds = "".join({"start": "s", "finish": "f"}[what] for what, _ in group.log)
    # four small ones fill the way, the fifth takes the place of the first; a large one starts when one is left
    assert kinds == "ssss" + "fs" + "fff" + "s" + "fsfsff"


def test_a_small_frame_keeps_no_large_one_waiting() -> None:
    sizes = [2 * FRAMES_BYTES, 100] * 3
    manifest = WeightManifest(tuple("abcdef"), tuple((size,) for size in sizes), ("uint8",) * 6)
    group = Sent()
    assert len(list(receive_frames(group, manifest, 1 << 40, ReusedMemory(), WeightDigest()))) == 6
    at_once, most = 0, 0
    for what, size in group.log:
        at_once += (1 if what == "start" else -1) * (size > 100)
        most = max(most, at_once)
    kinds = "".join({"start": "s", "finish": "f"}[what] for what, _ in group.log)
    # L s L travel; the first L leaves room for s and L, and the second, behind the first s, for the last s
    assert most == 2 and kinds == "sss" + "f" + "ss" + "ff" + "s" + "fff"


def test_memory_is_used_again_only_when_nothing_looks_at_it() -> None:
    memory = ReusedMemory()
    first, second = memory.take(100), memory.take(60)
    assert first.shape == (100,) and second.shape == (60,) and memory.nbytes == 160
    place, view = first.data_ptr(), first[8:16].view(torch.float32)
    del first
    third = memory.take(10)  # the view still looks at the first, and the second is lent
    assert memory.nbytes == 170 and third.data_ptr() not in (place, second.data_ptr())
    view.fill_(1.5)
    del view
    assert memory.take(80).data_ptr() == place
    del second, third
    held = [memory.take(5), memory.take(50), memory.take(100)]  # each the smallest that is large enough
    assert memory.nbytes == 170 and held[2].data_ptr() == place


def checksum(tensor: torch.Tensor) -> int:
    return int(device_checksum(tensor)) % (1 << 64)


def test_checksum_by_hand() -> None:
    # words below 2**32 are mixed with zeros: sum w[i] * (2 i + 1) = 5 * 1 + 7 * 3 + 9 * 5 = 71
    assert checksum(torch.tensor([5, 7, 9])) == 71
    # 3 * 2**32 mixed with its upper half is 3 * 2**32 + 3
    assert checksum(torch.tensor([3 << 32])) == (3 << 32) + 3
    # 12 bytes are two words, the second filled up with zeros: (1 + 2 * 2**32) ^ 2 and 3, that is 3 + 2**33 + 3 * 3
    assert checksum(torch.tensor([1, 2, 3], dtype=torch.int32)) == 3 + (1 << 33) + 9


def test_checksum_is_the_same_in_slices_and_off_the_boundary_of_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    whole = checksum(weights)
    monkeypatch.setattr(weight_digest, "_SLICE", 64)
    assert checksum(weights) == whole
    assert checksum(torch.cat([torch.zeros(1), weights])[1:]) == whole


def test_checksum_sees_every_bit_two_signs_and_an_exchange() -> None:
    weights = torch.randn(300, generator=torch.Generator().manual_seed(0))
    whole = checksum(weights)
    words = weights.numpy().view(np.uint64)
    for bit in range(64):
        words[77] ^= np.uint64(1 << bit)
        assert checksum(weights) != whole
        words[77] ^= np.uint64(1 << bit)
    for first, second in ((0, 299), (1, 3), (0, 2)):  # 1 and 3 are the highest bits of two words
        weights[[first, second]] *= -1
        assert checksum(weights) != whole
        weights[[first, second]] *= -1
    assert checksum(weights) == whole
    words[[3, 90]] = words[[90, 3]]
    assert checksum(weights) != whole


def test_digest_sees_names_order_dtype_and_every_byte() -> None:
    def digest(*weights: tuple[str, torch.Tensor]) -> str:
        running = WeightDigest()
        for name, weight in weights:
            running.update(name, weight)
        return running.hexdigest()

    one, two = torch.arange(6.0).view(2, 3), torch.ones(2, dtype=torch.bfloat16)
    reference = digest(("a", one), ("b", two))
    assert reference == digest(("a", one.clone()), ("b", two.clone()))
    assert reference == digest(("a", one.t().contiguous().t()), ("b", two))
    nudged = one.clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(9.0))
    others = [
        (("b", two), ("a", one)),
        (("x", one), ("b", two)),
        (("a", one.view(3, 2)), ("b", two)),
        (("a", one), ("b", two.to(torch.float16))),
        (("a", nudged), ("b", two)),
        (("a", one),),
    ]
    assert len({digest(*other) for other in others} | {reference}) == len(others) + 1


def test_backend_follows_placement_and_gpus_unless_it_is_set() -> None:
    gpu = Resources(num_gpus=1)
    apart, alone, shared = (
        Placement(generator=gpu, learner=gpu),
        Placement(generator=gpu),
        Placement(mode="colocated"),
    )
    assert transfer_backend(Sync(), Placement()) == "gloo"
    assert transfer_backend(Sync(), alone) == "gloo"
    assert transfer_backend(Sync(), apart) == "nccl"
    assert transfer_backend(Sync(), shared) == "ipc"
    assert transfer_backend(Sync(backend="gloo"), apart) == "gloo"
    assert transfer_backend(Sync(backend="gloo"), shared) == "gloo"
    assert transfer_backend(Sync(backend="file", folder="weights"), apart) == "file"


@pytest.mark.parametrize(
    ("backend", "placement", "message"),
    [
        ("ipc", Placement(), "placement.mode is disaggregated, so that engines and learner ranks share no GPU"),
        (
            "nccl",
            Placement(learner=Resources(num_gpus=1)),
            "generator.num_gpus is 0 and placement.learner.num_gpus is 1",
        ),
        ("nccl", Placement(mode="colocated"), "NCCL connects no two processes that share a GPU"),
    ],
)
def test_a_transport_that_cannot_work_is_refused(backend: str, placement: Placement, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        transfer_backend(Sync.model_validate({"backend": backend}), placement)
