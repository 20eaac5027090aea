"""Group-relative advantages from rewards; pure, and exactly 0 on groups whose rewards are all equal."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float


def group_advantages(
    rewards: Float[np.ndarray, "group sample"],
    std: Literal["sample", "population", "none"] = "sample",
    epsilon: float = 1e-6,
) -> Float[np.ndarray, "group sample"]:
    """Return (R - mean_group) / (std_group + epsilon), with 0/0 = 0.

    Args:
        std: `sample` divides by n - 1 under the root, `population` by n, `none` does not divide at all
            (Liu et al. 2025, arXiv:2503.20783).

    Reference: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    centred: np.ndarray = rewards - rewards.mean(axis=1, keepdims=True)
    # the mean of equal numbers can miss them by a rounding error, which the division would blow up to +-1
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    if std == "none":
        return centred
    # a group of one has no sample standard deviation, and its centred reward is 0 already
    ddof = 1 if std == "sample" and rewards.shape[1] > 1 else 0
    scale: np.ndarray = rewards.std(axis=1, keepdims=True, ddof=ddof)
    return np.asarray(centred / (scale + epsilon))
