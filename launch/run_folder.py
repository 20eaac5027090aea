"""The folder of a run: where everything is, which one is taken, and the newest complete checkpoint in it.

config.yaml  plan.txt  metrics.jsonl  run.log  summary.md  rollouts/step-000010.jsonl
checkpoints/step-000060/  dumps/  logs/
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from trace_rl.config.run import RunConfig
from trace_rl.errors import CheckpointError
from trace_rl.overlays import dump_config
from trace_rl.protocols import Drawn, Learner, Teacher

logger = logging.getLogger(__name__)

_STATE_FILE = "trainer.json"


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def worker_logs(self) -> Path:
        return self.path / "logs"

    @property
    def summary(self) -> Path:
        return self.path / "summary.md"

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, oldest first; the state file is written last."""
        found = [folder for folder in self.checkpoints.glob("step-*") if (folder / _STATE_FILE).is_file()]
        return sorted((int(folder.name.removeprefix("step-")), folder) for folder in found)


def open_run_folder(config: RunConfig) -> RunFolder:
    """Take the configured folder, or the next free one beside it where it holds a run that is not to be resumed."""
    wanted = Path(config.run.folder.format(name=config.run.name)).expanduser().resolve()
    chosen, number = wanted, 1
    while config.run.resume == "never" and (chosen / "config.yaml").exists():
        number += 1
        chosen = wanted.with_name(f"{wanted.name}-{number}")
    if chosen != wanted:
        logger.warning(
            "%s holds a run already; writing to %s (run.resume=auto goes on with the old one)", wanted, chosen
        )
    folder = RunFolder(chosen)
    folder.path.mkdir(parents=True, exist_ok=True)
    return folder


def write_config(folder: RunFolder, config: RunConfig) -> None:
    """Write the resolved configuration; name what differs from the run that is resumed."""
    text = dump_config(config)
    changed = changed_settings(folder, config)
    if changed:
        logger.warning("resuming with changed settings: %s", changed)
    folder.config.write_text(text, encoding="utf-8")


def changed_settings(folder: RunFolder, config: RunConfig) -> str:
    """What differs from the run in the folder, as `name = now (was before)`; empty where nothing does or no run is."""
    if not folder.config.exists():
        return ""
    texts = folder.config.read_text(encoding="utf-8"), dump_config(config)
    before, now = (dotted_settings(yaml.safe_load(each)) for each in texts)
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    return "; ".join(f"{name} = {now.get(name)} (was {before.get(name)})" for name in changed)


def dotted_settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists and empty mappings are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    named = ((f"{prefix}.{key}" if prefix else str(key), value) for key, value in tree.items())
    return {key: value for name, below in named for key, value in dotted_settings(below, name).items()}


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Training steps that are done."""
    position: Mapping[str, int]
    """Of the prompt source."""
    pending: Sequence[Drawn]
    """Prompts before the position that are not trained on."""


@dataclass(frozen=True)
class RunCheckpoints:
    """Implements `trace_rl.protocols.Checkpoints`: learner, teacher copy and data position under one folder a step."""

    folder: RunFolder
    learner: Learner
    teacher: Teacher
    keep: int

    def save(self, step: int, position: Mapping[str, int], pending: Sequence[Drawn]) -> None:
        target = self.folder.checkpoints / f"step-{step:06d}"
        self.learner.save(target)
        self.teacher.save(target / "teacher")
        state = target / _STATE_FILE
        partial = state.with_suffix(".partial")
        progress = {"step": step, "position": dict(position), "pending": [asdict(drawn) for drawn in pending]}
        partial.write_text(json.dumps(progress), encoding="utf-8")
        partial.rename(state)  # the last act: a checkpoint without this file does not exist
        for _, old in self.folder.complete_checkpoints()[: -self.keep]:
            shutil.rmtree(old)

    def load_newest(self) -> Progress:
        """Bring learner and teacher back; return how far the run had come.

        Raises:
            CheckpointError: a file of the newest complete checkpoint is damaged or belongs to another set-up.
        """
        step, source = self.folder.complete_checkpoints()[-1]
        try:
            state = json.loads((source / _STATE_FILE).read_text(encoding="utf-8"))
            position = {str(key): int(value) for key, value in state["position"].items()}
            pending = tuple(Drawn(**drawn) for drawn in state["pending"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{source / _STATE_FILE} is damaged ({error}); remove {source} to go on from the checkpoint before"
            ) from error
        self.learner.load(source)
        self.teacher.load(source / "teacher")
        return Progress(step, position, pending)


def trim_metrics(folder: RunFolder, step: int) -> None:
    """Drop lines of steps that will be run again after a resume at `step`; the whole file is kept beside it."""
    if not folder.metrics.exists():
        return
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _belongs_before(line, step)]
    if len(kept) < len(lines):
        shutil.copy(folder.metrics, folder.metrics.with_name(f"metrics.before-resume-{step:06d}.jsonl"))
        folder.metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _belongs_before(line: str, step: int) -> bool:
    try:
        record: Mapping[str, float] = json.loads(line)
    except json.JSONDecodeError:  # the run was killed while it wrote this line
        return False
    # the evaluation after step k is done before the checkpoint of step k; the one at 0 is done again by a fresh start
    return record["step"] < step or (is_evaluation(record) and record["step"] == step > 0)


def is_evaluation(record: Mapping[str, float]) -> bool:
    """Whether a record of metrics.jsonl is that of an evaluation, and not of a training step."""
    return any(name.startswith("heldout/") for name in record)
