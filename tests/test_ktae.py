"""Key-token values: two hand-worked groups, a slow independent formula, Fisher's test, and symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trace_rl.ktae import fisher_p_value, information_gain, token_values


def slow_fisher(a: int, b: int, n_c: int, n_w: int) -> float:
    """Two-sided p-value from hypergeometric probabilities in floating point."""

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    def probability(k: int) -> float:
        return math.exp(log_choose(n_c, k) + log_choose(n_w, a + b - k) - log_choose(n_c + n_w, a + b))

    tables = [probability(k) for k in range(max(0, a + b - n_w), min(n_c, a + b) + 1)]
    return sum(each for each in tables if each <= probability(a) * (1 + 1e-9))


def slow_value(token: int, token_ids: list[list[int]], is_correct: list[bool]) -> float:
    """The formula of arXiv:2505.16826 and its public code for one type, term by term."""
    sides = [[ids for ids, flag in zip(token_ids, is_correct, strict=True) if flag == side] for side in (True, False)]
    (a, b), (n_c, n_w) = ([sum(token in ids for ids in side) for side in sides], [len(side) for side in sides])
    p_value = slow_fisher(a, b, n_c, n_w)
    fisher = 0.0 if math.isclose(p_value, 1.0, rel_tol=1e-9) else math.exp(-2 * p_value)

    def bits(*counts: int) -> float:
        return -sum(c / sum(counts) * math.log2(c / sum(counts)) for c in counts if c)

    n = n_c + n_w
    gain = bits(n_c, n_w) - (a + b) / n * bits(a, b) - (n - a - b) / n * bits(n_c - a, n_w - b)
    totals = [sum(map(len, side)) for side in sides]
    tf = []
    for side, total in zip(sides, totals, strict=True):
        frequency = sum(ids.count(token) for ids in side) / total
        tf.append(frequency * 3.0 / (frequency + 2.0 * (0.5 + 0.5 * total / (sum(totals) / 2))))
    effect = math.asin(math.sqrt(a / n_c)) - math.asin(math.sqrt(b / n_w))
    effect += tf[0] / (tf[1] + 1e-5) - tf[1] / (tf[0] + 1e-5)
    return 2 / (1 + math.exp(-max(-500.0, (fisher + gain) * effect / 2))) - 1


def random_group(seed: int, size: int = 7, vocabulary: int = 9) -> tuple[list[list[int]], list[bool]]:
    rng = np.random.default_rng(seed)
    token_ids = [rng.integers(0, vocabulary, size=rng.integers(1, 12)).tolist() for _ in range(size)]
    is_correct = [True, False, *(rng.random(size - 2) < 0.5).tolist()]
    return token_ids, is_correct


def test_hand_worked_group_with_equal_lengths() -> None:
    # Type 1 is in 2 of 2 correct and 1 of 2 wrong. Tables with 3 of 4: 2 ways (k=1), 2 (k=2); p = 4/4 = 1, Fisher 0.
    # IG = 1 - 3/4 H(1/3) = 1 - 3/4 * 0.9182958 = 0.3112781. arcsin 1 - arcsin sqrt(1/2) = pi/2 - pi/4 = 0.7853982.
    # 4 tokens a side, so k1 (...) = 2: tf_c = 0.5 * 3 / 2.5 = 0.6, tf_w = 0.25 * 3 / 2.25 = 1/3;
    # 0.6/0.3333433 - 0.3333333/0.60001 = 1.7999460 - 0.5555463 = 1.2443997. Effect 2.0297979.
    # kappa = tanh(0.3112781 * 2.0297979 / 4) = tanh(0.1579579) = 0.1566576.
    # Type 2 is in every completion: Fisher 0, IG 0, kappa 0.
    values = token_values([[1, 2], [1, 2], [1, 2], [2, 2]], [True, True, False, False], frozenset())
    for row in values[:3]:
        np.testing.assert_allclose(row, [0.1566576, 0.0], atol=1e-6)
    np.testing.assert_array_equal(values[3], [0.0, 0.0])


def test_hand_worked_group_with_different_lengths() -> None:
    # Type 1 is in 3 of 3 correct and 1 of 3 wrong. 4 of 6: 3, 9, 3 of 15; p = 6/15 = 0.4, Fisher e^-0.8 = 0.449329.
    # IG = 1 - 4/6 H(1/4) = 1 - 2/3 * 0.8112781 = 0.4591479; strength 0.9084769.
    # arcsin 1 - arcsin sqrt(1/3) = 1.5707963 - 0.6154797 = 0.9553166.
    # 6 and 12 tokens, mean 9: k1 (...) = 2 (1/2 + 1/3) = 5/3 and 2 (1/2 + 2/3) = 7/3.
    # tf_c = 1/2 * 3 / (1/2 + 5/3) = 9/13, tf_w = 1/12 * 3 / (1/12 + 7/3) = 3/29.
    # 0.6923077/0.1034583 - 0.1034483/0.6923177 = 6.6916610 - 0.1494232 = 6.5422378. Effect 7.4975544.
    # kappa = tanh(0.9084769 * 7.4975544 / 4) = tanh(1.7028389) = 0.9357.
    wrong = [[1, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]]
    values = token_values([[1, 2]] * 3 + wrong, [True] * 3 + [False] * 3, frozenset())
    expected = math.tanh(0.9084769 * 7.4975544 / 4)
    assert expected == pytest.approx(0.9357, abs=1e-4)
    np.testing.assert_allclose(values[0], [expected, 0.0], atol=1e-6)
    np.testing.assert_allclose(values[3], [expected, 0.0, 0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_the_slow_formula(seed: int) -> None:
    token_ids, is_correct = random_group(seed)
    values = token_values(token_ids, is_correct, frozenset())
    assert any(np.abs(row).max() > 0.01 for row in values)
    for ids, row in zip(token_ids, values, strict=True):
        np.testing.assert_allclose(row, [slow_value(token, token_ids, is_correct) for token in ids], atol=1e-9)


@pytest.mark.parametrize(("num_correct", "num_wrong"), [(1, 1), (2, 3), (5, 3), (4, 4), (1, 7), (9, 6)])
def test_fisher_agrees_with_floating_point_on_every_table(num_correct: int, num_wrong: int) -> None:
    for a in range(num_correct + 1):
        for b in range(num_wrong + 1):
            expected = slow_fisher(a, b, num_correct, num_wrong)
            assert fisher_p_value(a, b, num_correct, num_wrong) == pytest.approx(expected, rel=1e-9)


def test_fisher_of_a_well_known_table() -> None:
    # Fisher's tea: 3 of 4 against 1 of 4; 2 (1 + 16) of 70 tables are no likelier
    assert fisher_p_value(3, 1, 4, 4) == pytest.approx(34 / 70, rel=1e-12)


def test_fisher_recognises_a_p_value_of_one_exactly() -> None:
    # All 13 of 15 tables have the likeliest split 7 of 8 and 6 of 7 in their sum: nothing is left out.
    assert fisher_p_value(7, 6, 8, 7) == 1.0
    assert fisher_p_value(0, 0, 3, 5) == 1.0
    assert fisher_p_value(3, 5, 3, 5) == 1.0


def test_information_gain_between_nothing_and_all() -> None:
    # A perfect separation of 2 and 2 tells the whole bit; of 1 and 3 it tells H(1/4) = 2 - 3/4 log2 3 = 0.8112781.
    assert information_gain(2, 0, 2, 2) == pytest.approx(1.0)
    assert information_gain(1, 0, 1, 3) == pytest.approx(2 - 0.75 * math.log2(3))
    assert information_gain(1, 1, 2, 2) == pytest.approx(0.0, abs=1e-12)
    assert information_gain(2, 2, 2, 2) == 0.0


@pytest.mark.parametrize("verdict", [True, False])
def test_homogeneous_groups_have_no_values(verdict: bool) -> None:
    values = token_values([[1, 2], [3], []], [verdict] * 3, frozenset())
    assert [row.tolist() for row in values] == [[0.0, 0.0], [0.0], []]


def test_tokens_of_one_side_only_have_the_sign_of_that_side() -> None:
    # tf is 0 on the other side, so the ratio of term frequencies is in the thousands and kappa saturates.
    correct, wrong = token_values([[1, 2], [1, 3]], [True, False], frozenset())
    np.testing.assert_allclose(correct, [0.0, 1.0])
    np.testing.assert_allclose(wrong, [0.0, -1.0])


def test_ignored_types_have_no_value_but_count() -> None:
    token_ids, is_correct = random_group(3)
    plain = token_values(token_ids, is_correct, frozenset())
    ignored = token_values(token_ids, is_correct, frozenset({4, 77}))
    assert any(row[np.array(ids) == 4].any() for ids, row in zip(token_ids, plain, strict=True))
    for ids, row, without in zip(token_ids, plain, ignored, strict=True):
        np.testing.assert_array_equal(without, np.where(np.array(ids) == 4, 0.0, row))


def test_swapping_the_verdicts_flips_every_sign() -> None:
    token_ids, is_correct = random_group(1)
    plain = token_values(token_ids, is_correct, frozenset())
    swapped = token_values(token_ids, [not flag for flag in is_correct], frozenset())
    np.testing.assert_allclose(np.concatenate(swapped), -np.concatenate(plain), atol=1e-12)


def test_order_of_completions_and_renaming_of_tokens_do_not_matter() -> None:
    token_ids, is_correct = random_group(2)
    plain = token_values(token_ids, is_correct, frozenset())
    order = [3, 6, 0, 5, 1, 4, 2]
    renamed = [[151_000 - 17 * token for token in token_ids[index]] for index in order]
    shuffled = token_values(renamed, [is_correct[index] for index in order], frozenset())
    for place, index in enumerate(order):
        np.testing.assert_allclose(shuffled[place], plain[index], atol=1e-12)


def test_one_type_has_one_value_within_bounds() -> None:
    token_ids, is_correct = random_group(5)
    values = np.concatenate(token_values(token_ids, is_correct, frozenset()))
    flat = np.concatenate([np.array(ids) for ids in token_ids])
    assert (np.abs(values) <= 1).all()
    for token in np.unique(flat):
        assert len(set(values[flat == token].tolist())) == 1


def test_completions_without_tokens_are_safe() -> None:
    assert token_values([], [], frozenset()) == []
    assert [row.shape for row in token_values([[], []], [True, False], frozenset())] == [(0,), (0,)]
    empty, full = token_values([[], [1, 1]], [True, False], frozenset())
    assert empty.shape == (0,)
    np.testing.assert_allclose(full, [-1.0, -1.0])


def test_more_correct_completions_with_a_type_raise_its_value() -> None:
    # Type 1 in k of 4 correct and always in 1 of 4 wrong; the rest is a type that everyone has.
    def value(k: int) -> float:
        correct = [[1 if row < k else 2, 2] for row in range(4)]
        wrong = [[1, 2], [2, 2], [2, 2], [2, 2]]
        return float(token_values(correct + wrong, [True] * 4 + [False] * 4, frozenset())[4][0])

    values = [value(k) for k in range(5)]
    assert values == sorted(values) and values[0] < 0 and values[1] == pytest.approx(0, abs=1e-9) and values[4] > 0.5
