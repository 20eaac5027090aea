"""Per-token weights of a route: one kind per idea, each a factor on top of schedule value and class multiplier.

Decides how much a routed token counts relative to the other tokens of its route. Must not know the route's action, its
schedule or the denominators of the loss.

Invariants: one array per item, in the order of the items and with one factor per position; factors are finite and never
negative; the result does not depend on the order of the batch; empty batches and items without positions are legal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from trace_rl.batch import ScoredTokens, TeacherOutput
from trace_rl.config.base import Kind


class TokenWeight(Kind):
    """A factor on top of schedule and multiplier for each of a route's tokens."""

    reads: ClassVar[frozenset[TeacherOutput]] = frozenset()
    """What the weight needs of the teacher."""

    @abstractmethod
    def weights(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        """The factors of the route's tokens, for all completions of the batch that have such tokens."""


class Uniform(TokenWeight):
    """1 for every token."""

    type: Literal["uniform"] = "uniform"

    def weights(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        return [np.ones(len(item.positions)) for item in batch]


class TeacherEntropy(TokenWeight):
    """exp(-beta H(q_t)) divided by its mean over all tokens of the route in the batch.

    Trusts the teacher where it is sure. Reference: SRPO, arXiv:2604.02288 (beta = 1).
    """

    type: Literal["teacher_entropy"] = "teacher_entropy"
    reads: ClassVar[frozenset[TeacherOutput]] = frozenset({"entropy"})
    beta: float = Field(1.0, ge=0)
    """How fast the weight falls with the teacher's entropy, per nat; 0 is `uniform`."""

    def weights(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        entropy = np.concatenate([np.zeros(0), *(item.teacher_entropy for item in batch)])
        flat = _exp_with_mean_one(-self.beta * entropy)
        ends = np.cumsum([len(item.positions) for item in batch], dtype=np.int64)
        return [flat[end - len(item.positions) : end] for item, end in zip(batch, ends, strict=True)]


class _Perplexity(TokenWeight):
    """One weight per rollout, proportional to a power of its perplexity among the route's rollouts of the same prompt.

    A group's weights are its softmax of `_log_weight` times its number of rollouts, so they have mean 1 over those of
    the group's rollouts that have routed tokens, and a rollout that is alone in its group has weight 1.
    """

    tau: float = Field(1.0, gt=0)
    """Temperature: the exponent of the perplexity is 1/tau in size."""

    @abstractmethod
    def _log_weight(self, item: ScoredTokens) -> float:
        """Log of the weight before it is normalised."""

    def weights(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        groups: dict[str, list[int]] = {}
        for index, item in enumerate(batch):
            if len(item.positions):
                groups.setdefault(item.member.rollout.prompt.prompt_id, []).append(index)
        weight = np.zeros(len(batch))
        for indices in groups.values():
            weight[indices] = _exp_with_mean_one(np.array([self._log_weight(batch[index]) for index in indices]))
        return [np.full(len(item.positions), weight[index]) for index, item in enumerate(batch)]


class StudentPerplexity(_Perplexity):
    """PPL_S^(1/tau) with PPL_S = exp(-mean_t log p(y_t)) over the whole response, under the sampling policy.

    Favours correct rollouts at the border of what the student can do. Reference: SCOPE, arXiv:2604.10688. The sign is
    that of the paper; the public code weights by the softmax of +mean log p instead, which is PPL_S^(-1/tau). The
    normalisation is that of the code.
    """

    type: Literal["student_perplexity"] = "student_perplexity"

    def _log_weight(self, item: ScoredTokens) -> float:
        return -float(np.mean(item.member.rollout.rollout_logprobs, dtype=np.float64)) / self.tau


class TeacherPerplexity(_Perplexity):
    """PPL_T^(-1/tau) with PPL_T = exp(-mean_t log q(y_t)) over the route's tokens of the rollout.

    Distrusts the teacher on rollouts that surprise it. Reference: SCOPE, arXiv:2604.10688, where the route holds every
    token of a wrong rollout, so that both means are the same.
    """

    type: Literal["teacher_perplexity"] = "teacher_perplexity"
    reads: ClassVar[frozenset[TeacherOutput]] = frozenset({"logprobs"})

    def _log_weight(self, item: ScoredTokens) -> float:
        return float(np.mean(item.teacher_logprobs, dtype=np.float64)) / self.tau


class Frontier(TokenWeight):
    """scale * p (1 - p) with p the pass rate of the prompt's group: 0 in homogeneous groups, largest at p = 1/2.

    Proposed here: SSOPD, arXiv:2605.17497, has a prompt-level frontier weight whose exact form is not known to us.
    """

    type: Literal["frontier"] = "frontier"
    scale: float = Field(4.0, gt=0)
    """Factor on p (1 - p); 4 makes the largest weight 1."""

    def weights(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        return [np.full(len(item.positions), self._weight(item.member.pass_rate)) for item in batch]

    def _weight(self, pass_rate: float) -> float:
        return self.scale * pass_rate * (1 - pass_rate)


class Position(TokenWeight):
    """exp(-decay t / |y|) divided by its mean over the rollout's tokens of the route: early tokens count more.

    Proposed here, after the finding that a teacher's supervision gets worse with the position; IW-OPD,
    arXiv:2606.22600, derives its weights from the accumulated discrepancy between student and teacher instead.
    """

    type: Literal["position"] = "position"
    decay: float = Field(1.0, ge=0)
    """Log of the ratio between the weights at the start and at the end of a response; 0 is `uniform`."""

    def weights(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        return [_exp_with_mean_one(-self.decay * item.positions / max(item.member.length, 1)) for item in batch]


def _exp_with_mean_one(log_weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """exp(x) / mean(exp(x)); the shift by the maximum keeps it finite for any finite x."""
    if not log_weights.size:
        return np.zeros(0)
    weights = np.exp(log_weights - log_weights.max())
    return np.asarray(weights / weights.mean())
