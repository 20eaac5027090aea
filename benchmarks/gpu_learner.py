"""Optimizer steps on random models in the shapes of Qwen3: sequences of about 4,096 tokens, padded, packed, and
behind shared prompts.

Steps are those of a run (DeepSpeed) where it is installed, else `plain_learner`; with recomputation of activations in
the backward pass (`learner.gradient_checkpointing`), as a run has it unless told otherwise, and without. The gradient
of a few short sequences is compared with float64 first. MFU is work without padding and recomputation
(`trace_rl.flops`, three forward passes) over the largest matrix product measured on the spot, and over the maker's
figure.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import learner_step
import torch
from gpu_attention import let_pack
from gpu_cases import Case, Context, Row
from gpu_models import models_of, preset_of
from gpu_roofs import datasheet_flops, matmul_roof
from learner_step import Learner
from plain_learner import plain_runners

from trace_rl.workers import shared_attention

SHARES = (0.0, 0.25)
KINDS = {"recomputing activations": True, "keeping activations": False}


def cases(context: Context) -> list[Case]:
    return [
        Case(f"{model}, {kind}", partial(_steps, context, model, is_recomputing))
        for model in models_of(context)
        for kind, is_recomputing in KINDS.items()
    ]


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def _steps(context: Context, model: str, is_recomputing: bool) -> list[Row]:
    preset = replace(preset_of(context, model), gradient_checkpointing=is_recomputing)
    engine = learner_step.deepspeed_runners if has_deepspeed() else plain_runners
    os.environ.setdefault("DS_ACCELERATOR", context.device.type)  # DeepSpeed reads it at import
    with tempfile.TemporaryDirectory() as folder:
        path = learner_step.make_model(preset, Path(folder))
        learner = Learner(preset, path, engine, let_pack)
        short = replace(preset, num_prompts=1, prompt_tokens=min(64, preset.prompt_tokens))
        short = replace(short, response_tokens=min(128, preset.response_tokens))
        errors = learner_step.check(learner, short, path, context.seed)
    if context.is_gpu:
        torch.cuda.reset_peak_memory_stats()  # what is told belongs to the steps, not to the float64 model
    told, roof = datasheet_flops(context), matmul_roof(context, getattr(torch, preset.dtype))
    rows: list[Row] = []
    for found in learner_step.measure(learner, preset, context.of_scale(3, 2, 1), context.seed, SHARES):
        row: dict[str, float | str] = {"layout": found["layout"], "routed_frac": found["share"]}
        row |= {"seconds": found["seconds"], "tokens_per_s": found["tokens_per_s"]}
        row |= {"mfu_frac": found["flops_per_s"] / roof}
        row |= {"mfu_of_datasheet_frac": found["flops_per_s"] / told} if told else {}
        row |= {"padding_frac": found["padding_frac"], "gradient_error": errors[found["layout"]]}
        how = "DeepSpeed" if has_deepspeed() else "plain torch"
        attention = shared_attention.NAME if found["layout"] == "shared" else learner.attention
        rows.append(row | {"attention": attention, "steps_by": how})
    if "packed" not in learner.runners:
        rows.append({"layout": "packed", "attention": "none here tells sequences in one row apart without a mask"})
    return rows
