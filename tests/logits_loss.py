"""The loss of given logits: states that are logits already, under a head that is the identity."""

from dataclasses import replace

import torch
from torch import Tensor

from trace_rl.head_loss import DEFAULT_TILE_BYTES, LossParts, Projection, head_logprobs, head_loss
from trace_rl.objective import LossRows, Objective


def as_states(logits: Tensor) -> Projection:
    return Projection(logits, torch.eye(logits.shape[-1], dtype=logits.dtype))


def logits_loss(
    logits: Tensor,
    rows: LossRows,
    objective: Objective,
    teacher_logits: Tensor,
    old_logprobs: Tensor | None = None,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> tuple[LossParts, dict[str, Tensor]]:
    return head_loss(as_states(logits), rows, objective, as_states(teacher_logits), old_logprobs, tile_bytes)


def only(rows: LossRows, part: str) -> LossRows:
    """The rows with the weights of one part of the loss, `policy` or `routed`, alone."""
    other = {"policy": "route_weight", "routed": "pg_weight"}[part]
    return replace(rows, **{other: torch.zeros_like(getattr(rows, other))})


def target_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return head_logprobs(as_states(logits), targets, temperature)
