"""The random models and batches of the GPU check: the shapes of Qwen3, or tiny ones for a dry run.

Must not know what is done with them.
"""

from __future__ import annotations

from dataclasses import replace

import learner_step
import torch
from gpu_attention import let_pack
from gpu_cases import Context
from learner_step import Preset
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

TINY = {
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MODELS = {"Qwen3 0.6B": "gpu-0.6b", "Qwen3 1.7B": "gpu-1.7b"}
"""Presets of `learner_step` whose shapes are taken."""


def models_of(context: Context) -> list[str]:
    """From small to large."""
    return list(MODELS)[:1] if context.scale == "quick" else list(MODELS)


def preset_of(context: Context, model: str) -> Preset:
    """Sequences of 256 + 3,840 tokens on average in two groups of 8, so that they fill micro-batches of 16,384."""
    preset = replace(learner_step.PRESETS[MODELS[model]], num_prompts=2, response_tokens=3840)
    if context.scale == "quick":
        return replace(preset, num_prompts=1, response_tokens=1792)
    if context.scale == "dry":
        tiny = replace(preset, config=TINY, num_prompts=1, prompt_tokens=6, response_tokens=16, max_tokens=64)
        return replace(tiny, dtype="float32")
    return preset


def random_policy(config: dict[str, int], dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """A model that is made where it will run."""
    torch.manual_seed(seed)
    shape = Qwen3Config(**config, tie_word_embeddings=True, max_position_embeddings=40960)
    with device:
        policy = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    let_pack(policy)
    return policy
