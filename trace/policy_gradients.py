"""The policy-gradient term of every token, and the correction for a sampler that is not quite the policy.

Pure functions of log-probs and advantages; weights, masks and denominators are applied by the caller. Rows of one
completion are never spread over two calls, so that ratios of whole sequences can be formed.

Invariants: with the policy equal to the old one every kind but `none` has the gradient -A grad log pi per token
(`gspo`: in sum over a completion whose tokens share their advantage); no rows give no terms; nothing but
`policy_logprobs` carries a gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from trace_rl.config.base import Kind, Section

_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyRows:
    """The response tokens of whole completions."""

    policy_logprobs: Float[Tensor, " row"]
    """Of the sampled tokens under the policy that is trained; carries the gradient."""
    old_logprobs: Float[Tensor, " row"]
    """Under the policy before the first optimizer step on the batch; detached."""
    advantages: Float[Tensor, " row"]
    sequence: Int[Tensor, " row"]
    """Which completion the token belongs to."""
    num_sequences: int


@dataclass(frozen=True)
class PolicyTerms:
    """What is minimised at every token, and where a clip has taken the gradient away or bounded the weight."""

    loss: Float[Tensor, " row"]
    is_clipped: Bool[Tensor, " row"]


@dataclass(frozen=True)
class SamplerRows:
    """What the sampler and the learner say of the response tokens of whole completions."""

    old_logprobs: Float[Tensor, " row"]
    """Under the policy before the first optimizer step on the batch."""
    rollout_logprobs: Float[Tensor, " row"]
    """Under the weights that wrote the token, from the engine that sampled it."""
    is_stale: Bool[Tensor, " row"]
    """Whether these are older than those of the step."""
    sequence: Int[Tensor, " row"]
    """Which completion the token belongs to."""
    num_sequences: int

    @property
    def gap(self) -> Float[Tensor, " row"]:
        """log pi_old - log pi_sampler, in nats; detached."""
        return (self.old_logprobs - self.rollout_logprobs).detach()


class PolicyGradient(Kind):
    """A term of the loss at every response token."""

    vanishes_without_advantage: ClassVar[bool] = False
    """Whether tokens whose advantage is 0 have no gradient, so that sequences of such tokens need no backward pass."""

    @abstractmethod
    def terms(self, rows: PolicyRows) -> PolicyTerms:
        """The term of every token; differentiable in `rows.policy_logprobs` only."""

    def couples_tokens(self, is_one_step: bool) -> bool:
        """Whether the gradient at a token depends on log-probs of other tokens, which costs one more head product.

        Args:
            is_one_step: one optimizer step is taken on a batch, so that policy and old policy are the same.
        """
        return True


class Clipped(PolicyGradient):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_old per token.

    Where the clipped branch is the smaller one the token has no gradient. Reference: GRPO, arXiv:2402.03300, eq. 3;
    clip-higher: DAPO, arXiv:2503.14476, eq. 10; dual clip: arXiv:1912.09729, eq. 5.
    """

    type: Literal["clipped"] = "clipped"
    vanishes_without_advantage: ClassVar[bool] = True
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.28, gt=0)
    """And above at 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """The term is at most -dual_clip A where A < 0; none by default."""

    def terms(self, rows: PolicyRows) -> PolicyTerms:
        ratio = _ratio(rows.policy_logprobs - rows.old_logprobs)
        free = ratio * rows.advantages
        clipped = torch.clamp(ratio, 1 - self.clip_low, 1 + self.clip_high) * rows.advantages
        surrogate = torch.minimum(free, clipped)
        is_clipped = clipped < free
        if self.dual_clip is not None:
            floor = self.dual_clip * rows.advantages
            below = (rows.advantages < 0) & (surrogate < floor)
            surrogate = torch.where(below, floor, surrogate)
            is_clipped = is_clipped | below
        return PolicyTerms(-surrogate, is_clipped)

    def couples_tokens(self, is_one_step: bool) -> bool:
        return False


class Gspo(PolicyGradient):
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with s the geometric mean of a completion's token ratios.

    s_i = exp(mean_t log r_t); at token t it is written sg(s_i) pi_t / sg(pi_t), so that advantages may differ from
    token to token (GSPO-token). Aggregation `seq-mean-token-mean` brings the paper's 1/|y_i|. Reference: GSPO,
    arXiv:2507.18071, eqs. 5-7 and 13-14; clip ranges of its experiments.
    """

    type: Literal["gspo"] = "gspo"
    vanishes_without_advantage: ClassVar[bool] = True
    clip_low: float = Field(3e-4, gt=0, lt=1)
    """The ratio of a completion is clipped below at 1 - clip_low."""
    clip_high: float = Field(4e-4, gt=0)
    """And above at 1 + clip_high."""

    def terms(self, rows: PolicyRows) -> PolicyTerms:
        log_ratio = rows.policy_logprobs.detach() - rows.old_logprobs
        sums = _sum_by_sequence(log_ratio, rows.sequence, rows.num_sequences)
        lengths = _sum_by_sequence(torch.ones_like(log_ratio), rows.sequence, rows.num_sequences)
        ratio = _ratio(sums / lengths.clamp(min=1))[rows.sequence]
        ratio = ratio * torch.exp(rows.policy_logprobs - rows.policy_logprobs.detach())
        free = ratio * rows.advantages
        clipped = torch.clamp(ratio, 1 - self.clip_low, 1 + self.clip_high) * rows.advantages
        return PolicyTerms(-torch.minimum(free, clipped), clipped < free)

    def couples_tokens(self, is_one_step: bool) -> bool:
        return not is_one_step


