"""Full-vocabulary divergences between teacher q and policy p at one position, and how they are bounded.

All inputs are normalised log-probs in float32. The teacher's side must arrive detached; only p carries a gradient:
d FKL / d z_u = p_u - q_u, d RKL / d z_u = p_u (log(p_u / q_u) - RKL).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from trace_rl.batch import Action
from trace_rl.config.algorithm import KlClip


@dataclass(frozen=True)
class Divergence:
    """Per-position divergence in nats before and after the clip, and which vocabulary terms the clip silenced."""

    loss: Float[Tensor, " row"]
    unclipped: Float[Tensor, " row"]
    is_clipped: Bool[Tensor, "row vocab"]


def divergence_terms(
    action: Action, policy_logprobs: Float[Tensor, "row vocab"], teacher_logprobs: Float[Tensor, "row vocab"]
) -> Float[Tensor, "row vocab"]:
    """Summands over the vocabulary: q (log q - log p) for FKL, p (log p - log q) for RKL."""
    if action is Action.FKL:
        return F.kl_div(policy_logprobs, teacher_logprobs, reduction="none", log_target=True)
    if action is Action.RKL:
        return F.kl_div(teacher_logprobs, policy_logprobs, reduction="none", log_target=True)
    raise ValueError(f"action {action!r} has no divergence; expected FKL or RKL")


def divergence(
    action: Action,
    policy_logprobs: Float[Tensor, "row vocab"],
    teacher_logprobs: Float[Tensor, "row vocab"],
    clip: KlClip,
) -> Divergence:
    """Return the bounded divergence of every position.

    `vocab_clamp` computes sum_v min(term_v, threshold): a clipped term loses its gradient, so a token that the
    teacher supports and the policy under-allocates is pushed *down* by the softmax coupling (the hard clip of
    Zhao et al. 2026, arXiv:2601.18734). `token_rescale` multiplies the position by the constant
    min(1, threshold / divergence), which bounds it and keeps the direction of its gradient.
    """
    terms = divergence_terms(action, policy_logprobs, teacher_logprobs)
    unclipped = terms.sum(-1)
    if clip.mode == "vocab_clamp":
        bounded = terms.clamp(max=clip.threshold).sum(-1)
        return Divergence(bounded, unclipped.detach(), terms.detach() > clip.threshold)
    is_clipped = torch.zeros_like(terms, dtype=torch.bool)
    if clip.mode == "token_rescale":
        # a KL can come out a rounding error below 0: such a position is far inside the bound
        scale = (clip.threshold / unclipped.detach().clamp(min=clip.threshold)).clamp(max=1.0)
        return Divergence(unclipped * scale, unclipped.detach(), is_clipped | (scale < 1).unsqueeze(-1))
    return Divergence(unclipped, unclipped.detach(), is_clipped)
