"""Statistics against scipy's functions, against numbers worked out by hand, and against the truth of simulations."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from trace_rl.statistics import (
    MAX_SEEDS,
    avg_at_k,
    bootstrap_mean,
    bootstrap_mean_of_sets,
    bootstrap_seeds_and_problems,
    compare,
    holm,
    maj_at_k,
    num_seeds_independent,
    num_seeds_paired,
    pass_at_k,
    powers_of_two,
    student_mean,
)


def test_avg_at_k_is_the_mean_over_the_samples_of_a_problem() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    assert avg_at_k(rewards).tolist() == [0.25, 0.75]


def test_pass_at_k_by_hand() -> None:
    # n = 4, c = 1: of the C(4, 2) = 6 pairs C(3, 2) = 3 miss the correct one; c = 0: none hits; c = 3: all hit
    assert pass_at_k(np.array([1, 0, 3]), 4, 2) == pytest.approx([0.5, 0.0, 1.0])


@pytest.mark.parametrize("num_samples", [1, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_samples: int) -> None:
    for correct in range(num_samples + 1):
        outcomes = [1] * correct + [0] * (num_samples - correct)
        for k in range(1, num_samples + 1):
            subsets = list(combinations(outcomes, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(np.array([correct]), num_samples, k) == pytest.approx([expected])


def test_pass_at_k_of_many_samples_neither_overflows_nor_loses_digits() -> None:
    # 1 - C(9999, 5000) / C(10000, 5000) = k / n for a single correct sample
    assert pass_at_k(np.array([1]), 10_000, 5_000) == pytest.approx([0.5], rel=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_of_fewer_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="no unbiased estimate"):
        pass_at_k(np.array([1]), 4, k)


def test_powers_of_two_end_at_k() -> None:
    assert [powers_of_two(k) for k in (1, 8, 12)] == [[1], [1, 2, 4, 8], [1, 2, 4, 8]]


def test_the_majority_decides() -> None:
    assert maj_at_k(["7", "7", "9"], [1.0, 1.0, 0.0]) == 1.0
    assert maj_at_k(["7", "9", "9"], [1.0, 0.0, 0.0]) == 0.0


def test_a_tie_is_worth_the_mean_over_those_that_tie() -> None:
    # 7 and 9 have two votes each, 5 has one: a fair draw between right and wrong
    assert maj_at_k(["7", "9", "7", "9", "5"], [1.0, 0.0, 1.0, 0.0, 0.0]) == 0.5


def test_samples_without_an_answer_do_not_vote() -> None:
    assert maj_at_k(["", "", "", "7"], [0.0, 0.0, 0.0, 1.0]) == 1.0
    assert maj_at_k(["", ""], [0.0, 0.0]) == 0.0


def test_the_bootstrap_interval_is_scipys() -> None:
    values = np.random.default_rng(3).beta(2, 3, size=40)
    ours = bootstrap_mean(values, seed=7, num_resamples=999)
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=0.95, n_resamples=999, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    assert (ours.low, ours.high) == (theirs.low, theirs.high)
    assert ours.mean == pytest.approx(values.mean()) and ours.low < ours.mean < ours.high and ours.num_units == 40


def test_the_same_seed_gives_the_same_interval_whatever_was_done_before() -> None:
    values = np.arange(10.0)
    first = bootstrap_mean(values, seed=1, num_resamples=500)
    np.random.seed(5)
    assert bootstrap_mean(values, seed=1, num_resamples=500) == first
    assert bootstrap_mean(values, seed=2, num_resamples=500) != first


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("function", [bootstrap_mean, student_mean])
def test_values_without_spread_have_no_interval(function, values: list[float]) -> None:
    found = function(np.array(values))
    assert found.mean == values[0] and math.isnan(found.low) and math.isnan(found.high) and not found.is_known


def test_students_interval_by_hand() -> None:
    # mean 2, standard deviation 1, standard error 1 / sqrt(3); t of 0.975 with 2 degrees of freedom is 4.302653
    found = student_mean(np.array([1.0, 2.0, 3.0]))
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def _accuracies(generator: np.random.Generator, num_problems: int) -> np.ndarray:
    """avg@8 of problems whose difficulty varies as that of a real set; the true mean is 0.6."""
    return generator.binomial(8, generator.beta(1.2, 0.8, size=num_problems)) / 8


def test_the_95_percent_bootstrap_interval_covers_the_truth_in_95_percent_of_simulations() -> None:
    generator, num_trials, covered = np.random.default_rng(0), 1000, 0
    for trial in range(num_trials):
        found = bootstrap_mean(_accuracies(generator, 100), seed=trial, num_resamples=1000)
        covered += found.low <= 0.6 <= found.high
    assert 0.92 <= covered / num_trials <= 0.97


def test_over_five_seeds_students_interval_covers_and_the_bootstrap_does_not() -> None:
    generator, num_trials = np.random.default_rng(1), 500
    runs = generator.normal(0.6, 0.02, size=(num_trials, 5))
    by_t = [student_mean(run) for run in runs]
    by_bootstrap = [bootstrap_mean(run, seed=trial, num_resamples=500) for trial, run in enumerate(runs)]
    assert 0.92 <= np.mean([found.low <= 0.6 <= found.high for found in by_t]) <= 0.98
    assert 0.75 <= np.mean([found.low <= 0.6 <= found.high for found in by_bootstrap]) <= 0.90


def test_the_two_level_interval_covers_where_one_level_does_not() -> None:
    """Both the seeds and the problems are draws: an interval over problems alone takes the seeds for the only ones."""
    generator, num_trials = np.random.default_rng(2), 400
    both, problems_only = 0, 0
    for trial in range(num_trials):
        seeds = generator.normal(0, 0.05, size=(12, 1))
        problems = generator.normal(0, 0.2, size=(1, 60))
        rewards = 0.6 + seeds + problems + generator.normal(0, 0.1, size=(12, 60))
        found = bootstrap_seeds_and_problems(rewards, seed=trial, num_resamples=500)
        both += found.low <= 0.6 <= found.high
        found = bootstrap_mean(rewards.mean(axis=0), seed=trial, num_resamples=500)
        problems_only += found.low <= 0.6 <= found.high
    assert 0.92 <= both / num_trials <= 0.98
    assert problems_only < both


def test_the_two_level_interval_is_as_wide_as_theory_says() -> None:
    """Without noise, the variance of the mean is var_seeds / S + var_problems / P, of the sample's own variances."""
    seeds, problems = np.linspace(-1, 1, 20)[:, None], np.linspace(-2, 2, 30)[None, :]
    found = bootstrap_seeds_and_problems(seeds + problems, num_resamples=20_000)
    deviation = math.sqrt(seeds.var() / 20 + problems.var() / 30)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(deviation, rel=0.03)
    assert found.num_units == 20


