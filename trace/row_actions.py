"""Actions that add a term to the loss at each of a route's tokens: divergences to the teacher, and the log-likelihood.

Both sides are divided by the route's temperature T; there is no factor T^2. Must not know which tokens a route selects,
schedules or denominators.

Invariants: each row is computed for itself; a teacher that equals the policy gives 0; no gradient reaches the teacher.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from trace_rl.actions import RoutedRows, RowAction, RowTerms
from trace_rl.batch import TeacherOutput
from trace_rl.divergences import (
    Bounded,
    Full,
    KlClip,
    Outcomes,
    Sampled,
    Support,
    bound,
    forward_terms,
    jensen_shannon_terms,
    reverse_terms,
)


class Weighed(RowAction):
    """An action whose terms may be multiplied with the truncated ratio of the policy to the old one."""

    type: str
    importance_cap: float = Field(0.0, ge=0)
    """The term is multiplied with min(pi / pi_old, cap) of its token, which carries no gradient (cap 2 in SDPO,
    arXiv:2601.20802); 0: it is not. Matters with several optimizer steps a batch only."""

    def importance(self, ratio: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """What the term of a token is multiplied with, given pi / pi_old of the token."""
        return ratio.clamp(max=self.importance_cap) if self.importance_cap else torch.ones_like(ratio)


class _Divergence(Weighed):
    """A divergence between teacher and policy."""

    type: str
    reads: ClassVar[frozenset[TeacherOutput]] = frozenset({"states"})
    clip: KlClip = KlClip()
    """Bound of one position."""
    support: Support = Full()
    """Which entries of the vocabulary are compared."""

    @property
    def is_estimate(self) -> bool:
        return isinstance(self.support, Sampled)

    @abstractmethod
    def _terms(self, outcomes: Outcomes) -> Float[Tensor, "row outcome"]:
        """The summands over the outcomes."""

    def terms(self, rows: RoutedRows) -> RowTerms:
        policy, teacher = rows.policy_logprobs, rows.teacher_logprobs
        if isinstance(self.support, Sampled):
            policy, teacher = (each.gather(-1, rows.targets.unsqueeze(-1)) for each in (policy, teacher))
            bounded = self._sampled(policy.squeeze(-1), teacher.squeeze(-1))
        else:
            outcomes = self.support.reduce(policy, teacher)
            teacher = outcomes.teacher
            bounded = bound(self._terms(outcomes), self.clip)
        return RowTerms(
            loss=bounded.loss * self.importance(rows.ratio).to(bounded.loss.dtype),
            unclipped=bounded.unclipped,
            num_clipped_terms=bounded.is_clipped.sum(-1).to(bounded.unclipped.dtype),
            clipped_teacher_mass=_mass(teacher, bounded.is_clipped),
        )

    def _sampled(self, policy: Float[Tensor, " row"], teacher: Float[Tensor, " row"]) -> Bounded:
        """The estimator from the sampled token."""
        raise NotImplementedError

    def _estimate(self, value: Float[Tensor, " row"], gradient: Float[Tensor, " row"]) -> Bounded:
        """`value` as the number, and the gradient of `gradient`; clips of positions act on both."""
        bounded = bound(value.detach().unsqueeze(-1), self.clip)
        scale = torch.where(value == 0, torch.ones_like(value), bounded.loss / value.detach())
        if self.clip.mode in ("token_clamp", "vocab_clamp"):
            scale = (~bounded.is_clipped.any(-1)).to(value.dtype)
        loss = bounded.loss + scale * (gradient - gradient.detach())
        return Bounded(loss, bounded.unclipped, bounded.is_clipped)


class Fkl(_Divergence):
    """KL(q || p): pulls probability to whatever the teacher supports.

    With support `sampled`, for tokens sampled from the policy: r log r - (r - 1) with r = q / p, which is never
    negative and has KL(q || p) as its mean; its gradient is -(r - 1) grad log p, whose mean is that of the exact
    gradient p - q.
    """

    type: Literal["fkl"] = "fkl"

    def _terms(self, outcomes: Outcomes) -> Float[Tensor, "row outcome"]:
        return forward_terms(outcomes.policy, outcomes.teacher)

    def _sampled(self, policy: Float[Tensor, " row"], teacher: Float[Tensor, " row"]) -> Bounded:
        log_ratio = teacher - policy.detach()
        excess = torch.expm1(log_ratio)
        return self._estimate((excess + 1) * log_ratio - excess, -excess * policy)


class Rkl(_Divergence):
    """KL(p || q): takes probability from what the teacher does not support.

    With support `sampled`, for tokens sampled from the policy: log p - log q, with the score function's gradient
    (log p - log q) grad log p.
    """

    type: Literal["rkl"] = "rkl"

    def _terms(self, outcomes: Outcomes) -> Float[Tensor, "row outcome"]:
        return reverse_terms(outcomes.policy, outcomes.teacher)

    def _sampled(self, policy: Float[Tensor, " row"], teacher: Float[Tensor, " row"]) -> Bounded:
        log_ratio = policy.detach() - teacher
        return self._estimate(log_ratio, log_ratio * policy)


class Jsd(_Divergence):
    """beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (GKD, arXiv:2306.13649, eq. 3).

    That goes to 0 at both ends. There the two KLs stand instead, as in GKD and SDPO (arXiv:2601.20802): beta = 0 is
    KL(q || p) and beta = 1 is KL(p || q), so the scale jumps.
    """

    type: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, ge=0, le=1)
    """Weight of the teacher in the mixture."""

    @model_validator(mode="after")
    def _has_no_estimator(self) -> Jsd:
        if isinstance(self.support, Sampled):
            raise ValueError(
                "action jsd has no estimator from the sampled token; choose support full or topk, or action fkl or rkl"
            )
        return self

    def _terms(self, outcomes: Outcomes) -> Float[Tensor, "row outcome"]:
        if self.beta == 0:
            return forward_terms(outcomes.policy, outcomes.teacher)
        if self.beta == 1:
            return reverse_terms(outcomes.policy, outcomes.teacher)
        return jensen_shannon_terms(outcomes.policy, outcomes.teacher, self.beta)


class Nll(Weighed):
    """-log p of the token: supervised learning on the selected tokens, at the route's temperature."""

    type: Literal["nll"] = "nll"

    def terms(self, rows: RoutedRows) -> RowTerms:
        value = -rows.policy_logprobs.gather(-1, rows.targets.unsqueeze(-1)).squeeze(-1)
        return RowTerms(
            loss=value * self.importance(rows.ratio).to(value.dtype),
            unclipped=value.detach(),
            num_clipped_terms=torch.zeros_like(value.detach()),
            clipped_teacher_mass=torch.zeros_like(value.detach()),
        )


def _mass(teacher: Float[Tensor, "row outcome"], is_clipped: Bool[Tensor, "row clip"]) -> Float[Tensor, " row"]:
    """Teacher probability of clipped outcomes; all of it where a position is clipped as a whole."""
    if is_clipped.shape == teacher.shape:
        return (teacher.exp() * is_clipped).sum(-1)
    return is_clipped.squeeze(-1).to(teacher.dtype)
