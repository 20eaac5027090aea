"""Everything that a run folder can tell, read as it is found.

Decides how much of each file is read. Must not know what it means, and imports neither torch nor Ray, so that the
answer comes at once.

A folder may be torn, huge or somebody else's: a file may be missing, cut off, a pipe, or hold anything. Invariants:
only regular files are opened, no more of them is read than is said here, nothing is written, and whatever cannot be
read is said in `problems` instead of being raised.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trace_rl.errors import CheckpointError, DataError
from trace_rl.launch.folder_lock import Holder, State, look
from trace_rl.launch.ledger import LEDGER_FILE
from trace_rl.launch.run_folder import RunFolder, step_of
from trace_rl.launch.run_log import Entry, read_entries
from trace_rl.ledger import Ledger, read_records
from trace_rl.workers.checkpoint_files import MANIFEST, DamagedCheckpointError, compare_sizes, verify

_CONFIG_BYTES = 1 << 18
_METRICS_BYTES = 1 << 22
_LOG_BYTES = 1 << 20
_LEDGER_BYTES = 1 << 23  # 80 000 lines, which take a second and a half
_CHECKPOINT_BYTES = 1 << 31
_MANIFEST_BYTES = 1 << 26
_MOST_FILES = 1000
_MOST_LINES = 2000
_LARGEST = 2**53
_SHORTEST_RECORD = 40
"""Bytes of a line of the ledger: what has more lines than that allows is none, and would take long to find damaged."""

Soundness = Literal["verified", "complete", "damaged", "unreadable"]
"""`verified`: every byte was compared with the manifest; `complete`: names and sizes were."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint of the run, as it was found."""

    path: Path
    step: int
    soundness: Soundness
    detail: str
    """What is wrong; empty where nothing is."""
    num_bytes: int

    @property
    def is_usable(self) -> bool:
        return self.soundness in ("verified", "complete")


@dataclass(frozen=True)
class Evidence:
    """What a folder holds."""

    folder: RunFolder
    settings: Mapping[str, Any]
    """config.yaml as it stands there; see `setting`."""
    lock: State
    holder: Holder | None
    """Who holds the lock, or was the last to."""
    records: Sequence[Mapping[str, float]]
    """The last of metrics.jsonl, in order."""
    entries: Sequence[Entry]
    """The last of run.log, in order."""
    ledger: Ledger
    is_ledger_whole: bool
    """Whether all of it was read."""
    checkpoints: Sequence[StoredCheckpoint]
    """Newest first."""
    set_aside: Sequence[str]
    """Names of damaged checkpoints that the run has moved aside."""
    dumps: Sequence[Path]
    """Batches of steps that failed, newest last."""
    has_summary: bool
    free_bytes: int
    last_sign_s: float
    """When a file of the driver was last written, since 1970; 0 where there is none."""
    problems: Sequence[str]

    def setting(self, dotted: str, kind: type) -> Any:
        """A setting of the run; None where config.yaml has none of this type."""
        found: Any = self.settings
        for name in dotted.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if type(found) in (int, float):
            if not -_LARGEST < found < _LARGEST:
                return None
            found = float(found) if kind is float else found
        return found if type(found) is kind else None