def test_one_seed_has_no_two_level_interval() -> None:
    assert not bootstrap_seeds_and_problems(np.array([[0.0, 1.0]])).is_known


def test_the_mean_of_sets_weighs_sets_and_not_problems() -> None:
    small, large = np.array([0.0, 1.0]), np.concatenate([np.zeros(300), np.ones(100)])
    found = bootstrap_mean_of_sets([small, large])
    assert found.mean == pytest.approx((0.5 + 0.25) / 2) and found.num_units == 402
    # the small set's mean is 0, 1/2 or 1 with odds 1/4, 1/2, 1/4; it rules the interval
    assert found.low == pytest.approx(0.125, abs=0.03) and found.high == pytest.approx(0.625, abs=0.03)


def test_sets_without_spread_add_none_to_their_mean() -> None:
    varied = np.random.default_rng(0).normal(0.5, 0.1, 200)
    found = bootstrap_mean_of_sets([varied, np.ones(10)], num_resamples=20_000)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(varied.std() / 200**0.5 / 2, rel=0.03)
    assert not bootstrap_mean_of_sets([np.ones(3), np.zeros(3)]).is_known


def test_the_permutation_test_by_hand() -> None:
    # all four differences are positive: of 2^4 = 16 flips only the observed one and its mirror are as extreme
    found = compare(np.array([3.0, 5.0, 4.0, 9.0]), np.array([1.0, 4.0, 1.0, 2.0]))
    assert found.p_value == pytest.approx(2 / 16)
    assert found.difference.mean == pytest.approx((2 + 1 + 3 + 7) / 4)


def test_ties_between_flips_count_as_extreme() -> None:
    # differences 0.1, 0.2, 0.3, -0.6: 0.1 + 0.2 + 0.3 == 0.6 only up to rounding; every flip with |sum| >= 0 counts
    theirs = np.zeros(4)
    assert compare(np.array([0.1, 0.2, 0.3, -0.6]), theirs).p_value == 1.0


def test_the_permutation_test_is_scipys_sign_flip_of_differences() -> None:
    generator = np.random.default_rng(4)
    ours, theirs = generator.normal(0.65, 0.1, 10), generator.normal(0.5, 0.1, 10)
    flipped = stats.permutation_test((ours - theirs,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert 0.001 < flipped.pvalue < 0.1
    assert compare(ours, theirs).p_value == pytest.approx(flipped.pvalue)


def test_equal_runs_do_not_differ() -> None:
    found = compare(np.array([0.5, 1.0]), np.array([0.5, 1.0]))
    assert found.p_value == 1.0 and found.difference.mean == 0.0


def test_runs_on_other_units_are_not_compared() -> None:
    with pytest.raises(ValueError, match="has 3, 2"):
        compare(np.zeros(3), np.zeros(2))


def test_pairing_finds_what_the_spread_of_problems_hides() -> None:
    problems = np.linspace(0, 1, 30)
    better = problems + 0.02 + 0.01 * np.sin(np.arange(30))
    assert compare(better, problems).p_value < 0.001
    assert stats.ttest_ind(better, problems).pvalue > 0.5


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.04 times 3, 2, 1 = 0.03, 0.04, 0.04; monotone from below
    assert holm({"b": 0.02, "a": 0.01, "c": 0.04}) == pytest.approx({"a": 0.03, "b": 0.04, "c": 0.04})
    assert holm({"a": 0.03, "b": 0.04}) == pytest.approx({"a": 0.06, "b": 0.06})
    assert holm({}) == {}


def test_seeds_for_an_effect_are_those_of_the_power_tables() -> None:
    # Cohen 1988: 64 in each of two groups for d = 0.5; 34 pairs for d = 0.5, at power 0.8 and alpha 0.05
    assert num_seeds_independent(0.5, 1.0) == 64
    assert num_seeds_paired(0.01, 0.02) == num_seeds_paired(-0.01, 0.02) == 34


def test_seeds_for_an_effect_are_enough_in_a_simulation() -> None:
    generator = np.random.default_rng(0)
    num_seeds = num_seeds_paired(0.02, 0.02)
    found = [stats.ttest_1samp(generator.normal(0.02, 0.02, size=num_seeds), 0).pvalue < 0.05 for _ in range(2000)]
    assert 0.77 <= np.mean(found) <= 0.88


def test_a_huge_effect_needs_two_or_three_seeds_and_a_tiny_one_too_many() -> None:
    assert num_seeds_independent(10.0, 0.1) == 2
    with pytest.raises(ValueError, match=f"more than {MAX_SEEDS}"):
        num_seeds_paired(1e-4, 1.0)
    with pytest.raises(ValueError, match="effect of 0"):
        num_seeds_paired(0.0, 1.0)
