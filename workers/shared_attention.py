"""Attention over a row in which responses lie behind one copy of the prompt that they share.

Registers with transformers an attention that computes the stretches of a row block by block with torch's own, so that
every model whose attention is looked up there can read such rows, to train or to score. Decides which models may. Rows
are laid out by `trace_rl.token_layout.SharedPrompts`; must not know what is learnt from them.

Invariant: the states are those of a pass over each sequence by itself, but for the rounding of other kernels; it is
checked by numbers when a model is prepared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trace_rl.errors import ModelError
from trace_rl.token_layout import Layout, Packed, Padded, SharedPrompts, SharedReads
from trace_rl.workers.policy_model import TOLERANCE, final_hidden, is_flash, states_gap

logger = logging.getLogger(__name__)

NAME = "trace_shared_prompts"
_PROMPT = (1, 2, 3)
_SEQUENCES = tuple(_PROMPT + response for response in ((4, 5), (6,), (7, 8, 9)))


def layout_for_reading(models: Sequence[PreTrainedModel]) -> Layout:
    """How sequences are laid out for models of one kind that are only read: with shared prompts where that can be.

    Flash attention gets them end to end, each with its own prompt.
    """
    if is_flash(models[0]):
        return Packed()
    attention = str(models[0].config._attn_implementation)
    if attention != "sdpa":
        return Padded()
    for model in models:
        if reason := prepare(model):
            logger.info("Every sequence computes its own prompt: %s %s", type(model).__name__, reason)
            for each in models:
                each.set_attn_implementation(attention)
            return Padded()
    return SharedPrompts()


@torch.no_grad()
def prepare(policy: PreTrainedModel) -> str:
    """Make a model read rows with shared prompts, and no others from now on.

    Returns:
        Nothing, or why it cannot: then it is left as it was.
    """
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=policy.config).layers):
        return "has layers with a window or a recurrent state, which do not see a prompt that lies elsewhere"
    was_training, attention = policy.training, str(policy.config._attn_implementation)
    policy.eval()
    reason = "raised an error"
    try:
        alone = [final_hidden(policy, Padded().grid([ids]).to(policy.device))[0] for ids in _SEQUENCES]
        policy.set_attn_implementation(NAME)
        reason = _difference(policy, alone)
    except (TypeError, ModelError) as error:  # its layers take, or hand on, no arguments that they do not know
        reason = f"cannot be told which tokens see which ({error})"
    finally:
        policy.train(was_training)
        if reason:
            policy.set_attn_implementation(attention)
    return reason


def _difference(policy: PreTrainedModel, alone: Sequence[Float[Tensor, "time hidden"]]) -> str:
    """What is wrong with states of sequences behind one prompt, beside those of each alone; nothing if they agree."""
    grid = SharedPrompts().grid(_SEQUENCES, [len(_PROMPT)] * len(_SEQUENCES)).to(policy.device)
    row, begin = final_hidden(policy, grid)[0], len(_PROMPT) - 1
    for start, expected in zip(grid.starts, alone, strict=True):
        gap = states_gap(row[start + begin : start + len(expected)].float(), expected[begin:].float())
        if not gap <= TOLERANCE[expected.dtype]:
            return (
                f"computes states that are off by {gap:.3g} of themselves where a prompt is shared: its attention is "
                "not looked up in transformers' AttentionInterface, or needs more than queries, keys and values"
            )
    return ""


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads time size"],
    key: Float[Tensor, "1 kv_heads time size"],
    value: Float[Tensor, "1 kv_heads time size"],
    attention_mask: None,
    shared_reads: SharedReads | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 time heads size"], None]:
    """Attention of each token of a row over what it may see, as transformers calls it."""
    if shared_reads is None:
        raise ModelError("a model that was prepared for shared prompts was given rows of another layout")
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
    found = []
    for block in shared_reads.blocks:
        of_block = (_lines(queries, block.queries), _lines(keys, block.keys), _lines(values, block.keys))
        lines, _ = sdpa_attention_forward(module, *of_block, block.mask, **kwargs)
        found.append(lines.flatten(0, 1))
    return torch.cat(found)[shared_reads.places].unsqueeze(0), None


def _lines(
    row: Float[Tensor, "time heads size"], index: Int[Tensor, "line place"]
) -> Float[Tensor, "line heads place size"]:
    """Tokens of a row line by line. As an embedding, whose gradient is summed up in the same order every time."""
    return F.embedding(index, row.flatten(1)).unflatten(-1, row.shape[1:]).transpose(1, 2)


AttentionInterface.register(NAME, attend)
