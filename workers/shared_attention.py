"""Attention over a row in which responses lie behind one copy of the prompt that they share.

Registers with transformers an attention that computes the stretches of a row block by block with torch's own, so that
every model whose attention is looked up there can read such rows, to train or to score. Decides which models may. Must
not know how rows are laid out (`trace_rl.token_layout.SharedPrompts`) or what is learnt from them.

Invariant: the states are those of a pass over each sequence by itself, but for the rounding of other kernels; it is
checked by numbers when a model is prepared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trace_rl.errors import ModelError
from trace_rl.token_layout import Layout, Packed, Padded, SharedPrompts, SharedReads
from trace_rl.workers.policy_model import final_hidden, is_flash

NAME = "trace_shared_prompts"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_PROMPT, _RESPONSES = (1, 2, 3), ((4, 5), (6,), (7, 8, 9))


def layout_for_reading(models: Sequence[PreTrainedModel]) -> Layout:
    """How sequences are laid out for models of one kind that are only read: with shared prompts where that can be.

    Flash attention gets them end to end, each with its own prompt.
    """
    if is_flash(models[0]):
        return Packed()
    can_share = models[0].config._attn_implementation == "sdpa" and not any(map(prepare, models))
    return SharedPrompts() if can_share else Padded()


@torch.no_grad()
def prepare(policy: PreTrainedModel) -> str:
    """Make a model read rows with shared prompts, and no others from now on.

    Returns:
        Nothing, or why it cannot: then it is left as it was.
    """
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=policy.config).layers):
        return "has layers with a window or a recurrent state, which do not see a prompt that lies elsewhere"
    sequences = [_PROMPT + response for response in _RESPONSES]
    was_training, attention = policy.training, policy.config._attn_implementation
    policy.eval()
    alone = [final_hidden(policy, Padded().grid([ids]).to(policy.device))[0] for ids in sequences]
    policy.set_attn_implementation(NAME)
    grid = SharedPrompts().grid(sequences, [len(_PROMPT)] * len(sequences)).to(policy.device)
    row = final_hidden(policy, grid)[0]
    policy.train(was_training)
    begin = len(_PROMPT) - 1
    for start, ids, expected in zip(grid.starts, sequences, alone, strict=True):
        gap = (row[start + begin : start + len(ids)] - expected[begin:]).abs().max().item()
        if not gap <= _TOLERANCE[expected.dtype] * max(1.0, expected.abs().max().item()):
            policy.set_attn_implementation(attention)
            return (
                f"computes states that differ by {gap:.3g} where a prompt is shared: its attention is not looked up in "
                "transformers' AttentionInterface, or needs more than queries, keys and values"
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
        of_block = (
            each[index].transpose(1, 2)
            for each, index in ((queries, block.queries), (keys, block.keys), (values, block.keys))
        )
        lines, _ = sdpa_attention_forward(module, *of_block, block.mask, **kwargs)
        found.append(lines.flatten(0, 1))
    return torch.cat(found)[shared_reads.places].unsqueeze(0), None


AttentionInterface.register(NAME, attend)
