"""Divergences between teacher q and policy p at one position: over which entries, and how they are bounded.

Inputs are normalised log-probs. The teacher's side is a constant; only p carries a gradient:
d FKL / d z_u = p_u - q_u, d RKL / d z_u = p_u (log(p_u / q_u) - RKL).

A support reduces both sides to the same short list of outcomes, and the result is a divergence between two
distributions over that list. It is never clamped at 0: a top-k sum that can be negative has lost its tail, and is no
KL.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from trace_rl.config.base import Kind, Section

_NEVER = -1e4
"""Log-prob of an outcome that is not there: exp gives 0, and products with it stay finite."""


@dataclass(frozen=True)
class Outcomes:
    """Log-probs of both sides over the outcomes of a support."""

    policy: Float[Tensor, "row outcome"]
    teacher: Float[Tensor, "row outcome"]


class Support(Kind):
    """Which outcomes a divergence is summed over."""

    @abstractmethod
    def reduce(self, policy: Float[Tensor, "row vocab"], teacher: Float[Tensor, "row vocab"]) -> Outcomes:
        """Both sides over the support's outcomes; which ones these are is decided without a gradient."""


class Full(Support):
    """The whole vocabulary."""

    type: Literal["full"] = "full"

    def reduce(self, policy: Float[Tensor, "row vocab"], teacher: Float[Tensor, "row vocab"]) -> Outcomes:
        return Outcomes(policy, teacher)


class TopK(Support):
    """The k likeliest tokens of one side or of both, and what becomes of the rest.

    Reference: student's top 100 with a tail bucket, SDPO, arXiv:2601.20802; teacher's top k renormalised, the code of
    OPSD, arXiv:2601.18734. For a forward KL choose `teacher` or `union`: tokens that the student under-allocates are
    not in its own top k. With `bucket` the result is a lower bound of the divergence over the whole vocabulary.
    """

    type: Literal["topk"] = "topk"
    k: int = Field(100, ge=1)
    """Number of tokens; at least the vocabulary's size means all of them."""
    by: Literal["student", "teacher", "union"] = "teacher"
    """Whose likeliest tokens."""
    tail: Literal["bucket", "renormalise"] = "bucket"
    """`bucket`: all other tokens are one outcome; `renormalise`: both sides are divided by their mass on the tokens."""

    def reduce(self, policy: Float[Tensor, "row vocab"], teacher: Float[Tensor, "row vocab"]) -> Outcomes:
        if self.k >= policy.shape[-1]:
            return Outcomes(policy, teacher)
        is_kept = torch.zeros_like(policy, dtype=torch.bool)
        ids, is_new = [], []
        for side, logprobs in (("student", policy), ("teacher", teacher)):
            if self.by in (side, "union"):
                chosen = logprobs.detach().topk(self.k, dim=-1).indices
                ids.append(chosen)
                is_new.append(~is_kept.gather(-1, chosen))  # a token that both sides chose counts once
                is_kept.scatter_(-1, chosen, True)
        places = torch.cat(ids, -1), torch.cat(is_new, -1)
        return Outcomes(*(self._with_tail(logprobs, *places, is_kept) for logprobs in (policy, teacher)))

    def _with_tail(
        self,
        logprobs: Float[Tensor, "row vocab"],
        ids: Int[Tensor, "row outcome"],
        is_new: Bool[Tensor, "row outcome"],
        is_kept: Bool[Tensor, "row vocab"],
    ) -> Tensor:
        kept = logprobs.gather(-1, ids).masked_fill(~is_new, _NEVER)
        if self.tail == "renormalise":
            return torch.log_softmax(kept, -1)
        # the tail is summed over its own tokens: 1 - sum of the others would cancel where they hold nearly all mass
        tail = logprobs.masked_fill(is_kept, _NEVER).logsumexp(-1, keepdim=True)
        return torch.cat([kept, tail], -1)


