"""Token scores: which of a route's candidate tokens matter most in the whole batch.

Decides the order in which a top-share selector keeps tokens. Must not know which tokens are candidates, what is done
with the kept ones, or how entropy and divergence were found.

Invariants: one array per item, in the order of the items and with one score per position; scores lie in [0, 1]; they
are relative to the batch, so adding candidates may change them; empty batches are legal.

Reference: TIP, arXiv:2604.14084. Its public code draws tokens at random in proportion to powers of entropy and
divergence; the deterministic scores here are those of the paper.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped

from trace_rl.batch import ScoredTokens
from trace_rl.config.base import Kind

_ENTROPY_PERCENTILE = 98.0
"""Entropies above this percentile of the batch count as equal, so that a few outliers do not flatten the scale."""


class TokenScore(Kind):
    """Ranks the candidate tokens of a route over the whole batch; higher is kept first."""

    reads_entropy: ClassVar[bool]
    """Whether the score reads `ScoredTokens.policy_entropy`."""
    reads_divergence: ClassVar[bool]
    """Whether the score reads `ScoredTokens.divergence`."""

    @abstractmethod
    def scores(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        """The scores of the candidate tokens, for all completions of the batch that have such tokens."""


class PolicyEntropy(TokenScore):
    """h: the policy's entropy clipped at the 98th percentile of the batch, then scaled to [0, 1]."""

    type: Literal["policy_entropy"] = "policy_entropy"
    reads_entropy: ClassVar[bool] = True
    reads_divergence: ClassVar[bool] = False

    def scores(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        return _split(_scaled_entropy(batch), _lengths(batch))


class Divergence(TokenScore):
    """d: the divergence between teacher and policy scaled to [0, 1]."""

    type: Literal["divergence"] = "divergence"
    reads_entropy: ClassVar[bool] = False
    reads_divergence: ClassVar[bool] = True

    def scores(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        return _split(_scaled_divergence(batch), _lengths(batch))


class SoftOr(TokenScore):
    """h + d - h d: high where the policy is unsure or the teacher disagrees (Soft-OR)."""

    type: Literal["soft_or"] = "soft_or"
    reads_entropy: ClassVar[bool] = True
    reads_divergence: ClassVar[bool] = True

    def scores(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        entropy, divergence = _scaled_entropy(batch), _scaled_divergence(batch)
        return _split(entropy + divergence - entropy * divergence, _lengths(batch))


class DivergenceLowEntropy(TokenScore):
    """d (1 - h): high where the policy is sure and the teacher disagrees (the quadrant Q3)."""

    type: Literal["divergence_low_entropy"] = "divergence_low_entropy"
    reads_entropy: ClassVar[bool] = True
    reads_divergence: ClassVar[bool] = True

    def scores(self, batch: Sequence[ScoredTokens]) -> list[Float[np.ndarray, " row"]]:
        return _split(_scaled_divergence(batch) * (1 - _scaled_entropy(batch)), _lengths(batch))


def keep_top(scores: Sequence[Float[np.ndarray, " row"]], frac: float) -> list[Bool[np.ndarray, " row"]]:
    """Mark the tokens with the highest scores: max(1, floor(frac * n)) of the n candidates of the batch.

    The number is that of the public code of arXiv:2604.14084. Of equal scores the earlier one is kept.

    Args:
        scores: one array per completion; higher is kept first.
        frac: share of the batch's candidates to keep, in (0, 1].
    """
    flat = np.concatenate([np.zeros(0), *scores])
    # The small term undoes the rounding of products such as 0.29 * 100 = 28.999...
    num_kept = max(1, math.floor(frac * len(flat) + 1e-9))
    is_kept = np.zeros(len(flat), dtype=bool)
    is_kept[np.argsort(-flat, kind="stable")[:num_kept]] = True
    return _split(is_kept, [len(item) for item in scores])


def _scaled_entropy(batch: Sequence[ScoredTokens]) -> Float[np.ndarray, " n"]:
    entropy = np.concatenate([np.zeros(0), *(item.policy_entropy for item in batch)])
    if entropy.size:
        entropy = np.minimum(entropy, np.percentile(entropy, _ENTROPY_PERCENTILE))
    return _min_max(entropy)


def _scaled_divergence(batch: Sequence[ScoredTokens]) -> Float[np.ndarray, " n"]:
    return _min_max(np.concatenate([np.zeros(0), *(item.divergence for item in batch)]))


def _min_max(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """(x - min) / (max - min); zeros where all values are equal, since then they tell no token from another."""
    if not values.size or values.max() == values.min():
        return np.zeros(len(values))
    return np.asarray((values - values.min()) / (values.max() - values.min()))


def _split(flat: Shaped[np.ndarray, " n"], lengths: Sequence[int]) -> list[Shaped[np.ndarray, " row"]]:
    ends = np.cumsum(lengths, dtype=np.int64)
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _lengths(batch: Sequence[ScoredTokens]) -> list[int]:
    return [len(item.positions) for item in batch]
