"""Prompts that several sequences begin with, computed once: their keys and values are cached and read by each sequence.

Samples of one group mostly have the same privileged prompt, so a teacher need not read it again for each of them.
Decides which requests are worth it and how the continuations are laid out. Must not know what is done with the states.

Invariant: the states are those of a forward pass over the whole sequences, but for the rounding of other kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from trace_rl.batch import TeacherRequest
from trace_rl.token_layout import Padded, TokenGrid
from trace_rl.workers.policy_model import final_hidden, is_flash

_LAYOUT = Padded()


def can_share(models: Sequence[PreTrainedModel]) -> bool:
    """Whether each layer of the models keeps plain keys and values, and their attention reads them behind padding.

    Flash attention computes sequences end to end in one row, where nothing is shared; windows and recurrent states
    keep something else.
    """
    return all(
        not is_flash(model) and all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        for model in models
    )


def shared(requests: Sequence[TeacherRequest]) -> list[int]:
    """Indices of requests whose prompt another one has as well; a prompt of one token has nothing to share."""
    count = Counter(request.teacher_prompt_token_ids for request in requests)
    return [
        index
        for index, request in enumerate(requests)
        if count[request.teacher_prompt_token_ids] > 1 and len(request.teacher_prompt_token_ids) > 1
    ]


@torch.no_grad()
def continued(
    models: Sequence[PreTrainedModel], requests: Sequence[TeacherRequest], max_tokens: int, device: torch.device
) -> Iterator[tuple[int, list[Float[Tensor, "time hidden"]]]]:
    """Index of each request, in some order, with its states by model: those that predict its tokens, the first first.

    Args:
        max_tokens: positions of a batch, those that are read from the cache included.
    """
    prompts = list(dict.fromkeys(request.teacher_prompt_token_ids for request in requests))
    for chosen in _LAYOUT.batches([len(prompt) - 1 for prompt in prompts], max_tokens):
        # the last token of a prompt, whose state predicts the first of the response, is left to the continuation
        prefixes = _LAYOUT.grid([prompts[number][:-1] for number in chosen]).to(device)
        caches = [DynamicCache(config=model.config) for model in models]
        for model, cache in zip(models, caches, strict=True):
            final_hidden(model, prefixes, cache)
        row = {prompts[number]: place for place, number in enumerate(chosen)}
        members = [index for index, request in enumerate(requests) if request.teacher_prompt_token_ids in row]
        lengths = [len(requests[index].token_ids) for index in members]
        width = prefixes.input_ids.shape[1]
        budget = max_tokens * max(lengths) // (width + max(lengths))
        for batch in _LAYOUT.batches(lengths, budget):
            indices = [members[number] for number in batch]
            rows = [row[requests[index].teacher_prompt_token_ids] for index in indices]
            grid = _continuation([requests[index] for index in indices], prefixes, rows)
            hidden = [
                final_hidden(model, grid, _selected(model, cache, rows))
                for model, cache in zip(models, caches, strict=True)
            ]
            for place, index in enumerate(indices):
                yield index, [states[place, : len(requests[index].token_ids)] for states in hidden]


def _continuation(requests: Sequence[TeacherRequest], prefixes: TokenGrid, rows: Sequence[int]) -> TokenGrid:
    """What stands behind the prefixes, with a mask that covers both."""
    grid = _LAYOUT.grid([request.teacher_prompt_token_ids[-1:] + request.token_ids[:-1] for request in requests])
    grid = grid.to(prefixes.input_ids.device)
    read = prefixes.attention_mask[list(rows)]
    return replace(
        grid,
        attention_mask=torch.cat([read, grid.attention_mask], dim=1),
        position_ids=read.sum(dim=1, keepdim=True) + grid.position_ids,
    )


def _selected(model: PreTrainedModel, cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """A copy of some rows, which a pass may write behind."""
    held = [(layer.keys[list(rows)], layer.values[list(rows)]) for layer in cache.layers]
    return DynamicCache(held, config=model.config)
