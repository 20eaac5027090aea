"""Key-token values from the contrast between the correct and the wrong completions of one prompt.

Decides how strongly the presence of a token type goes with success within a group. Needs no model, only token ids and
verdicts; must not know advantages, routes or tokenizers.

Invariants: values lie in [-1, 1]; all tokens of one type have the same value; a homogeneous group and a type that every
completion contains have value 0; swapping the verdicts of all completions flips every sign.

Reference: KTAE, arXiv:2505.16826. Constants and conventions are those of its public code: weights 1 for both strengths
of association, a two-sided Fisher test, entropy in bits, arcsine differences without the factor 2 of Cohen's h, and
BM25 saturation of the term frequency over all tokens of a class. The Fisher test is exact here (integer arithmetic), so
that p = 1 is recognised; the public code sums it in single precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

import numpy as np
from jaxtyping import Float

_BM25_K1 = 2.0
_BM25_B = 0.5
_RATIO_EPS = 1e-5
"""Keeps the ratio of term frequencies finite for types that only one class contains."""


def token_values(
    token_ids: Sequence[Sequence[int]], is_correct: Sequence[bool], ignored: Set[int]
) -> list[Float[np.ndarray, " time"]]:
    """kappa_v = 2 sigmoid((Fisher_v + IG_v) effect_v / 2) - 1 of every token, with v its type.

    With the 2x2 table (does a completion contain v? is it correct?) of the group: Fisher_v = exp(-2 p) of the two-sided
    p-value, 0 where p = 1; IG_v is the information gain in bits; effect_v = arcsin sqrt(share of the correct that
    contain v) - arcsin sqrt(share of the wrong) + tf_c / (tf_w + eps) - tf_w / (tf_c + eps), with tf the saturated term
    frequency of v among the tokens of the correct and of the wrong completions.

    Args:
        token_ids: the completions of one prompt.
        is_correct: the verdict of each.
        ignored: types whose value is 0; their tokens still count in the statistics.

    Reference: Sun et al. 2025, arXiv:2505.16826.
    """
    num_correct = sum(is_correct)
    num_wrong = len(is_correct) - num_correct
    lengths = [len(ids) for ids in token_ids]
    if not num_correct or not num_wrong or not any(lengths):
        return [np.zeros(length) for length in lengths]
    types, flat = np.unique(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids]), return_inverse=True)
    ends = np.cumsum(lengths, dtype=np.int64)
    completions = [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    contains = np.zeros((2, len(types)), dtype=np.int64)
    counts = np.zeros((2, len(types)))
    for row, correct in zip(completions, is_correct, strict=True):
        side = 0 if correct else 1
        contains[side, np.unique(row)] += 1
        counts[side] += np.bincount(row, minlength=len(types))
    correct_share = contains[0] / num_correct
    wrong_share = contains[1] / num_wrong
    correct_tf, wrong_tf = _term_frequencies(counts)
    effect = np.arcsin(np.sqrt(correct_share)) - np.arcsin(np.sqrt(wrong_share))
    effect += correct_tf / (wrong_tf + _RATIO_EPS) - wrong_tf / (correct_tf + _RATIO_EPS)
    # 2 sigmoid(x / 2) - 1 = tanh(x / 4), which does not overflow.
    kappa = np.tanh(_association(contains, num_correct, num_wrong) * effect / 4)
    kappa[np.isin(types, list(ignored))] = 0.0
    return [kappa[row] for row in completions]


def fisher_p_value(correct_with: int, wrong_with: int, num_correct: int, num_wrong: int) -> float:
    """Two-sided p-value of Fisher's exact test: the total probability of all tables that are no likelier than this one.

    Args:
        correct_with: correct completions that contain the type, of `num_correct`.
        wrong_with: wrong completions that contain the type, of `num_wrong`.
    """
    num_with = correct_with + wrong_with
    ways = [
        math.comb(num_correct, k) * math.comb(num_wrong, num_with - k)
        for k in range(max(0, num_with - num_wrong), min(num_correct, num_with) + 1)
    ]
    observed = math.comb(num_correct, correct_with) * math.comb(num_wrong, wrong_with)
    return sum(count for count in ways if count <= observed) / sum(ways)


def information_gain(correct_with: int, wrong_with: int, num_correct: int, num_wrong: int) -> float:
    """Bits that containing the type tells about being correct; arguments as of `fisher_p_value`."""
    total = num_correct + num_wrong
    num_with = correct_with + wrong_with
    conditional = (
        num_with * _binary_entropy(correct_with, num_with)
        + (total - num_with) * _binary_entropy(num_correct - correct_with, total - num_with)
    ) / total
    return _binary_entropy(num_correct, total) - conditional


def _binary_entropy(part: int, whole: int) -> float:
    """Entropy in bits of a share; 0 for an empty whole."""
    if part in (0, whole):
        return 0.0
    share = part / whole
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def _association(contains: np.ndarray, num_correct: int, num_wrong: int) -> Float[np.ndarray, " type"]:
    """Fisher_v + IG_v of every type; groups are small, so few tables differ and each is worked out once."""
    tables, index = np.unique(contains[0] * (num_wrong + 1) + contains[1], return_inverse=True)
    strengths = np.zeros(len(tables))
    for row, table in enumerate(tables.tolist()):
        correct_with, wrong_with = divmod(table, num_wrong + 1)
        p_value = fisher_p_value(correct_with, wrong_with, num_correct, num_wrong)
        fisher = 0.0 if p_value == 1.0 else math.exp(-2 * p_value)
        strengths[row] = fisher + information_gain(correct_with, wrong_with, num_correct, num_wrong)
    return np.asarray(strengths[index])


def _term_frequencies(counts: Float[np.ndarray, "side type"]) -> Float[np.ndarray, "side type"]:
    """f (k1 + 1) / (f + k1 (1 - b + b n / n_mean)), f a type's share of the n tokens of the correct or wrong side."""
    totals = counts.sum(axis=1, keepdims=True)
    frequency = counts / np.maximum(totals, 1)
    saturation = _BM25_K1 * (1 - _BM25_B + _BM25_B * totals / totals.mean())
    return np.asarray(frequency * (_BM25_K1 + 1) / (frequency + saturation))
