"""Token scores: hand-worked numbers, range, monotony, and the selection of the top share."""

from __future__ import annotations

import numpy as np
import pytest

from trace_rl.batch import AnnotatedRollout, GradedRollout, GroupMember, Prompt, Rollout, ScoredTokens
from trace_rl.token_scores import TokenScore, keep_top

KINDS = ["policy_entropy", "divergence", "soft_or", "divergence_low_entropy"]


def scored(policy_entropy: list[float], divergence: list[float]) -> ScoredTokens:
    """An item all of whose tokens are candidates; an empty list stands for an array that nothing reads."""
    length = max(len(policy_entropy), len(divergence))
    ids, versions = tuple(range(length)), np.zeros(length, dtype=np.int64)
    rollout = Rollout(Prompt("a", "q", "a"), 0, (1,), ids, np.zeros(length), "stop", versions, "")
    own = AnnotatedRollout(GradedRollout(rollout, 0.0, "graded"), (), "not_requested")
    return ScoredTokens(
        member=GroupMember(own, (own,)),
        advantage=0.0,
        positions=np.arange(length),
        teacher_logprobs=np.zeros(0),
        teacher_entropy=np.zeros(0),
        policy_entropy=np.array(policy_entropy),
        divergence=np.array(divergence),
    )


def score(kind: str, batch: list[ScoredTokens]) -> list[np.ndarray]:
    return TokenScore.model_validate(kind).scores(batch)


def test_policy_entropy_is_clipped_at_the_98th_percentile_of_the_batch() -> None:
    # 51 tokens 0..49 and 1000: rank 0.98 * 50 = 49 exactly, so the clip is at 49 and the outlier counts as 49.
    first, second = score("policy_entropy", [scored(list(range(50)), []), scored([1000.0], [])])
    np.testing.assert_allclose(first, np.arange(50) / 49)
    np.testing.assert_allclose(second, [1.0])


def test_divergence_is_scaled_over_the_batch_without_a_clip() -> None:
    # 1, 3 | 2, 5: min 1, range 4: 0, 1/2 | 1/4, 1.
    first, second = score("divergence", [scored([], [1.0, 3.0]), scored([], [2.0, 5.0])])
    np.testing.assert_allclose(first, [0.0, 0.5])
    np.testing.assert_allclose(second, [0.25, 1.0])


def test_soft_or_and_low_entropy_divergence() -> None:
    # Entropies 0, 1, 2, 2: the percentile is 2, so h = 0, 1/2, 1, 1. Divergences 4, 2, 0, 4: d = 1, 1/2, 0, 1.
    # h + d - h d = 1, 3/4, 1, 1.  d (1 - h) = 1, 1/4, 0, 0.
    batch = [scored([0.0, 1.0], [4.0, 2.0]), scored([2.0, 2.0], [0.0, 4.0])]
    np.testing.assert_allclose(np.concatenate(score("soft_or", batch)), [1.0, 0.75, 1.0, 1.0])
    np.testing.assert_allclose(np.concatenate(score("divergence_low_entropy", batch)), [1.0, 0.25, 0.0, 0.0])


