"""What a teacher's work in proportion to spans saves: all of it, against rollouts with spans up to their last token.

A quarter of the rollouts has a span, which ends anywhere. The full pass runs every rollout through the layers and
projects every response token to the vocabulary; the other one runs what has spans, as far as they go, and projects
their tokens. Eight rollouts have one prompt. Both are read as the teacher's role does it, which computes a prompt once
where the attention allows, and the last layer for wanted tokens. FLOPs are those of `trace_rl.step_metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import gpu_models
import numpy as np
import roofs
import torch
from gpu_cases import Case, Context, Row
from gpu_roofs import matmul_roof
from transformers import PreTrainedModel

from trace_rl.batch import RolloutKey, TeacherRequest
from trace_rl.step_metrics import teacher_work
from trace_rl.workers.policy_model import head_weight, transformer_shape
from trace_rl.workers.state_reader import StateReader

GROUP = 8
"""Rollouts of a prompt."""
COVERAGE = 0.25
SPAN_TOKENS = 32
ROWS_PER_PRODUCT = 4096


def cases(context: Context) -> list[Case]:
    return [Case(name, partial(_passes, context, name)) for name in gpu_models.models_of(context)]


@torch.no_grad()
def _passes(context: Context, name: str) -> list[Row]:
    preset = gpu_models.preset_of(context, name)
    assert preset.config is not None
    policy = gpu_models.random_policy(preset.config, getattr(torch, preset.dtype), context.device, context.seed).eval()
    shape = transformer_shape(policy, len(head_weight(policy)))
    roof = matmul_roof(context, getattr(torch, preset.dtype))
    reader = StateReader([policy], preset.max_tokens)
    everything, of_spans = _requests(context, preset.prompt_tokens, preset.response_tokens, shape.vocab)
    rows: list[dict[str, float | str]] = []
    for scored, requests in (("all rollouts, all tokens", everything), ("a quarter, up to its span", of_spans)):
        tokens, flops = teacher_work(requests, reader.cost(shape.vocab))
        seconds = roofs.seconds_of(partial(_score, policy, reader, requests), context.device)
        row: dict[str, float | str] = {"scored": scored, "rollouts": len(requests)}
        row |= {"tokens": tokens, "rows": sum(len(each.positions) for each in requests)}
        rows.append(row | {"seconds": seconds, "flops": flops, "of_matmul_roof_frac": flops / seconds / roof})
    whole = rows[0]
    return [
        row | {f"of_all_{key}_frac": float(row[key]) / float(whole[key]) for key in ("flops", "seconds")}
        for row in rows
    ]


def _requests(
    context: Context, prompt_tokens: int, response_tokens: int, vocab: int
) -> tuple[list[TeacherRequest], list[TeacherRequest]]:
    """Of every rollout all tokens; and of a quarter of each group one span."""
    random = np.random.default_rng(context.seed)
    everything, of_spans = [], []
    prompt: tuple[int, ...] = ()
    for number in range(context.of_scale(32, 16, 8)):
        if number % GROUP == 0:
            prompt = tuple(random.integers(0, vocab, prompt_tokens).tolist())
        time = int(random.integers(response_tokens // 2, 3 * response_tokens // 2 + 1))
        tokens = tuple(random.integers(0, vocab, time).tolist())
        everything.append(_request(number, prompt, tokens, np.arange(time)))
        if number % GROUP < COVERAGE * GROUP:
            end = int(random.integers(1, time + 1))
            of_spans.append(_request(number, prompt, tokens[:end], np.arange(max(0, end - SPAN_TOKENS), end)))
    return everything, of_spans


def _request(number: int, prompt: tuple[int, ...], tokens: tuple[int, ...], positions: np.ndarray) -> TeacherRequest:
    key = RolloutKey(f"prompt {number // GROUP}", number % GROUP)
    return TeacherRequest(key, 0, prompt, tokens, positions, frozenset({"states"}))


def _score(policy: PreTrainedModel, reader: StateReader, requests: Sequence[TeacherRequest]) -> None:
    """States of the wanted rows, and their logits, which are thrown away."""
    for indices in reader.batches(requests):
        for (states,) in reader.read([requests[index] for index in indices]):
            for part in states.split(ROWS_PER_PRODUCT):
                _ = part @ head_weight(policy).T
