"""Actions that change the advantage of a route's tokens: sampled distillation and token-level credit.

Decides the advantage that the policy gradient uses at the routed tokens. Must not know which tokens a route selects,
its schedule, the policy loss or its denominators.

Invariants: numbers only, no gradient; one array per item, in the order of the items; a weight of 0 leaves exactly
policy_weight * advantage; the result does not depend on the order of the group.

Delta_t = log q(y_t) - log p(y_t) throughout, with q the teacher and p the policy that sampled the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from trace_rl.actions import AdvantageAction
from trace_rl.batch import ScoredTokens, TeacherOutput
from trace_rl.ktae import token_values


class PgLogratio(AdvantageAction):
    """policy_weight A + weight_t v_t with v_t the log-ratio, at the token or over the route's later tokens.

    With policy_weight 0 this is the reverse KL to the teacher by policy gradient, estimated from the sampled tokens.
    Reference: on-policy distillation, Thinking Machines Lab 2025 (horizon `token`); MiniLLM, arXiv:2306.08543 (horizon
    `future_mean`, which goes with an exact reverse-KL term for the token itself).
    """

    type: Literal["pg_logratio"] = "pg_logratio"
    reads: ClassVar[frozenset[TeacherOutput]] = frozenset({"logprobs"})
    horizon: Literal["token", "future_mean"] = "token"
    """`token`: v_t = Delta_t. `future_mean`: v_t is the mean of Delta over the route's tokens after t, 0 at the last
    one: the length-normalised long-term part of MiniLLM's gradient. Its public code instead takes the mean from t on
    and whitens it over the batch."""
    sign: Literal[1, -1] = 1
    """-1 reverses the teacher, the direction of AntiSD, arXiv:2605.11609; its bounded divergence and its entropy gate
    are not part of this."""

    @property
    def is_estimate(self) -> bool:
        return True

    def advantages(
        self, group: Sequence[ScoredTokens], policy_weight: float, weights: Sequence[Float[np.ndarray, " row"]]
    ) -> list[Float[np.ndarray, " row"]]:
        return [
            policy_weight * item.advantage + weight * self.sign * self._values(_log_ratio(item))
            for item, weight in zip(group, weights, strict=True)
        ]

    def _values(self, log_ratio: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
        if self.horizon == "token":
            return log_ratio
        future = np.zeros(len(log_ratio))
        future[:-1] = np.cumsum(log_ratio[:0:-1])[::-1] / np.arange(len(log_ratio) - 1, 0, -1)
        return future


class AdvMult(AdvantageAction):
    """policy_weight A [(1 - lam) + lam clip(exp(sign(A) Delta_t), 1 - clip, 1 + clip)] with lam = weight_t.

    The teacher only changes magnitudes. Where lam is so large (above 1 / clip) that the bracket would be negative it is
    0, so the sign of the advantage never flips. Reference: RLSD, arXiv:2604.03128 (clip = 0.2, lam from 0.5 to 0).
    """

    type: Literal["adv_mult"] = "adv_mult"
    reads: ClassVar[frozenset[TeacherOutput]] = frozenset({"logprobs"})
    clip: float = Field(0.2, ge=0, le=1)
    """Largest change of the evidence weight exp(sign(A) Delta_t) from 1."""
    sign: Literal[1, -1] = 1
    """-1 reverses the teacher: on correct rollouts, tokens it would not have predicted get more credit, which is the
    direction of RLRT, arXiv:2605.10781."""

    @property
    def is_estimate(self) -> bool:
        return True

    def advantages(
        self, group: Sequence[ScoredTokens], policy_weight: float, weights: Sequence[Float[np.ndarray, " row"]]
    ) -> list[Float[np.ndarray, " row"]]:
        return [
            policy_weight * item.advantage * self._factors(item, weight)
            for item, weight in zip(group, weights, strict=True)
        ]

    def _factors(self, item: ScoredTokens, weight: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
        exponent = self.sign * np.sign(item.advantage) * _log_ratio(item)
        # The upper bound is applied to the exponent, so that no ratio overflows.
        evidence = np.maximum(np.exp(np.minimum(exponent, np.log1p(self.clip))), 1 - self.clip)
        return np.asarray(np.maximum((1 - weight) + weight * evidence, 0.0))


class Ktae(AdvantageAction):
    """policy_weight A + weight_t kappa_v with kappa_v the key-token value of the token's type; see `trace_rl.ktae`.

    The statistics are those of all completions of the prompt, with or without routed tokens. The token that ends a
    completion has value 0. Reference: KTAE, arXiv:2505.16826.
    """

    type: Literal["ktae"] = "ktae"

    def advantages(
        self, group: Sequence[ScoredTokens], policy_weight: float, weights: Sequence[Float[np.ndarray, " row"]]
    ) -> list[Float[np.ndarray, " row"]]:
        if not group:
            return []
        completions = [annotated.graded for annotated in group[0].member.group]
        ends = {
            graded.rollout.token_ids[-1]
            for graded in completions
            if graded.rollout.finish_reason == "stop" and graded.rollout.token_ids
        }
        values = token_values(
            [graded.rollout.token_ids for graded in completions], [graded.is_correct for graded in completions], ends
        )
        by_sample = {graded.rollout.sample: row for graded, row in zip(completions, values, strict=True)}
        return [
            policy_weight * item.advantage + weight * by_sample[item.member.rollout.sample][item.positions]
            for item, weight in zip(group, weights, strict=True)
        ]


def _log_ratio(item: ScoredTokens) -> Float[np.ndarray, " row"]:
    """Delta_t at the item's positions."""
    return np.asarray(item.teacher_logprobs, dtype=np.float64) - np.asarray(item.rollout_logprobs, dtype=np.float64)
