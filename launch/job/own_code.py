"""Which files are trace-rl in this process, and one short name for their content.

On a cluster the question "which code ran?" has three possible answers: the copy in the image, the copy that was
submitted, or a mixture of both, because a namespace package (`trace_rl` has no `__init__.py`) is merged from every
folder of that name on the path. A run names its code by content, and refuses a mixture.

The digest does not depend on where the files lie or how they were installed.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import trace_rl
from trace_rl.errors import ConfigError

_FLOORS = ("workers", "launch", "configs")
_EDITABLE_HOOK = ".__path_hook__"  # how setuptools marks an editable install in a namespace package's path
_DIGEST_CHARACTERS = 12


def package_files() -> dict[str, Path]:
    """Name below `trace_rl` -> file, of the package as this process imports it.

    Raises:
        ConfigError: two copies of the package are merged.
    """
    check_one_copy(list(trace_rl.__path__))
    found = _files_below(Path(trace_rl.__path__[0]), "")
    for floor in _FLOORS:  # an editable install has them elsewhere
        found |= _files_below(Path(importlib.import_module(f"trace_rl.{floor}").__path__[0]), f"{floor}/")
    found.pop("__init__.py", None)  # a staged copy has one, see `trace_rl.launch.job.staging`
    return dict(sorted(found.items()))


def digest_of(files: Mapping[str, Path]) -> str:
    """Twelve hexadecimal digits of a SHA-256 over names and contents."""
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:_DIGEST_CHARACTERS]


def check_one_copy(entries: Sequence[str]) -> None:
    """Refuse a package that is merged from two folders: modules of an older copy would fill the gaps of a newer one.

    Args:
        entries: of `trace_rl.__path__`.

    Raises:
        ConfigError: naming both folders.
    """
    copies = [entry for entry in entries if not entry.endswith(_EDITABLE_HOOK)]
    is_whole = any((Path(copy) / _FLOORS[0]).is_dir() for copy in copies)
    if is_whole and len(copies) < len(entries):
        copies.append("an editable install")  # its own entry holds one floor only: this whole one is another copy
    if len(copies) > 1:
        raise ConfigError(
            f"trace_rl is merged from {len(copies)} places here ({', '.join(copies)}), so that an older copy may fill "
            "the gaps of a newer one; take one of them from the path, or submit with `trace-rl submit`, whose copy "
            "hides the others"
        )


def describe() -> str:
    """One line for logs: what runs, and from where."""
    files = package_files()
    return f"code {digest_of(files)} ({len(files)} files) from {trace_rl.__path__[0]}"


def _files_below(folder: Path, prefix: str) -> dict[str, Path]:
    """Every file that is neither hidden nor a cache; linked folders count as folders."""
    found = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_cache(name)]
        for name in names:
            if not _is_cache(name):
                path = Path(parent, name)
                found[f"{prefix}{path.relative_to(folder).as_posix()}"] = path
    return found


def _is_cache(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__" or name.endswith(".pyc")