def test_a_constant_array_tells_nothing() -> None:
    # d = 0 everywhere leaves soft_or = h and the low-entropy divergence 0; h = 0 everywhere leaves both at d.
    same_divergence = [scored([0.0, 1.0, 2.0, 2.0], [3.0] * 4)]
    np.testing.assert_array_equal(score("divergence", same_divergence)[0], np.zeros(4))
    np.testing.assert_allclose(score("soft_or", same_divergence)[0], [0.0, 0.5, 1.0, 1.0])
    np.testing.assert_array_equal(score("divergence_low_entropy", same_divergence)[0], np.zeros(4))
    same_entropy = [scored([0.7] * 3, [0.0, 1.0, 4.0])]
    for kind in ("soft_or", "divergence_low_entropy"):
        np.testing.assert_allclose(score(kind, same_entropy)[0], [0.0, 0.25, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_lie_between_zero_and_one_and_do_not_depend_on_units(kind: str) -> None:
    rng = np.random.default_rng(0)
    entropy, divergence = rng.exponential(size=(2, 7)), rng.exponential(size=(2, 7))
    plain = score(kind, [scored(list(h), list(d)) for h, d in zip(entropy, divergence, strict=True)])
    scaled = score(kind, [scored(list(3 * h), list(5 * d)) for h, d in zip(entropy, divergence, strict=True)])
    for row, other in zip(plain, scaled, strict=True):
        assert row.shape == (7,) and (row >= 0).all() and (row <= 1).all()
        np.testing.assert_allclose(row, other)


def test_direction_in_entropy_and_divergence() -> None:
    # Middle token of three: more divergence raises all scores that read it, more entropy raises soft_or and lowers Q3.
    def middle(kind: str, h: float, d: float) -> float:
        return float(score(kind, [scored([0.0, h, 1.0, 1.0], [0.0, d, 1.0, 1.0])])[0][1])

    assert middle("soft_or", 0.5, 0.6) > middle("soft_or", 0.5, 0.4)
    assert middle("divergence_low_entropy", 0.5, 0.6) > middle("divergence_low_entropy", 0.5, 0.4)
    assert middle("soft_or", 0.6, 0.5) > middle("soft_or", 0.4, 0.5)
    assert middle("divergence_low_entropy", 0.6, 0.5) < middle("divergence_low_entropy", 0.4, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_and_single_tokens(kind: str) -> None:
    assert score(kind, []) == []
    assert score(kind, [scored([], [])])[0].shape == (0,)
    np.testing.assert_array_equal(score(kind, [scored([2.0], [3.0]), scored([], [])])[0], [0.0])


def test_what_each_score_reads() -> None:
    reads = {kind: TokenScore.model_validate(kind) for kind in KINDS}
    assert [kind for kind, item in reads.items() if item.reads_entropy] == [
        "policy_entropy",
        "soft_or",
        "divergence_low_entropy",
    ]
    assert [kind for kind, item in reads.items() if item.reads_divergence] == [
        "divergence",
        "soft_or",
        "divergence_low_entropy",
    ]


@pytest.mark.parametrize(
    ("frac", "num_kept"),
    # floor(frac * 10), at least 1; 0.7 * 10 and 0.3 * 10 are exact counts in spite of rounding.
    [(0.01, 1), (0.1, 1), (0.19, 1), (0.25, 2), (0.3, 3), (0.7, 7), (0.99, 9), (1.0, 10)],
)
def test_keep_top_keeps_the_floor_and_at_least_one(frac: float, num_kept: int) -> None:
    scores = [np.array([5.0, 1.0, 9.0, 3.0]), np.array([]), np.array([8.0, 2.0, 7.0, 4.0, 6.0, 0.0])]
    kept = keep_top(scores, frac)
    assert [row.shape for row in kept] == [(4,), (0,), (6,)]
    np.testing.assert_array_equal(np.concatenate(kept), np.concatenate(scores) >= 10 - num_kept)


def test_keep_top_undoes_the_rounding_of_the_product() -> None:
    assert 0.29 * 100 < 29
    assert keep_top([np.arange(100.0)], 0.29)[0].sum() == 29


def test_keep_top_breaks_ties_by_order() -> None:
    first, second = keep_top([np.array([0.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0])], 0.5)
    np.testing.assert_array_equal(first, [False, True, True])
    np.testing.assert_array_equal(second, [False, True, False])


def test_keep_top_of_nothing() -> None:
    assert keep_top([], 0.5) == []
    assert [row.shape for row in keep_top([np.array([]), np.array([])], 0.5)] == [(0,), (0,)]


def test_a_larger_share_keeps_what_a_smaller_one_kept() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 4, size=9).astype(float) for _ in range(3)]
    smaller = np.concatenate(keep_top(scores, 0.2))
    larger = np.concatenate(keep_top(scores, 0.6))
    assert smaller.sum() == 5 and larger.sum() == 16 and not (smaller & ~larger).any()
