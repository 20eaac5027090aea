"""The last layer of a model that is only read, computed where its states are wanted.

Of tokens whose states nobody reads, the last layer needs keys and values alone: no query, no output of the attention
and no MLP. Decides which modules are spared these tokens, and for which models that holds: by comparing numbers when a
model is prepared, not by a list of architectures. Must not know what the states are for.

Invariant: the states that are read are those of a whole pass, but for rounding; what the others hold means nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from trace_rl.token_layout import TokenGrid
from trace_rl.workers.policy_model import TOLERANCE, states_gap

logger = logging.getLogger(__name__)

_SPARED = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Modules of a layer that work on each token by itself and give nothing to other tokens."""

Pass = Callable[[TokenGrid], Float[Tensor, "batch time hidden"]]


class LastLayer:
    """The last layer of one model, which from now on can be told what is read.

    Args:
        states: a pass of the model.
        probe: what it is tried with: several sequences of different length.
    """

    def __init__(self, policy: PreTrainedModel, states: Pass, probe: TokenGrid) -> None:
        self._rows: Tensor | None = None
        self._modules: list[nn.Module] = []
        layers = getattr(policy.get_decoder(), "layers", None)
        # a convolution before the queries gives them what neighbours hold
        if isinstance(layers, nn.ModuleList) and not any(isinstance(each, nn.Conv1d) for each in layers[-1].modules()):
            self._modules = [module for name in _SPARED if (module := _find(layers[-1], name)) is not None]
        whole = [module.forward for module in self._modules]
        for module in self._modules:
            module.forward = self._spared(module.forward)
        if reason := self._difference(states, probe):
            logger.info("The last layer of %s computes every token: it %s", type(policy).__name__, reason)
            for module, forward in zip(self._modules, whole, strict=True):
                module.forward = forward
            self._modules = []

    @property
    def num_parameters(self) -> int:
        """Those that only tokens which are read go through."""
        return sum(parameter.numel() for module in self._modules for parameter in module.parameters())

    @contextmanager
    def reading(self, rows: Int[Tensor, " row"]) -> Iterator[None]:
        """Inside of the block, passes compute the states of these tokens of the flattened (batch, time)."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def _spared(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(states: Float[Tensor, "batch time _"]) -> Float[Tensor, "batch time _"]:
            if self._rows is None:
                return whole(states)
            read = whole(states.flatten(0, 1)[self._rows].unsqueeze(0)).squeeze(0)
            out = read.new_zeros(states.shape[0] * states.shape[1], read.shape[1])
            return out.index_copy_(0, self._rows, read).unflatten(0, states.shape[:2])

        return forward

    @torch.no_grad()
    def _difference(self, states: Pass, probe: TokenGrid) -> str:
        """What is wrong with states where some are not read; nothing if they agree with those of a whole pass."""
        expected = states(probe).flatten(0, 1)
        rows = torch.arange(1, len(expected), 3, device=expected.device)
        try:
            with self.reading(rows):
                found = states(probe).flatten(0, 1)[rows]
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            return f"cannot be computed for some tokens alone ({error})"
        gap = states_gap(found, expected[rows])
        return "" if gap <= TOLERANCE[expected.dtype] else f"is off by {gap:.3g} of its states where some are left out"


def _find(layer: nn.Module, name: str) -> nn.Module | None:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None