class Cispo(PolicyGradient):
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: the weight is bounded, and no token loses its gradient.

    Reference: CISPO in MiniMax-M1, arXiv:2506.13585, eqs. 4-5, which has no lower bound in practice.
    """

    type: Literal["cispo"] = "cispo"
    vanishes_without_advantage: ClassVar[bool] = True
    clip_low: float = Field(1.0, gt=0, le=1)
    """The weight is at least 1 - clip_low; at 1 there is no lower bound."""
    clip_high: float = Field(0.28, gt=0)
    """And at most 1 + clip_high."""

    def terms(self, rows: PolicyRows) -> PolicyTerms:
        ratio = _ratio(rows.policy_logprobs.detach() - rows.old_logprobs)
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return PolicyTerms(-weight * rows.advantages * rows.policy_logprobs, weight != ratio)

    def couples_tokens(self, is_one_step: bool) -> bool:
        return False


class Reinforce(PolicyGradient):
    """-A log pi: the score function without a ratio (Williams 1992)."""

    type: Literal["reinforce"] = "reinforce"
    vanishes_without_advantage: ClassVar[bool] = True

    def terms(self, rows: PolicyRows) -> PolicyTerms:
        loss = -rows.advantages * rows.policy_logprobs
        return PolicyTerms(loss, torch.zeros_like(loss, dtype=torch.bool))

    def couples_tokens(self, is_one_step: bool) -> bool:
        return False


class NoPolicyGradient(PolicyGradient):
    """No term: pure distillation."""

    type: Literal["none"] = "none"
    vanishes_without_advantage: ClassVar[bool] = True

    def terms(self, rows: PolicyRows) -> PolicyTerms:
        # a product with 0, not a constant: a micro-batch without rows of routes must still have a gradient to reduce
        return PolicyTerms(rows.policy_logprobs * 0, torch.zeros_like(rows.policy_logprobs, dtype=torch.bool))

    def couples_tokens(self, is_one_step: bool) -> bool:
        return False


class RolloutCorrection(Section):
    """Truncated importance weights from the sampler's distribution to the learner's, w = min(pi_old / pi_sampler, cap).

    Weights multiply the policy-gradient term and carry no gradient, so that a clipped term becomes

        w_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A),  r_t = pi / pi_old

    with pi_sampler at token t that of the weights which wrote it. This is the decoupled objective: clips hold the
    policy near pi_old, the proximal policy, and weights account for what has sampled (arXiv:2110.00641; with
    asynchronous rollouts: AReaL, arXiv:2505.24298). pi_old is the policy before the first
    optimizer step on the batch, so with one step r_t = 1 and the gradient is that of w_t A log pi.

    Tokens of older weights are off-policy by what was learnt since. All others are so by kernels and precisions alone,
    in which engines and learners differ. The truncation is that of truncated importance sampling (Ionides 2008); verl's
    rollout correction and the public SDPO code apply it to that mismatch with cap 2.
    """

    level: Literal["none", "stale", "token", "sequence"] = "stale"
    """`stale`: the ratio of the token where older weights wrote it, and exactly 1 elsewhere, so that synchronous runs
    are not corrected; `token`: the ratio of every token; `sequence`: the product over all tokens of the completion."""
    cap: float = Field(2.0, ge=1)
    """Largest weight."""

    def weights(self, rows: SamplerRows) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
        """The weight of every token, and which weights the cap has lowered; ones and none at level `none`."""
        gap = rows.gap
        if self.level == "none":
            return torch.ones_like(gap), torch.zeros_like(gap, dtype=torch.bool)
        if self.level == "stale":
            gap = gap.where(rows.is_stale, 0)
        if self.level == "sequence":
            gap = _sum_by_sequence(gap, rows.sequence, rows.num_sequences)[rows.sequence]
        ratio = torch.exp(gap)
        return ratio.clamp(max=self.cap), ratio > self.cap


def mismatch_statistics(
    rows: SamplerRows, weights: Float[Tensor, " row"], is_capped: Bool[Tensor, " row"]
) -> dict[str, Tensor]:
    """Sums over tokens (and maxima, names ending in `_max`) that tell how far sampler and learner are apart.

    `mismatch`: |log pi_old - log pi_sampler|; `mismatch_k3`: r - 1 - log r with r = pi_old / pi_sampler, whose mean
    estimates KL(sampler || learner) in nats without bias (the k3 estimator); `correction`: the weights;
    `correction_capped`: number of tokens whose weight the cap has lowered. Each is told of all tokens, of those of
    older weights (`stale_...`, `stale_tokens` in number) and of the others (`fresh_...`).
    """
    gap = rows.gap
    values = {
        "mismatch": gap.abs(),
        "mismatch_k3": torch.expm1(gap) - gap,
        "correction": weights,
        "correction_capped": is_capped.to(gap.dtype),
    }
    found = {"stale_tokens": rows.is_stale.sum().to(gap.dtype)}
    for part, is_meant in (("", None), ("fresh_", ~rows.is_stale), ("stale_", rows.is_stale)):
        chosen = {name: value if is_meant is None else value.where(is_meant, 0) for name, value in values.items()}
        found |= {f"{part}{name}": value.sum() for name, value in chosen.items()}
        found[f"{part}mismatch_max"] = chosen["mismatch"].max() if gap.numel() else gap.sum()
    return found


def _ratio(log_ratio: Tensor) -> Tensor:
    """exp, bounded far outside of every clip: an overflow times an advantage of 0 would be no number."""
    return torch.exp(log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def _sum_by_sequence(
    values: Float[Tensor, " row"], sequence: Int[Tensor, " row"], num_sequences: int
) -> Float[Tensor, " sequence"]:
    return values.new_zeros(num_sequences).index_add(0, sequence, values)