class Sampled(Support):
    """The sampled token alone; each divergence has its own estimator (`trace_rl.row_actions`)."""

    type: Literal["sampled"] = "sampled"

    def reduce(self, policy: Float[Tensor, "row vocab"], teacher: Float[Tensor, "row vocab"]) -> Outcomes:
        raise ValueError("the support sampled has no outcomes to sum over; use the estimator of the action")


class KlClip(Section):
    """How the divergence of one position is bounded (the pointwise clip of arXiv:2601.18734 and its alternatives)."""

    mode: Literal["none", "vocab_clamp", "token_clamp", "token_rescale"] = "token_rescale"
    """`vocab_clamp`: min(term, threshold) per vocabulary entry, whose clipped entries lose their gradient and can
    push the probability the wrong way; `token_clamp`: min(sum, threshold), no gradient above; `token_rescale`: the
    position's divergence scaled to at most the threshold, which keeps the direction; `none`: no bound."""
    threshold: float = Field(0.05, gt=0)
    """In nats: per vocabulary entry (`vocab_clamp`) or per position."""


@dataclass(frozen=True)
class Bounded:
    """Per-position divergence in nats before and after the clip, and what the clip touched."""

    loss: Float[Tensor, " row"]
    unclipped: Float[Tensor, " row"]
    """Detached."""
    is_clipped: Bool[Tensor, "row clip"]
    """By outcome, or one for all where a position is clipped as a whole."""


def forward_terms(policy: Float[Tensor, "row outcome"], teacher: Float[Tensor, "row outcome"]) -> Tensor:
    """q (log q - log p) per outcome; summed: KL(q || p)."""
    return F.kl_div(policy, teacher, reduction="none", log_target=True)


def reverse_terms(policy: Float[Tensor, "row outcome"], teacher: Float[Tensor, "row outcome"]) -> Tensor:
    """p (log p - log q) per outcome; summed: KL(p || q)."""
    return F.kl_div(teacher, policy, reduction="none", log_target=True)


def jensen_shannon_terms(
    policy: Float[Tensor, "row outcome"], teacher: Float[Tensor, "row outcome"], beta: float
) -> Tensor:
    """beta q log(q / m) + (1 - beta) p log(p / m) per outcome, m = beta q + (1 - beta) p, for 0 < beta < 1.

    Reference: generalised Jensen-Shannon divergence, GKD, arXiv:2306.13649, eq. 3. It goes to 0 at both ends; see
    `trace_rl.row_actions.Jsd` for what stands there.
    """
    weights = policy.new_tensor([beta, 1 - beta]).log()
    mixture = torch.logaddexp(teacher + weights[0], policy + weights[1])
    return beta * forward_terms(mixture, teacher) + (1 - beta) * forward_terms(mixture, policy)


def bound(terms: Float[Tensor, "row outcome"], clip: KlClip) -> Bounded:
    """Sum the terms of every position under the clip.

    `vocab_clamp` computes sum_v min(term_v, threshold): a clipped term loses its gradient, so a token that the teacher
    supports and the policy under-allocates is pushed *down* by the softmax coupling (the hard clip in the code of
    arXiv:2601.18734). `token_rescale` multiplies the position by the constant min(1, threshold / divergence), which
    bounds it and keeps the direction of its gradient.
    """
    unclipped = terms.sum(-1)
    value = unclipped.detach()
    if clip.mode == "vocab_clamp":
        return Bounded(terms.clamp(max=clip.threshold).sum(-1), value, terms.detach() > clip.threshold)
    is_above = (value > clip.threshold) & torch.tensor(clip.mode != "none", device=value.device)
    is_clipped = is_above.unsqueeze(-1)
    if clip.mode == "token_clamp":
        return Bounded(unclipped.clamp(max=clip.threshold), value, is_clipped)
    if clip.mode == "token_rescale":
        # a KL can come out a rounding error below 0: such a position is far inside the bound
        scale = (clip.threshold / value.clamp(min=clip.threshold)).clamp(max=1.0)
        return Bounded(unclipped * scale, value, is_clipped)
    return Bounded(unclipped, value, is_clipped)
