"""Advantages: worked numbers, and exact zeros where a comparison says nothing."""

import numpy as np
import pytest

from trace_rl.advantages import Advantage, GroupAdvantage, LeaveOneOut, NoAdvantage, Whitened

# Rewards 1, 0, 0, 0: mean 1/4, centred (3/4, -1/4, -1/4, -1/4), squares sum to 9/16 + 3/16 = 3/4.
REWARDS = np.array([1.0, 0.0, 0.0, 0.0])
EVERY = [GroupAdvantage(), GroupAdvantage(std="population"), GroupAdvantage(std="none"), LeaveOneOut(), Whitened()]
EVERY = [*EVERY, Whitened(baseline="group_mean"), NoAdvantage()]
IDS = [f"{number}-{advantage.type}" for number, advantage in enumerate(EVERY)]


@pytest.mark.parametrize(
    ("std", "expected"),
    [
        ("sample", (1.5, -0.5)),  # sqrt(3/4 / 3) = 1/2
        ("population", (np.sqrt(3), -1 / np.sqrt(3))),  # sqrt(3/4 / 4) = sqrt(3)/4
        ("none", (0.75, -0.25)),
    ],
)
def test_one_correct_answer_of_four(std: str, expected: tuple[float, float]) -> None:
    right, wrong = expected
    (found,) = GroupAdvantage(std=std).advantages([REWARDS])
    assert found == pytest.approx([right, wrong, wrong, wrong], abs=5e-6)


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    # 3/4 / (1/2 + 1/4) = 1
    assert GroupAdvantage(epsilon=0.25).advantages([REWARDS])[0][0] == pytest.approx(1.0, abs=1e-12)


def test_leave_one_out_by_hand() -> None:
    # 1 - 0 against the mean of the others, 0; 0 - 1/3 for each wrong one: 4/3 of the centred rewards
    assert LeaveOneOut().advantages([REWARDS])[0] == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3], abs=1e-12)
    # 0.2 - 0.9 and 0.9 - 0.2
    assert LeaveOneOut().advantages([np.array([0.2, 0.9])])[0] == pytest.approx([-0.7, 0.7], abs=1e-12)


def test_whitened_over_the_batch_by_hand() -> None:
    # 1, 0 | 1, 1: mean 3/4, variance (3 x 1/16 + 9/16) / 4 = 3/16; (1/4) / sqrt(3/16) = 1/sqrt 3
    first, second = Whitened().advantages([np.array([1.0, 0.0]), np.array([1.0, 1.0])])
    root = np.sqrt(3)
    assert first == pytest.approx([1 / root, -root], abs=1e-6)
    assert second == pytest.approx([1 / root, 1 / root], abs=1e-6)


def test_whitened_against_the_group_by_hand() -> None:
    # centred: 1/2, -1/2 | 0, 0: variance (1/4 + 1/4) / 4 = 1/8; (1/2) sqrt 8 = sqrt 2
    first, second = Whitened(baseline="group_mean").advantages([np.array([1.0, 0.0]), np.array([1.0, 1.0])])
    assert first == pytest.approx([np.sqrt(2), -np.sqrt(2)], abs=1e-6)
    assert (second == 0.0).all()


@pytest.mark.parametrize("advantage", EVERY, ids=IDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [1, 3, 6, 7])
def test_a_batch_of_equal_rewards_gives_exactly_zero(advantage: Advantage, value: float, size: int) -> None:
    # The mean of three times 0.1 is not 0.1 in floating point; divided by epsilon the difference would be visible.
    # A group of one (its other rollouts were lost) has no sample standard deviation, and nothing to compare with.
    assert all((found == 0.0).all() for found in advantage.advantages([np.full(size, value)] * 3))


@pytest.mark.parametrize("advantage", [each for each in EVERY if each.type != "whitened"], ids=lambda each: each.type)
def test_groups_do_not_see_each_other(advantage: Advantage) -> None:
    groups = [REWARDS, np.ones(4), np.array([0.5, 0.0, 1.0])]
    together = advantage.advantages(groups)
    for group, found in zip(groups, together, strict=True):
        assert np.array_equal(advantage.advantages([group])[0], found)


@pytest.mark.parametrize("advantage", EVERY, ids=IDS)
def test_order_does_not_matter_and_a_shift_is_ignored(advantage: Advantage) -> None:
    groups = [np.array([0.0, 1.0, 0.25, 1.0, 0.0]), np.array([1.0, 1.0, 0.0])]
    found = advantage.advantages(groups)
    turned = advantage.advantages([group[::-1] for group in groups[::-1]])[::-1]
    shifted = advantage.advantages([group + 3 for group in groups])
    for here, there, above in zip(found, turned, shifted, strict=True):
        assert there[::-1] == pytest.approx(here, abs=1e-12)
        assert above == pytest.approx(here, abs=1e-9)


@pytest.mark.parametrize("advantage", EVERY, ids=IDS)
def test_nothing_in_nothing_out(advantage: Advantage) -> None:
    assert advantage.advantages([]) == []
