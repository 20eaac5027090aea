"""The loss of given logits: states that are logits already, under a head that is the identity.

And the same loss by autograd through all logits at once, for comparison.
"""

from dataclasses import replace

import torch
from torch import Tensor

from trace_rl.actions import RoutedRows
from trace_rl.head_loss import DEFAULT_TILE_BYTES, LossParts, Projection, head_logprobs, head_loss
from trace_rl.objective import LossRows, Objective, policy_loss


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


def autograd_loss(
    policy: Projection,
    rows: LossRows,
    objective: Objective,
    teacher: Projection,
    old_logprobs: Tensor | None = None,
) -> Tensor:
    """What `head_loss` computes, as one plain graph: no tiles, no kernels and no gradient written by hand."""
    logits = policy.hidden @ policy.head.T
    own = torch.log_softmax(logits / objective.sampling_temperature, -1)
    logprobs = own.gather(-1, rows.targets.unsqueeze(-1)).squeeze(-1)
    loss, _ = policy_loss(logprobs, old_logprobs, rows, objective)
    ratio = torch.ones_like(logprobs) if old_logprobs is None else (logprobs.detach() - old_logprobs).exp()
    for route in objective.routes:
        entries = rows.route_index == route.index
        token = rows.route_row[entries]
        reads_states = "states" in route.action.reads and len(token) > 0
        states = teacher.hidden[rows.teacher_row[entries]] @ teacher.head.T if reads_states else logits[:0].detach()
        routed = RoutedRows(logits[token], states, rows.targets[token], route.temperature, ratio[token])
        loss = loss + (route.action.terms(routed).loss * rows.route_weight[entries]).sum()
    return loss


def only(rows: LossRows, part: str) -> LossRows:
    """The rows with the weights of one part of the loss, `policy` or `routed`, alone."""
    other = {"policy": "route_weight", "routed": "pg_weight"}[part]
    return replace(rows, **{other: torch.zeros_like(getattr(rows, other))})


def target_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    return head_logprobs(as_states(logits), targets, temperature)
