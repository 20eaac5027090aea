"""The checkpoints of a run: written as one, verified before they are read, and removed by a rule.

    step-000060/  manifest.json  trainer.json  hf/  adapter/  learner/  teacher/
    .step-000080.partial/        being written, or left over by a killed run
    damaged-step-000070/         moved aside, never read again and never removed

Decides when there is room for one, which are kept, and which one a run goes on from. Must not know what learner and
teacher write. Files, digests and names are `trace_rl.workers.checkpoint_files`.

Invariants: whatever happens while a checkpoint is written, those before it stay as they are; where one removal leaves a
single checkpoint, that one was read back before; a run whose checkpoints are all damaged does not start anew by itself.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trace_rl.config.roles import Run
from trace_rl.errors import CheckpointError
from trace_rl.launch.run_folder import DAMAGED, FREE_PER_SIZE, RunFolder
from trace_rl.protocols import Drawn, Learner, StoredFile, Teacher
from trace_rl.workers.checkpoint_files import (
    DamagedCheckpointError,
    Manifest,
    clear_leftovers,
    published,
    read_manifest,
    seal,
    verify,
    write_manifest,
)

logger = logging.getLogger(__name__)

_STATE_FILE = "trainer.json"
_GIB = 2**30


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Training steps that are done."""
    position: Mapping[str, int]
    """Of the prompt source."""
    pending: Sequence[Drawn]
    """Prompts before the position that are not trained on."""


def kept(scores: Mapping[int, float | None], last: int, best: int) -> set[int]:
    """Steps whose checkpoints stay: the last ones, and those of the best scores, of equal ones the newer."""
    ranked = sorted(((score, step) for step, score in scores.items() if score is not None), reverse=True)
    return {*sorted(scores)[-last:], *(step for _, step in ranked[:best])}