def gather(path: Path, is_full: bool) -> Evidence:
    """Read a run folder.

    Args:
        is_full: read every byte of the newest checkpoint and of the ledger, however long that takes.

    Raises:
        DataError: it is no run folder.
    """
    folder, reader = RunFolder(path), _Reader()
    if not path.is_dir():
        raise DataError(f"{path} is no folder; give the folder of a run, for example runs/demo")
    if not os.access(path, os.R_OK | os.X_OK):
        raise DataError(f"{path} cannot be read by this user; ask as the user who trains")
    if not any(os.path.lexists(file) for file in (folder.config, folder.metrics, folder.log)):
        raise DataError(
            f"{path} holds no config.yaml, metrics.jsonl or run.log, so it is no run folder; give one that "
            "`trace-rl train` has written, for example runs/demo"
        )
    lock, holder = look(folder.lock)
    ledger_file = path / LEDGER_FILE
    content = reader.tail(ledger_file, None if is_full else _LEDGER_BYTES)
    is_whole = is_full or _size(ledger_file) <= _LEDGER_BYTES
    if not is_whole:
        content = content[content.find(b"\n") + 1 :]
    if content.count(b"\n") * _SHORTEST_RECORD > len(content):
        reader.problems.append(f"{ledger_file.name} is no ledger, and was not read")
        content = b""
    files = _by_age(path / "dumps")
    return Evidence(
        folder=folder,
        settings=_settings(reader.tail(folder.config, _CONFIG_BYTES), reader.problems),
        lock=lock,
        holder=holder,
        records=_records(reader.tail(folder.metrics, _METRICS_BYTES)),
        entries=read_entries(reader.tail(folder.log, _LOG_BYTES).decode("utf-8", "replace")),
        ledger=read_records(content),
        is_ledger_whole=is_whole,
        checkpoints=_checkpoints(folder, is_full, lock == "held"),
        set_aside=[found.name for found in folder.set_aside()[:_MOST_FILES]],
        dumps=files,
        has_summary=folder.summary.is_file(),
        free_bytes=shutil.disk_usage(path).free,
        last_sign_s=max(map(_written_s, (folder.metrics, folder.log, ledger_file, folder.lock))),
        problems=reader.problems,
    )


class _Reader:
    """Reads ends of files, and remembers what it could not read."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def tail(self, file: Path, most: int | None) -> bytes:
        """The last `most` bytes of a regular file; nothing where there is none."""
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody writes to would wait for ever
        except FileNotFoundError:
            return b""
        except OSError as error:
            self.problems.append(f"{file.name} cannot be read: {error.strerror}")
            return b""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            self.problems.append(f"{file.name} is no regular file, and was not read")
            return b""
        with open(descriptor, "rb") as opened:
            if most is None:
                return opened.read()
            opened.seek(max(0, status.st_size - most))
            return opened.read(most)


class _Loader(yaml.SafeLoader):
    """Without merge keys, which no run writes, and by which a short file can become an endless one."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        return None


def _settings(content: bytes, problems: list[str]) -> Mapping[str, Any]:
    try:
        tree = yaml.load(content.decode("utf-8", "replace"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        problems.append("config.yaml is missing, cut off or no configuration")
        return {}
    return tree


def _records(content: bytes) -> list[Mapping[str, float]]:
    """Lines that are whole and hold a step and numbers only."""
    records: list[Mapping[str, float]] = []
    for line in content.split(b"\n")[-_MOST_LINES - 1 : -1]:
        try:
            record = {str(name): float(value) for name, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):  # it is cut off, or no record
            continue
        if 0 <= record.get("step", -1) < _LARGEST:
            records.append(record)
    return records


def _checkpoints(folder: RunFolder, is_full: bool, is_written: bool) -> list[StoredCheckpoint]:
    """Every checkpoint; bytes are compared down to the newest that is as it was written.

    Args:
        is_written: a driver may be about to remove one, and has better things to do than to share its disk.
    """
    found: list[StoredCheckpoint] = []
    for path in reversed(folder.all_checkpoints()):
        has_sound_one = any(each.is_usable for each in found)
        found.append(_checkpoint(path, is_full, reads_bytes=not is_written and not has_sound_one))
    return found


def _checkpoint(path: Path, is_full: bool, reads_bytes: bool) -> StoredCheckpoint:
    step = step_of(path)
    try:
        if _size(path / MANIFEST) > _MANIFEST_BYTES:
            raise DamagedCheckpointError(f"{MANIFEST} has {_size(path / MANIFEST)} bytes, so it is none")
        num_bytes = compare_sizes(path).num_bytes
        if not reads_bytes or (num_bytes > _CHECKPOINT_BYTES and not is_full):
            return StoredCheckpoint(path, step, "complete", "", num_bytes)
        verify(path)
        return StoredCheckpoint(path, step, "verified", "", num_bytes)
    except DamagedCheckpointError as error:
        return StoredCheckpoint(path, step, "damaged", str(error), 0)
    except (CheckpointError, OSError, RecursionError) as error:
        return StoredCheckpoint(path, step, "unreadable", str(error), 0)


def _by_age(folder: Path) -> list[Path]:
    files = [file for file in folder.glob("*") if file.is_file()]
    return sorted(files, key=_written_s)[-_MOST_FILES:]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _written_s(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
