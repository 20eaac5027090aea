"""What is evaluated: a checkpoint folder, a hub name, or a step of a run, and how it wants to be asked.

Decides which folder is loaded, its name among the results, and what tells its weights from others. Must not know sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from trace_rl.config.evaluation import EvalConfig
from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, ModelError
from trace_rl.launch.model_files import resolve_model
from trace_rl.launch.run_folder import RunFolder
from trace_rl.overlays import load_config

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_SAMPLED_BYTES = 2**20
"""Of the beginning and the end of each weights file: an optimizer's step changes all of it."""
_MAX_LABEL = 150
"""Characters; the end of a name tells more than its beginning."""
NEWEST = -1
"""As a step: the newest complete checkpoint."""


@dataclass(frozen=True)
class Subject:
    """One set of weights to be evaluated."""

    label: str
    """Its name among the results, and of its folder."""
    model: Model
    """With a resolved path, and the chat template's arguments of the run that it comes from."""
    system_prompt: str
    fingerprint: str
    """Of the weights; the same for a copy of them elsewhere."""


def find_subjects(paths: Sequence[str], step: int, config: EvalConfig) -> list[Subject]:
    """The subjects behind what was given on the command line.

    Args:
        step: of run folders: after which training step; 0: the model that the run started from.

    Raises:
        ModelError: a folder is neither a checkpoint nor a run, or the run has no such step.
        ConfigError: two of them would have the same label.
    """
    subjects = [_subject(path, step, config) for path in paths]
    labels = [subject.label for subject in subjects]
    for label, path in zip(labels, paths, strict=True):
        if labels.count(label) > 1:
            raise ConfigError(
                f"several checkpoints would be called {label!r} among the results (one of them is {path}); evaluate "
                "them one by one, each with its own folder=FOLDER"
            )
    return subjects


def _subject(path: str, step: int, config: EvalConfig) -> Subject:
    folder = RunFolder(Path(path).expanduser().resolve())
    if folder.config.is_file():
        return _of_run(folder, step, config)
    if step != NEWEST:
        raise ModelError(f"{path} is not a run folder (it has no config.yaml), so it has no steps; leave --step out")
    if (folder.path / "hf" / "config.json").is_file():  # a checkpoint of a run, named by itself
        path = str(folder.path / "hf")
        label = f"{folder.path.parent.parent.name}-{folder.path.name}"
    else:
        label = path if not folder.path.is_dir() else folder.path.name
    found = resolve_model(Model(path=path, trust_remote_code=config.trust_remote_code), "the checkpoint")
    dtype = _dtype(found.path) if config.dtype == "auto" else config.dtype
    model = found.model_copy(update={"dtype": dtype, "chat_template_kwargs": config.chat_template_kwargs})
    return Subject(_safe(label), model, "", fingerprint(found.path))


def _of_run(folder: RunFolder, step: int, config: EvalConfig) -> Subject:
    run = load_config([folder.config])
    path, done = _checkpoint(folder, run, step)
    settings: Mapping[str, Any] = {
        "path": path,
        "dtype": run.model.dtype if config.dtype == "auto" else config.dtype,
        "trust_remote_code": run.model.trust_remote_code or config.trust_remote_code,
        "chat_template_kwargs": {**run.model.chat_template_kwargs, **config.chat_template_kwargs},
    }
    model = resolve_model(run.model.model_copy(update=dict(settings)))
    return Subject(f"{_safe(folder.path.name)}-step-{done:06d}", model, run.data.system_prompt, fingerprint(model.path))


def _checkpoint(folder: RunFolder, run: RunConfig, step: int) -> tuple[str, int]:
    """Where a step's weights lie, and which step that is."""
    if step == 0:
        return run.model.path, 0
    complete = dict(folder.complete_checkpoints())
    steps = ", ".join(map(str, complete)) or "none"
    if not complete or step not in (*complete, NEWEST):
        asked = "any complete checkpoint" if step == NEWEST else f"a complete checkpoint of step {step}"
        raise ModelError(
            f"the run {folder.path} has not got {asked} (complete steps: {steps}); give one of these with --step, or "
            "0 for the model that it started from"
        )
    done = max(complete) if step == NEWEST else step
    return str(complete[done] / "hf"), done


def _safe(label: str) -> str:
    return _UNSAFE.sub("--", label)[-_MAX_LABEL:].strip("-.") or "model"


def _dtype(path: str) -> Literal["float32", "bfloat16"]:
    """As config.json says; bfloat16 for other precisions and for hub names."""
    file = Path(path) / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return "float32" if "float32" in (settings.get("dtype"), settings.get("torch_dtype")) else "bfloat16"


def fingerprint(path: str) -> str:
    """Of a model: of the names, sizes, beginnings and ends of its weights files; its name for one of the hub."""
    files = sorted([*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")])
    if not files:
        return path
    digest = blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\x1f{size}\x1f".encode())
        with file.open("rb") as weights:
            digest.update(weights.read(_SAMPLED_BYTES))
            weights.seek(max(0, size - _SAMPLED_BYTES))
            digest.update(weights.read(_SAMPLED_BYTES))
    return digest.hexdigest()