@dataclass(frozen=True)
class RunCheckpoints:
    """Implements `trace_rl.protocols.Checkpoints`: learner, teacher copy and data position under one folder a step."""

    folder: RunFolder
    learner: Learner
    teacher: Teacher
    settings: Run
    expected_bytes: int
    """Of a checkpoint, before there is one to go by."""
    score_at: Callable[[int], float | None]
    """Held-out pass@1 after so many steps; None where it was not measured."""

    def exist(self) -> bool:
        """Whether the run has written any checkpoint, be it damaged."""
        return bool(self.folder.all_checkpoints() or self.folder.set_aside())

    def save(self, step: int, position: Mapping[str, int], pending: Sequence[Drawn]) -> None:
        """Write a checkpoint, and then remove those that are not to be kept.

        Raises:
            CheckpointError: there is not enough room, or it cannot be written; those before it are as they were.
        """
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        score = self.score_at(step)
        needed = self._make_room(step, score)
        try:
            with published(self.folder.checkpoint(step)) as partial:
                files = self._write(partial, step, position, pending)
                write_manifest(partial, Manifest(step, score, files))
        except (OSError, CheckpointError) as error:
            raise CheckpointError(
                f"the checkpoint after step {step} could not be written ({error}); {self._room(needed)}, and "
                f"{self._newest()}; see to that folder, then go on with run.resume=auto"
            ) from error
        surplus = self._surplus(self._scores())
        if surplus:
            self._remove(surplus)

    def load_newest(self) -> Progress:
        """Bring learner and teacher back to the newest checkpoint that is as it was written.

        Those that are not are moved aside with a warning.

        Raises:
            CheckpointError: all are damaged, or the newest belongs to another set-up.
        """
        for folder in reversed(self.folder.all_checkpoints()):
            try:
                manifest = verify(folder)
            except DamagedCheckpointError as error:
                aside = self._move_aside(folder)
                logger.warning(
                    "The checkpoint %s is damaged: %s; it is now %s and is not used", folder, error, aside.name
                )
                continue
            num_files, size = len(manifest.files), manifest.num_bytes / _GIB
            logger.info("%s is as it was written: %d files, %.3g GiB", folder, num_files, size)
            return self._load(folder)
        names = ", ".join(path.name for path in self.folder.set_aside())
        raise CheckpointError(
            f"every checkpoint of this run is damaged ({names} in {self.folder.checkpoints}); put an undamaged copy "
            "there as step-N, or remove these folders to start anew, or set run.resume=never to do so in another folder"
        )

    def _write(
        self, partial: Path, step: int, position: Mapping[str, int], pending: Sequence[Drawn]
    ) -> dict[str, StoredFile]:
        files = dict(self.learner.save(partial))
        files |= {f"teacher/{name}": file for name, file in self.teacher.save(partial / "teacher").items()}
        progress = {"step": step, "position": dict(position), "pending": [asdict(drawn) for drawn in pending]}
        state = partial / _STATE_FILE
        state.write_text(json.dumps(progress), encoding="utf-8")
        return files | seal(partial, [state])

    def _load(self, source: Path) -> Progress:
        try:
            state = json.loads((source / _STATE_FILE).read_text(encoding="utf-8"))
            position = {str(key): int(value) for key, value in state["position"].items()}
            progress = Progress(int(state["step"]), position, tuple(Drawn(**drawn) for drawn in state["pending"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{source / _STATE_FILE} is as it was written, but cannot be read ({type(error).__name__}: {error}); "
                "go on with the version of trace-rl that has written it"
            ) from error
        self.learner.load(source)
        self.teacher.load(source / "teacher")
        return progress

    def _make_room(self, step: int, score: float | None) -> float:
        """Bytes that a checkpoint needs; what is not kept beside it anyway goes before it where they are not free.

        Raises:
            CheckpointError: they are not free after that either.
        """
        clear_leftovers(self.folder.checkpoints)
        complete = self.folder.complete_checkpoints()
        size = read_manifest(complete[-1][1]).num_bytes if complete else self.expected_bytes
        needed = FREE_PER_SIZE * size
        surplus = self._surplus({**self._scores(), step: score})
        while surplus and self._free() < needed:
            if not self._remove(surplus[:1]):
                break
            surplus = surplus[1:]
        if self._free() < needed:
            raise CheckpointError(
                f"no room for the checkpoint after step {step}: {self._room(needed)}, and {self._newest()}; make room, "
                "or keep fewer (run.keep_checkpoints, run.keep_best), then go on with run.resume=auto"
            )
        return needed

    def _surplus(self, scores: Mapping[int, float | None]) -> list[int]:
        """Steps of checkpoints that do not stay, oldest first."""
        return sorted(scores.keys() - kept(scores, self.settings.keep_checkpoints, self.settings.keep_best))

    def _remove(self, steps: Sequence[int]) -> bool:
        """Remove checkpoints, if others stay: several, or one that is as it was written; tells whether."""
        others = [folder for step, folder in self.folder.complete_checkpoints() if step not in steps]
        if len(others) < 2:
            try:
                for only in others:
                    verify(only)
            except DamagedCheckpointError as error:
                logger.warning("No checkpoint is removed, because %s is damaged: %s", others[0], error)
                return False
        if not others:
            return False
        for step in steps:
            shutil.rmtree(self.folder.checkpoint(step))
        return True

    def _scores(self) -> dict[int, float | None]:
        return {step: read_manifest(folder).score for step, folder in self.folder.complete_checkpoints()}

    def _move_aside(self, folder: Path) -> Path:
        aside, number = folder.with_name(f"{DAMAGED}{folder.name}"), 1
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{DAMAGED}{folder.name}-{number}")
        return folder.rename(aside)

    def _free(self) -> int:
        return shutil.disk_usage(self.folder.checkpoints).free

    def _room(self, needed: float) -> str:
        free = self._free() / _GIB
        return f"{free:.3g} GiB are free in {self.folder.checkpoints}, and about {needed / _GIB:.3g} GiB are needed"

    def _newest(self) -> str:
        complete = self.folder.complete_checkpoints()
        return f"{complete[-1][1].name} is the newest one" if complete else "there is none before it"
