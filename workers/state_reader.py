"""The states of wanted tokens, from models that are read and never trained: what a teacher's work consists of.

Decides what is left out of it: sequences are laid out without padding or with prompts that lie there once, where the
models' attention allows (`trace_rl.workers.shared_attention`), and the last layer works on wanted tokens alone
(`trace_rl.workers.last_layer`). Must not know what the states are for, where weights come from, or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from trace_rl.batch import TeacherRequest
from trace_rl.flops import TeacherCost
from trace_rl.packing import Extent, batches_of
from trace_rl.token_layout import predicting_positions
from trace_rl.workers import shared_attention
from trace_rl.workers.last_layer import LastLayer
from trace_rl.workers.policy_model import final_hidden, transformer_shape

_PROBE, _PROBE_PROMPT = ((1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 8)), 3


class StateReader:
    """Reads models of one kind, all of which read every request.

    Args:
        models: on one device, in evaluation mode. They read what this lays out from now on, and nothing else.
        max_tokens: positions of a batch.
    """

    def __init__(self, models: Sequence[PreTrainedModel], max_tokens: int) -> None:
        self._models = models
        self._max_tokens = max_tokens
        self._layout = shared_attention.layout_for_reading(models)
        probe = self._layout.grid(_PROBE, [_PROBE_PROMPT] * len(_PROBE)).to(models[0].device)
        self._last_layers = [LastLayer(model, partial(final_hidden, model), probe) for model in models]

    def cost(self, vocab_size: int) -> TeacherCost:
        """Of a request, under heads of which so many rows are used."""
        shapes = [
            replace(transformer_shape(model, vocab_size), num_read_parameters=last_layer.num_parameters)
            for model, last_layer in zip(self._models, self._last_layers, strict=True)
        ]
        return TeacherCost(tuple(shapes), self._max_tokens if self._layout.shares_prompts else 0)

    def batches(self, requests: Sequence[TeacherRequest]) -> list[tuple[int, ...]]:
        """Indices of requests that share a forward pass."""
        extents = [Extent.of(request.teacher_prompt_token_ids, request.token_ids) for request in requests]
        return batches_of(extents, self._max_tokens, self._layout)

    @torch.no_grad()
    def read(self, batch: Sequence[TeacherRequest]) -> Iterator[list[Float[Tensor, "row hidden"]]]:
        """Of each request the final hidden states, behind the last norm, of its rows; one tensor a model."""
        prompts = [request.teacher_prompt_token_ids for request in batch]
        grid = self._layout.grid(
            [prompt + request.token_ids for prompt, request in zip(prompts, batch, strict=True)],
            list(map(len, prompts)),
        )
        wanted = [
            torch.from_numpy(start + predicting_positions(len(prompt), request.positions))
            for start, prompt, request in zip(grid.starts, prompts, batch, strict=True)
        ]
        device = self._models[0].device
        grid, rows = grid.to(device), torch.cat(wanted).to(device)
        states = []
        for model, last_layer in zip(self._models, self._last_layers, strict=True):
            with last_layer.reading(rows):
                states.append(final_hidden(model, grid).flatten(0, 1)[rows].split(list(map(len, wanted))))
        yield from map(list, zip(*states, strict=True))
