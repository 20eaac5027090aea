"""What a completion's reward is compared with: the advantage of every completion of a batch.

Must not know tokens, policies or losses.

Invariants: a completion whose comparison shows no difference has exactly 0; the result does not depend on the order of
groups or of completions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from trace_rl.config.base import Kind

Rewards = Float[np.ndarray, " sample"]


class Advantage(Kind):
    """Advantages of the completions of a batch, by prompt."""

    @abstractmethod
    def advantages(self, groups: Sequence[Rewards]) -> list[Rewards]:
        """The advantages, in the order of the rewards.

        Args:
            groups: the rewards of all completions of each prompt; groups may differ in size.
        """


class GroupAdvantage(Advantage):
    """(R - mean_group) / (std_group + epsilon), with 0/0 = 0 (GRPO, arXiv:2402.03300, section 4.1.2)."""

    type: Literal["group"] = "group"
    std: Literal["sample", "population", "none"] = "sample"
    """`sample` divides by n - 1 under the root, `population` by n, `none` does not divide at all (Dr. GRPO,
    arXiv:2503.20783)."""
    epsilon: float = Field(1e-6, gt=0)
    """Added to the standard deviation."""

    def advantages(self, groups: Sequence[Rewards]) -> list[Rewards]:
        return [self._of_group(rewards) for rewards in groups]

    def _of_group(self, rewards: Rewards) -> Rewards:
        centred = _centred(rewards)
        if self.std == "none":
            return centred
        # a group of one has no sample standard deviation, and its centred reward is 0 already
        ddof = 1 if self.std == "sample" and len(rewards) > 1 else 0
        return np.asarray(centred / (rewards.std(ddof=ddof) + self.epsilon))


class LeaveOneOut(Advantage):
    """R_i - mean_{j != i} R_j = n / (n - 1) (R_i - mean) (RLOO, arXiv:2402.14740); 0 in a group of one."""

    type: Literal["leave_one_out"] = "leave_one_out"

    def advantages(self, groups: Sequence[Rewards]) -> list[Rewards]:
        return [_centred(rewards) * (len(rewards) / max(len(rewards) - 1, 1)) for rewards in groups]


class Whitened(Advantage):
    """(x - mean_batch(x)) / (std_batch(x) + epsilon) with x the reward, or its distance from the group's mean.

    Reference: REINFORCE++ and, with baseline `group_mean`, REINFORCE++-baseline, arXiv:2501.03262. Every completion
    counts once, and the variance has n in the denominator. Public codes whiten over tokens, so that long completions
    count more, and differ in the denominator and in where epsilon stands.
    """

    type: Literal["whitened"] = "whitened"
    baseline: Literal["none", "group_mean"] = "none"
    """What is subtracted before whitening. With `group_mean` groups of equal rewards have exactly 0, because the mean
    over the batch is then 0."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the standard deviation."""

    def advantages(self, groups: Sequence[Rewards]) -> list[Rewards]:
        values = [_centred(rewards) if self.baseline == "group_mean" else rewards for rewards in groups]
        flat = np.concatenate([np.zeros(0), *values])
        if not flat.size or np.ptp(flat) == 0:
            return [np.zeros(len(rewards)) for rewards in groups]
        # group means were subtracted already, and what is left of their sum is rounding
        mean = 0.0 if self.baseline == "group_mean" else flat.mean()
        return [np.asarray((value - mean) / (flat.std() + self.epsilon)) for value in values]


class NoAdvantage(Advantage):
    """0 for every completion: for methods whose policy gradient lives on what routes add to the advantage."""

    type: Literal["none"] = "none"

    def advantages(self, groups: Sequence[Rewards]) -> list[Rewards]:
        return [np.zeros(len(rewards)) for rewards in groups]


def _centred(rewards: Rewards) -> Rewards:
    """R - mean. The mean of equal numbers can miss them by a rounding error, which a division would blow up to +-1."""
    return np.zeros(len(rewards)) if not len(rewards) or np.ptp(rewards) == 0 else rewards - rewards.mean()
