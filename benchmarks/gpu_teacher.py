"""What a teacher's work in proportion to spans saves: all of it, against rollouts with spans up to their last token.

A quarter of the rollouts has a span, which ends anywhere. The full pass runs every rollout through the layers and
projects every response token to the vocabulary; the other one runs what has spans, as far as they go, and projects
their tokens. Layers, layouts and positions are those of the teacher's role. FLOPs are those of `trace_rl.flops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import gpu_models
import numpy as np
import roofs
import torch
from gpu_cases import Case, Context, Row
from gpu_roofs import matmul_roof
from transformers import PreTrainedModel

from trace_rl.token_layout import Packed, Padded, predicting_positions
from trace_rl.workers.policy_model import final_hidden, head_weight, is_flash, transformer_shape

COVERAGE = 0.25
SPAN_TOKENS = 32
ROWS_PER_PRODUCT = 4096


@dataclass(frozen=True)
class Wanted:
    """What is asked about one rollout."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    """Cut behind the last wanted position."""
    positions: np.ndarray

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


def cases(context: Context) -> list[Case]:
    return [Case(name, partial(_passes, context, name)) for name in gpu_models.models_of(context)]


@torch.no_grad()
def _passes(context: Context, name: str) -> list[Row]:
    preset = gpu_models.preset_of(context, name)
    assert preset.config is not None
    policy = gpu_models.random_policy(preset.config, getattr(torch, preset.dtype), context.device, context.seed).eval()
    shape = transformer_shape(policy, len(head_weight(policy)))
    roof = matmul_roof(context, getattr(torch, preset.dtype))
    everything, of_spans = _requests(context, preset.prompt_tokens, preset.response_tokens, shape.vocab)
    rows: list[dict[str, float | str]] = []
    for scored, requests in (("all rollouts, all tokens", everything), ("a quarter, up to its span", of_spans)):
        flops = sum(shape.forward_flops(each.length, len(each.positions)) for each in requests)
        seconds = roofs.seconds_of(partial(_score, policy, requests, preset.max_tokens), context.device)
        row: dict[str, float | str] = {"scored": scored, "rollouts": len(requests)}
        row |= {"tokens": sum(each.length for each in requests), "rows": sum(len(each.positions) for each in requests)}
        rows.append(row | {"seconds": seconds, "flops": flops, "of_matmul_roof_frac": flops / seconds / roof})
    whole = rows[0]
    return [
        row | {f"of_all_{key}_frac": float(row[key]) / float(whole[key]) for key in ("flops", "seconds")}
        for row in rows
    ]


def _requests(
    context: Context, prompt_tokens: int, response_tokens: int, vocab: int
) -> tuple[list[Wanted], list[Wanted]]:
    """Of every rollout all tokens; and of a quarter of them one span."""
    random = np.random.default_rng(context.seed)
    everything, of_spans = [], []
    count = context.of_scale(32, 16, 8)
    for number in range(count):
        prompt = tuple(random.integers(0, vocab, prompt_tokens).tolist())
        time = int(random.integers(response_tokens // 2, 3 * response_tokens // 2 + 1))
        tokens = tuple(random.integers(0, vocab, time).tolist())
        everything.append(Wanted(prompt, tokens, np.arange(time)))
        if number < COVERAGE * count:
            end = int(random.integers(1, time + 1))
            of_spans.append(Wanted(prompt, tokens[:end], np.arange(max(0, end - SPAN_TOKENS), end)))
    return everything, of_spans


def _score(policy: PreTrainedModel, requests: Sequence[Wanted], max_tokens: int) -> None:
    """States of the wanted rows, and their logits, which are thrown away."""
    layout = Packed() if is_flash(policy) else Padded()
    for indices in layout.batches([each.length for each in requests], max_tokens):
        batch = [requests[index] for index in indices]
        grid = layout.grid([each.prompt + each.tokens for each in batch])
        states = final_hidden(policy, grid.to(policy.device)).flatten(0, 1)
        wanted = [
            start + predicting_positions(len(each.prompt), each.positions)
            for start, each in zip(grid.starts, batch, strict=True)
        ]
        rows = states[torch.from_numpy(np.concatenate(wanted)).to(policy.device)]
        for part in rows.split(ROWS_PER_PRODUCT):
            _ = part @ head_weight(policy).T
