"""The clipped policy-gradient term of one token.

Pure functions of log-probs and advantages; weights, masks and denominators are applied by the caller.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trace_rl.config.algorithm import PolicyGradient


def clipped_policy_loss(
    policy_logprobs: Float[Tensor, " row"],
    old_logprobs: Float[Tensor, " row"],
    advantages: Float[Tensor, " row"],
    settings: PolicyGradient,
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """Return -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(policy - old), and where it is clipped.

    With `dual_clip` = c the term is at most -c A where A < 0. Where the clipped branch is the smaller one the token has
    no gradient.

    Reference: Shao et al. 2024, arXiv:2402.03300, eq. 3; clip-higher: Yu et al. 2025, arXiv:2503.14476, eq. 10;
    dual clip: Ye et al. 2019, arXiv:1912.09729, eq. 5.
    """
    ratio = torch.exp(policy_logprobs - old_logprobs)
    free = ratio * advantages
    clipped = torch.clamp(ratio, 1 - settings.clip_low, 1 + settings.clip_high) * advantages
    surrogate = torch.minimum(free, clipped)
    is_clipped = clipped < free
    if settings.dual_clip is not None:
        floor = settings.dual_clip * advantages
        below = (advantages < 0) & (surrogate < floor)
        surrogate = torch.where(below, floor, surrogate)
        is_clipped = is_clipped | below
    return -surrogate, is_clipped
