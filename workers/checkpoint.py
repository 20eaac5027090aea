"""What a learner checkpoint consists of, and which learner can go on from it.

    PATH/hf/                            the policy: transformers.from_pretrained and vLLM load it as it is
    PATH/adapter/                       adapters as peft writes them, where adapters are trained
    PATH/learner/layout.json            what was trained, by how many ranks, and how far the schedule is
    PATH/learner/state-RANK-N.safetensors   float32 weights, moments and step counts, as stretches of parameters
    PATH/learner/rng-RANK.json          states of the random number generators

Nothing is a pickle, so reading a checkpoint runs no code of whoever wrote it. Stretches are known by the name of their
parameter and their place in it, and every rank reads those that it needs: number of ranks, ZeRO stage, offloading and
sharing of sequences may change between save and load, and the state is the same to the bit. What the weights mean may
not change: shapes, precision and adapters. Must not know Ray, the training step, or how files are published.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trace_rl.errors import CheckpointError
from trace_rl.workers import learner_parts
from trace_rl.workers.checkpoint_state import read_state, write_state

if TYPE_CHECKING:
    import deepspeed

logger = logging.getLogger(__name__)

_LAYOUT = "layout.json"
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
    "*.py",
)
"""Files beside the weights that belong to a model; they are copied byte by byte."""


def write_policy(folder: Path, policy: PreTrainedModel, weights: Mapping[str, Tensor], source: str) -> list[Path]:
    """Write `hf/`: full weights by their Hugging Face names, and the companions of the model in `source`."""
    target = folder / "hf"
    # transformers refuses to save generation settings that it finds contradictory, as those of many published models
    # are; the learner does not generate, and the model's own file is copied below.
    policy.generation_config = GenerationConfig()
    policy.save_pretrained(target, state_dict=dict(weights))
    (target / "generation_config.json").unlink(missing_ok=True)
    origin = model_folder(source)
    for pattern in _COMPANIONS:
        for file in origin.glob(pattern):
            shutil.copyfile(file, target / file.name)
    return [file for file in target.rglob("*") if file.is_file()]


def model_folder(source: str) -> Path:
    """The folder of a model: `source` itself, or where the hub's companions of that name are cached."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=list(_COMPANIONS)))


def write_learner(folder: Path, engine: deepspeed.DeepSpeedEngine, rank: int, layout: Layout) -> list[Path]:
    """Write this rank's part of `learner/`; waits for no other rank."""
    target = folder / "learner"
    target.mkdir(parents=True, exist_ok=True)
    written = write_state(target, learner_parts.parts_of(engine), learner_parts.optimizer_of(engine), rank)
    states = target / f"rng-{rank}.json"
    states.write_text(json.dumps(rng_states()), encoding="utf-8")
    written.append(states)
    if rank == 0:
        file = target / _LAYOUT
        file.write_text(json.dumps(layout.as_json(engine), indent=1) + "\n", encoding="utf-8")
        written.append(file)
    return written


def read_learner(folder: Path, engine: deepspeed.DeepSpeedEngine, rank: int, layout: Layout) -> None:
    """Restore weights, optimizer, schedule and RNG states of this rank, whatever the ranks that wrote them; collective.

    The generators of a rank that there was not before stay as they are seeded.

    Raises:
        CheckpointError: there is no learner in `folder`, or it trained something else.
    """
    source = folder / "learner"
    schedule_steps = layout.check(folder, engine)
    learner_parts.release(engine)
    read_state(source, list(learner_parts.parts_of(engine)), learner_parts.optimizer_of(engine))
    learner_parts.refresh(engine)
    learner_parts.set_schedule(engine, schedule_steps)
    states = source / f"rng-{rank}.json"
    if states.is_file():
        restore_rng_states(json.loads(states.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Layout:
    """What a learner trains, and how it is spread."""

    meaning: Mapping[str, Any]
    """Settings without which the weights mean something else."""
    spread: Mapping[str, Any]
    """Settings that may change from save to load."""

    def as_json(self, engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
        """What is written to layout.json."""
        return {
            "meaning": dict(self.meaning),
            "spread": dict(self.spread),
            "schedule_steps": engine.lr_scheduler.last_epoch,
            "parameters": learner_parts.shapes_of(engine),
        }

    def check(self, folder: Path, engine: deepspeed.DeepSpeedEngine) -> int:
        """Refuse a checkpoint of another model or other adapters; returns the steps of its schedule.

        Raises:
            CheckpointError: names what differs.
        """
        file = folder / "learner" / _LAYOUT
        if not file.is_file():
            raise CheckpointError(
                f"{folder} holds no learner ({file.name} is missing); name a checkpoint that was written by a run, or "
                "start without resuming"
            )
        found = json.loads(file.read_text(encoding="utf-8"))
        anew = f"or start a new run from its weights with model.path={folder / 'hf'}"
        for name, expected in self.meaning.items():
            if found["meaning"].get(name) != expected:
                raise CheckpointError(
                    f"the checkpoint in {folder} was written with {name} = {found['meaning'].get(name)}, but this run "
                    f"has {expected}; resume with the former, {anew}"
                )
        before, now = found["parameters"], learner_parts.shapes_of(engine)
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                raise CheckpointError(
                    f"the checkpoint in {folder} has {name} of shape {before.get(name, 'none')}, but the model of this "
                    f"run has it of shape {now.get(name, 'none')}; resume with the model.path of that run, {anew}"
                )
        changed = {name: value for name, value in self.spread.items() if found["spread"].get(name) != value}
        if changed:
            was = {name: found["spread"].get(name) for name in changed}
            logger.warning("going on with %s from a checkpoint that was written with %s", changed, was)
        return int(found["schedule_steps"])


def rng_states() -> dict[str, Any]:
    """States of all random number generators of this process, as JSON holds them."""
    version, words, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    states = {
        "python": [version, list(words), gauss],
        "numpy": [np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }
    return states | ({"cuda": _hex(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def restore_rng_states(states: Mapping[str, Any]) -> None:
    """Inverse of `rng_states`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_unhex(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unhex(states["cuda"]))


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _unhex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
