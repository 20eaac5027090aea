"""Group-relative advantages: worked numbers, and exact zeros where a group says nothing."""

import numpy as np
import pytest

from trace_rl.advantages import group_advantages

# Rewards 1, 0, 0, 0: mean 1/4, centred (3/4, -1/4, -1/4, -1/4), squares sum to 9/16 + 3/16 = 3/4.
REWARDS = np.array([[1.0, 0.0, 0.0, 0.0]])


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
    assert group_advantages(REWARDS, std)[0] == pytest.approx([right, wrong, wrong, wrong], abs=5e-6)


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    # 3/4 / (1/2 + 1/4) = 1
    assert group_advantages(REWARDS, "sample", epsilon=0.25)[0, 0] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("std", ["sample", "population", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("size", [1, 3, 6, 7])
def test_equal_rewards_give_exactly_zero(std: str, value: float, size: int) -> None:
    # The mean of three times 0.1 is not 0.1 in floating point; divided by epsilon the difference would be visible.
    # A group of one (its other rollouts were lost) has no sample standard deviation, and nothing to compare with.
    assert (group_advantages(np.full((1, size), value), std) == 0.0).all()


def test_groups_do_not_see_each_other() -> None:
    together = group_advantages(np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.0, 1.0, 1.0]]))
    alone = [group_advantages(np.array([row])) for row in ([1.0, 0, 0, 0], [1.0, 1, 1, 1], [0.5, 0, 1, 1])]
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("std", ["sample", "population", "none"])
def test_advantages_sum_to_zero_and_ignore_a_shift_and_the_order(std: str) -> None:
    rewards = np.array([[0.0, 1.0, 0.25, 1.0, 0.0]])
    advantages = group_advantages(rewards, std)
    assert advantages.sum() == pytest.approx(0.0, abs=1e-12)
    assert group_advantages(rewards + 3.0, std) == pytest.approx(advantages, abs=1e-9)
    assert group_advantages(rewards[:, ::-1], std) == pytest.approx(advantages[:, ::-1], abs=1e-12)
