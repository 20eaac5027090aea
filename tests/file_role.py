"""A learner and a teacher whose whole state is one number in one file, and the checkpoints of a run with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_rl.config.roles import Run
from trace_rl.launch.run_checkpoints import RunCheckpoints
from trace_rl.launch.run_folder import RunFolder
from trace_rl.protocols import StoredFile
from trace_rl.workers.checkpoint_files import seal


class FileRole:
    """Writes its number, and `num_bytes` of filling."""

    def __init__(self, num_bytes: int) -> None:
        self.value = 0
        self.num_bytes = num_bytes
        self.is_broken = False

    def save(self, path: Path) -> dict[str, StoredFile]:
        (path / "part").mkdir(parents=True, exist_ok=True)
        number, filling = path / "value", path / "part" / "filling"
        number.write_text(str(self.value))
        if self.is_broken:
            raise OSError("the disk is on fire")
        filling.write_bytes(bytes(self.num_bytes))
        return seal(path, [number, filling])

    def load(self, path: Path) -> None:
        self.value = int((path / "value").read_text())


def make_checkpoints(
    folder: Path,
    keep_checkpoints: int = 2,
    keep_best: int = 0,
    scores: Mapping[int, float] | None = None,
    num_bytes: int = 100,
    expected_bytes: int = 1,
) -> tuple[RunCheckpoints, FileRole, FileRole]:
    learner, teacher = FileRole(num_bytes), FileRole(num_bytes)
    run: Any = Run(keep_checkpoints=keep_checkpoints, keep_best=keep_best)
    made = RunCheckpoints(RunFolder(folder), learner, teacher, run, expected_bytes, (scores or {}).get)
    return made, learner, teacher


def steps_in(checkpoints: RunCheckpoints) -> list[int]:
    return [step for step, _ in checkpoints.folder.complete_checkpoints()]


def names_in(checkpoints: RunCheckpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.checkpoints.iterdir())
