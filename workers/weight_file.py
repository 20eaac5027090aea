"""Weights by files, for engines that nothing but a shared folder reaches: safetensors buckets and a manifest.

Decides how a version lies in the folder and when it may be read: it is written to `version-N.partial`, which is renamed
when it is complete. It must not know who reads it, or when older versions are no longer needed.

Invariant: a folder without `.partial` in its name is complete; what is read has the digest that was written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trace_rl.errors import WeightSyncError
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_sender import announced
from trace_rl.workers.weight_wire import WeightManifest, plan_buckets

_MANIFEST = "manifest.json"
_PREFIX = "version-"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class StoredManifest(WeightManifest):
    """Weights that lie in files."""

    folder: str
    """That of the version."""


def write_version(
    root: Path, version: int, manifest: WeightManifest, weights: Iterable[tuple[str, Tensor]], bucket_bytes: int
) -> tuple[StoredManifest, str]:
    """Write full tensors in the manifest's order, one file a bucket.

    The iterable is always run to its end, so it may gather sharded weights collectively.

    Returns:
        Where they are, and the digest of names, shapes, dtypes and bytes that were written.

    Raises:
        WeightSyncError: the weights differ from the manifest, or the folder cannot be written.
    """
    checked = announced(manifest, weights)
    target = root.absolute() / f"{_PREFIX}{version}"
    try:
        digest = _write(target, manifest, checked, bucket_bytes)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(f"{target}{_PARTIAL}", ignore_errors=True)
        for _ in checked:  # the other ranks gather too
            pass
        raise WeightSyncError(
            f"the learner could not write the weights of version {version} ({manifest.nbytes / 2**20:.0f} MiB) to "
            f"{root} ({error}); look at its permissions and free space, or set sync.folder to another"
        ) from error
    return StoredManifest(manifest.names, manifest.shapes, manifest.dtypes, str(target)), digest


def _write(target: Path, manifest: WeightManifest, weights: Iterator[tuple[str, Tensor]], bucket_bytes: int) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{target}{_PARTIAL}")
    for leftover in (partial, target):  # of a sync that failed, or of a run that goes on from a checkpoint
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    digest = WeightDigest()
    buckets = plan_buckets(manifest, bucket_bytes)
    for number, bucket in enumerate(buckets):
        # copies, because a gathered weight is gone once the next is asked for
        held = {name: weight.to("cpu", copy=True).contiguous() for name, weight in islice(weights, len(bucket.slots))}
        for name, weight in held.items():
            digest.update(name, weight)
        save_file(held, partial / _file_name(number))
    for _ in weights:  # runs the iterable to its end
        pass
    stored = {
        "names": manifest.names,
        "shapes": manifest.shapes,
        "dtypes": manifest.dtypes,
        "num_files": len(buckets),
        "digest": digest.hexdigest(),
    }
    (partial / _MANIFEST).write_text(json.dumps(stored), encoding="utf-8")
    os.rename(partial, target)
    return digest.hexdigest()


def read_version(stored: StoredManifest, digest: WeightDigest) -> Iterator[list[tuple[str, Tensor]]]:
    """Every bucket of a version in order, each taken into the digest before.

    Raises:
        WeightSyncError: the folder is not there, cannot be read, or holds other weights than it says.
    """
    folder = Path(stored.folder)
    try:
        listed = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        names = iter(stored.names)
        for number in range(listed["num_files"]):
            held = load_file(folder / _file_name(number))
            weights = [(name, held[name]) for name in islice(names, len(held))]
            for name, weight in weights:
                digest.update(name, weight)
            yield weights
    except FileNotFoundError as error:
        raise WeightSyncError(
            f"found no {error.filename or folder}, though the learner has written it; sync.folder must be a folder "
            "that the learner's nodes and the engines' see under the same path"
        ) from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightSyncError(
            f"could not read the weights in {folder} ({type(error).__name__}: {error}); the files are broken or not "
            "readable, look at the permissions and the disk of sync.folder"
        ) from error
    if digest.hexdigest() != listed["digest"]:
        raise WeightSyncError(
            f"the weights in {folder} have digest {digest.hexdigest()}, but {listed['digest']} was written; the files "
            "have changed, look at the disk of sync.folder"
        )


def keep_only(root: Path, version: int) -> None:
    """Remove all versions but this one, which every engine has accepted."""
    for other in root.glob(f"{_PREFIX}*"):
        if other.name != f"{_PREFIX}{version}":
            shutil.rmtree(other, ignore_errors=True)


def _file_name(number: int) -> str:
    return f"weights-{number:05d}.safetensors"
