"""Weights by files: what is written is read, a version appears when it is complete, and faults are sentences."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trace_rl.errors import WeightSyncError
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_file import StoredManifest, keep_only, read_version, write_version
from trace_rl.workers.weight_wire import WeightManifest

MIB = 1 << 20


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    large = {f"w{number}": torch.randn(150, 1024, generator=generator) for number in range(4)}
    return large | {"half": torch.randn(33, generator=generator).bfloat16(), "view": torch.arange(12.0).view(3, 4).t()}


def manifest_of(weights: dict[str, torch.Tensor]) -> WeightManifest:
    return WeightManifest.of((name, tuple(weight.shape), weight.dtype) for name, weight in weights.items())


def write(root: Path, version: int, seed: int = 0) -> tuple[StoredManifest, str]:
    weights = weights_of(seed)
    return write_version(root, version, manifest_of(weights), iter(weights.items()), MIB)


def read(stored: StoredManifest) -> tuple[dict[str, torch.Tensor], str]:
    digest = WeightDigest()
    found = {name: weight for bucket in read_version(stored, digest) for name, weight in bucket}
    return found, digest.hexdigest()


def test_what_is_written_is_read_in_order_bucket_by_bucket(tmp_path: Path) -> None:
    stored, digest = write(tmp_path / "new", 3)
    # 600 KiB each: one a bucket of 1 MiB, the small ones beside the last
    assert len(list((tmp_path / "new" / "version-3").glob("*.safetensors"))) == 4
    found, received = read(stored)
    expected = weights_of(0)
    assert received == digest
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_version_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    weights = weights_of(0)
    seen = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for item in weights.items():
            seen.append(sorted(path.name for path in tmp_path.iterdir()))
            yield item

    write_version(tmp_path, 1, manifest_of(weights), gathered(), MIB)
    assert seen == [["version-1.partial"]] * len(weights)
    assert [path.name for path in tmp_path.iterdir()] == ["version-1"]


def test_older_versions_go_when_they_are_no_longer_needed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "version-2.partial").mkdir()  # of a sync that failed
    (tmp_path / "mine").mkdir()
    write(tmp_path, 2, seed=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "version-1", "version-2"]
    keep_only(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "version-2"]


def test_weights_are_run_to_their_end_also_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    weights = weights_of(0)
    left = iter(weights.items())
    with pytest.raises(
        WeightSyncError, match=r"could not write the weights of version 1 \(2 MiB\) to .*file .*sync.fold"
    ):
        write_version(tmp_path / "file", 1, manifest_of(weights), left, MIB)
    assert next(left, None) is None


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, limits[1]))  # files end at 512 KiB, as if the disk were full
    try:
        with pytest.raises(WeightSyncError, match=r"could not write the weights of version 7.*free space"):
            write(tmp_path, 7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_an_engine_does_not_see_is_named(tmp_path: Path) -> None:
    stored, _ = write(tmp_path, 1)
    os.rename(tmp_path / "version-1", tmp_path / "elsewhere")
    with pytest.raises(WeightSyncError, match=r"found no .*version-1/manifest.json.*under the same path"):
        read(stored)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-100], "could not read the weights in .*version-1"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "have digest .* was written; the files have changed"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, damage: object, message: str) -> None:
    stored, _ = write(tmp_path, 1)
    file = tmp_path / "version-1" / "weights-00001.safetensors"
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(WeightSyncError, match=message):
        read(stored)
