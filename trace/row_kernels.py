"""Elementwise work on tiles of logits in torch, on any device: log-probs, and gradients with respect to logits.

Works through a tile in blocks of rows that fit a cache, so that what it needs beside the tile is small. Its counterpart
for CUDA is `trace_rl.triton_kernels`. Must not know hidden states, heads or how rows are chosen.

Invariants: each row is computed for itself; numbers are float32, or float64 where the logits are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trace_rl.actions import RoutedRows, RowAction

_BLOCK_ELEMENTS = 2**18
"""Logits per block: 1 MiB in float32."""


@dataclass(frozen=True)
class TokenRows:
    """What the softmax of each row says, at one temperature."""

    logprobs: Float[Tensor, " row"]
    """Of the target."""
    entropy: Float[Tensor, " row"]
    """In nats."""
    normaliser: Float[Tensor, " row"]
    """log sum exp(logits / temperature)."""


@dataclass(frozen=True)
class RouteEntries:
    """The rows of a tile that one route takes, and what it needs of them beside the policy's logits."""

    index: Int[Tensor, " entry"]
    """Which row of the tile."""
    teacher_logits: Float[Tensor, "entry vocab"]
    """Before any temperature; no rows where the action reads no teacher."""
    targets: Int[Tensor, " entry"]
    temperature: float
    ratio: Float[Tensor, " entry"]
    """See `trace_rl.actions.RoutedRows`."""
    weights: Float[Tensor, " entry"]

    def gathered(self, logits: Float[Tensor, "row vocab"], start: int, end: int) -> RoutedRows:
        """The entries [start, end) with a copy of their rows of the tile."""
        return RoutedRows(
            policy_logits=logits[self.index[start:end]],
            teacher_logits=self.teacher_logits[start:end],
            targets=self.targets[start:end],
            temperature=self.temperature,
            ratio=self.ratio[start:end],
        )


@dataclass(frozen=True)
class RouteRows:
    """What an action says of each of its rows; detached. See `trace_rl.actions.RowTerms`."""

    loss: Float[Tensor, " row"]
    unclipped: Float[Tensor, " row"]
    num_clipped_terms: Float[Tensor, " row"]
    clipped_teacher_mass: Float[Tensor, " row"]
    teacher_entropy: Float[Tensor, " row"]
    """At the route's temperature; no rows where the action reads no teacher."""
    teacher_advantage: Float[Tensor, " row"]
    """log q - log p of the target; no rows where the action reads no teacher."""


class RowKernels(Protocol):
    """Elementwise work on tiles of logits."""

    def token_rows(
        self, logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"], temperature: float
    ) -> TokenRows:
        """Log-probs of the targets, entropy and normaliser of every row."""

    def policy_gradient(
        self,
        logits: Float[Tensor, "row vocab"],
        targets: Int[Tensor, " row"],
        temperature: float,
        normaliser: Float[Tensor, " row"],
        slope: Float[Tensor, " row"],
        dtype: torch.dtype,
    ) -> Float[Tensor, "row vocab"]:
        """slope_t (onehot_t - softmax(logits_t / T)) / T in `dtype`; may overwrite `logits`.

        Args:
            slope: derivative of the loss with respect to the target's log-prob.
        """

    def route_gradient(
        self,
        action: RowAction,
        logits: Float[Tensor, "row vocab"],
        entries: RouteEntries,
        into: Float[Tensor, "entry vocab"],
    ) -> RouteRows:
        """Terms of an action at some rows of a tile, and their weighted gradient with respect to the policy's logits.

        Args:
            logits: of the policy, before any temperature; detached and only read.
            into: receives the gradient; may be the teacher's logits, which are lost then.
        """


class TorchKernels:
    """`RowKernels` in torch operations; actions are differentiated by autograd."""

    def token_rows(
        self, logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"], temperature: float
    ) -> TokenRows:
        found: list[tuple[Tensor, ...]] = []
        for start, end in blocks(logits):
            scaled = logits[start:end] if temperature == 1 else logits[start:end] / temperature
            logprobs = torch.log_softmax(scaled, -1)
            index = targets[start:end, None]
            own = logprobs.gather(-1, index)
            normaliser = scaled.gather(-1, index) - own
            entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
            found.append((own.squeeze(-1), entropy, normaliser.squeeze(-1)))
        if not found:
            return TokenRows(*(logits.new_zeros(0) for _ in range(3)))
        return TokenRows(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def policy_gradient(
        self,
        logits: Float[Tensor, "row vocab"],
        targets: Int[Tensor, " row"],
        temperature: float,
        normaliser: Float[Tensor, " row"],
        slope: Float[Tensor, " row"],
        dtype: torch.dtype,
    ) -> Float[Tensor, "row vocab"]:
        scaled_slope = (slope / temperature).unsqueeze(-1)
        for start, end in blocks(logits):
            block = logits[start:end]
            if temperature != 1:
                block.div_(temperature)
            block.sub_(normaliser[start:end, None]).exp_().mul_(-scaled_slope[start:end])
            block.scatter_add_(-1, targets[start:end, None], scaled_slope[start:end])
        return logits.to(dtype)

    def route_gradient(
        self,
        action: RowAction,
        logits: Float[Tensor, "row vocab"],
        entries: RouteEntries,
        into: Float[Tensor, "entry vocab"],
    ) -> RouteRows:
        found = []
        for start, end in blocks(into):
            rows = entries.gathered(logits, start, end)
            with torch.enable_grad():
                rows.policy_logits.requires_grad_()
                terms = action.terms(rows)
                weighted = (terms.loss * entries.weights[start:end]).sum()
                (gradient,) = torch.autograd.grad(weighted, rows.policy_logits)
            entropy, advantage = _teacher_rows(rows)
            into[start:end] = gradient
            found.append(
                (
                    terms.loss.detach(),
                    terms.unclipped.detach(),
                    terms.num_clipped_terms,
                    terms.clipped_teacher_mass.detach(),
                    entropy,
                    advantage,
                )
            )
        return RouteRows(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def blocks(tile: Float[Tensor, "row vocab"]) -> Iterator[tuple[int, int]]:
    """[start, end) of blocks of rows that fit a cache."""
    rows = max(1, _BLOCK_ELEMENTS // max(tile.shape[-1], 1))
    for start in range(0, len(tile), rows):
        yield start, min(start + rows, len(tile))


@torch.no_grad()
def _teacher_rows(rows: RoutedRows) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Entropy of the teacher, and its advantage over the policy in the log-prob of the target."""
    if not len(rows.teacher_logits):
        return rows.ratio[:0], rows.ratio[:0]
    teacher, index = rows.teacher_logprobs, rows.targets.unsqueeze(-1)
    advantage = teacher.gather(-1, index) - rows.policy_logprobs.detach().gather(-1, index)
    return -torch.linalg.vecdot(teacher.exp(), teacher), advantage.squeeze(-1)
