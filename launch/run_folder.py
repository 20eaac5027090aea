"""The folder of a run: where everything is, which one is taken, and which checkpoints are in it.

config.yaml  plan.txt  metrics.jsonl  ledger.jsonl  run.log  summary.md  driver.lock
rollouts/step-000010.jsonl  checkpoints/step-000060/  dumps/  logs/

The driver holds driver.lock (`trace_rl.launch.folder_lock`) for the time of a run. What only reads a folder must not
wait for torch, so the schema of configurations is imported by those alone who write one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trace_rl.protocols import is_evaluation
from trace_rl.workers.checkpoint_files import has_manifest

if TYPE_CHECKING:
    from trace_rl.config.run import RunConfig

logger = logging.getLogger(__name__)

_STEP = "step-"
DAMAGED = "damaged-"
"""Before the name of a checkpoint that was moved aside."""
FREE_PER_SIZE = 1.05
"""Free space that a checkpoint asks for, in sizes of the one before."""


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
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def lock(self) -> Path:
        return self.path / "driver.lock"

    @property
    def worker_logs(self) -> Path:
        return self.path / "logs"

    @property
    def summary(self) -> Path:
        return self.path / "summary.md"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after so many steps is."""
        return self.checkpoints / f"{_STEP}{step:06d}"

    def all_checkpoints(self) -> list[Path]:
        """Every checkpoint, oldest first, in whatever state."""
        named = self.checkpoints.glob(f"{_STEP}*")
        return sorted((path for path in named if path.name.removeprefix(_STEP).isdecimal()), key=step_of)

    def set_aside(self) -> list[Path]:
        """Checkpoints that were found damaged, by name."""
        return sorted(self.checkpoints.glob(f"{DAMAGED}*"))

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every checkpoint with a manifest that can be read, oldest first."""
        return [(step_of(folder), folder) for folder in self.all_checkpoints() if has_manifest(folder)]


def step_of(checkpoint: Path) -> int:
    """Training steps before a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix(_STEP))


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
    from trace_rl.overlays import dump_config

    text = dump_config(config)
    changed = changed_settings(folder, config)
    if changed:
        logger.warning("resuming with changed settings: %s", changed)
    folder.config.write_text(text, encoding="utf-8")


def changed_settings(folder: RunFolder, config: RunConfig) -> str:
    """What differs from the run in the folder, as `name = now (was before)`; empty where nothing does or no run is."""
    from trace_rl.overlays import dump_config

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


def trim_metrics(folder: RunFolder, step: int) -> None:
    """Drop lines of steps that will be run again after a resume at `step`; the whole file is kept beside it."""
    if not folder.metrics.exists():
        return
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _belongs_before(line, step)]
    if len(kept) < len(lines):
        shutil.copy(folder.metrics, folder.metrics.with_name(f"metrics.before-resume-{step:06d}.jsonl"))
        partial = folder.metrics.with_name(f".{folder.metrics.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(partial, folder.metrics)  # a full disk leaves the old one


def _belongs_before(line: str, step: int) -> bool:
    try:
        record: Mapping[str, float] = json.loads(line)
    except json.JSONDecodeError:  # the run was killed while it wrote this line
        return False
    # the evaluation after step k is done before the checkpoint of step k; the one at 0 is done again by a fresh start
    return record["step"] < step or (is_evaluation(record) and record["step"] == step > 0)
