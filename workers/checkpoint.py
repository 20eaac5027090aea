"""What a learner checkpoint consists of, and when it counts as complete.

    PATH/hf/       the policy: transformers.from_pretrained and vLLM load it as it is (weights, config, tokenizer)
    PATH/learner/  optimizer, float32 weights, learning-rate schedule and RNG states, one file or more per rank

A checkpoint is written under another name and renamed when every rank is done, so a folder called PATH is complete.
With several nodes PATH must lie on a file system that all of them share. Must not know Ray or the training step.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trace_rl.errors import CheckpointError

if TYPE_CHECKING:
    import deepspeed

_TAG = "state"
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


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Give a folder to write to that takes the name `path` when the block ends without an error."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)


def write_policy(folder: Path, policy: PreTrainedModel, weights: Mapping[str, Tensor], source: str) -> None:
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


def model_folder(source: str) -> Path:
    """The folder of a model: `source` itself, or where the hub's companions of that name are cached."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=list(_COMPANIONS)))


def write_learner(folder: Path, engine: deepspeed.DeepSpeedEngine, rank: int, layout: Mapping[str, Any]) -> None:
    """Write this rank's part of `learner/`; collective."""
    target = folder / "learner"
    engine.save_checkpoint(str(target), tag=_TAG)
    torch.save(rng_states(), target / f"rng_rank_{rank}.pt")
    if rank == 0:
        (target / "layout.json").write_text(json.dumps(dict(layout), indent=2) + "\n", encoding="utf-8")


def check_layout(folder: Path, layout: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that this learner cannot continue exactly.

    Raises:
        CheckpointError: there is no complete checkpoint in `folder`, or it was written with another layout.
    """
    file = folder / "learner" / "layout.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds no complete learner checkpoint ({file.name} is missing); name a folder that was written "
            "by a run, or start without resuming"
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    for name, expected in layout.items():
        if found.get(name) != expected:
            raise CheckpointError(
                f"the checkpoint in {folder} was written with {name} = {found.get(name)}, but this run has {expected}; "
                f"resume with the former, or start a new run from its weights with model.path={folder / 'hf'}"
            )


def read_learner(folder: Path, engine: deepspeed.DeepSpeedEngine, rank: int) -> None:
    """Restore weights, optimizer, schedule and RNG states of this rank; collective.

    Raises:
        CheckpointError: a file is missing or does not fit the model.
    """
    source = folder / "learner"
    try:
        loaded, _ = engine.load_checkpoint(str(source), tag=_TAG)
        states = torch.load(source / f"rng_rank_{rank}.pt", weights_only=False)
    except (OSError, RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"the checkpoint in {folder} cannot be restored on learner rank {rank} ({error}); is it complete, and of "
            "this model?"
        ) from error
    if loaded is None:
        raise CheckpointError(f"the checkpoint in {folder} has no state for learner rank {rank}; is it complete?")
    restore_rng_states(states)


def rng_states() -> dict[str, Any]:
    """States of all random number generators of this process."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_rng_states(states: Mapping[str, Any]) -> None:
    """Inverse of `rng_states`."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
