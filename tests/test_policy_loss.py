"""The clipped policy-gradient term: every branch of the clip by hand, and where the gradient stops."""

import math

import pytest
import torch
from torch import Tensor

from trace_rl.config.algorithm import PolicyGradient
from trace_rl.policy_loss import clipped_policy_loss

CLIP_HIGHER = PolicyGradient(clip_low=0.2, clip_high=0.28)
DUAL = PolicyGradient(clip_low=0.2, clip_high=0.28, dual_clip=3.0)


def term(ratio: float, advantage: float, settings: PolicyGradient = CLIP_HIGHER) -> tuple[float, bool, float]:
    """(loss, is clipped, d loss / d policy log-prob) of one token."""
    old = torch.tensor([-1.0], dtype=torch.float64)
    policy = (old + math.log(ratio)).requires_grad_()
    loss, is_clipped = clipped_policy_loss(policy, old, torch.tensor([advantage], dtype=torch.float64), settings)
    loss.sum().backward()
    assert policy.grad is not None
    return loss.item(), bool(is_clipped.item()), policy.grad.item()


# d/d log p of -r A is -r A itself where nothing is clipped, and 0 where the clipped branch counts.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (0.5, 2.0, -1.0, False),  # min(0.5, 0.8) x 2: going back up is free
        (1.27, 2.0, -2.54, False),
        (1.5, 2.0, -2.56, True),  # clip-higher: at most 1.28
        (1.0, -2.0, 2.0, False),
        (0.81, -2.0, 1.62, False),
        (0.5, -2.0, 1.6, True),  # at least 0.8
        (1.5, -2.0, 3.0, False),  # min(-3, -2.56): going back down is free
        (5.0, -2.0, 10.0, False),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_clip_higher_by_hand(ratio: float, advantage: float, loss: float, is_clipped: bool) -> None:
    gradient = 0.0 if is_clipped else loss
    measured = term(ratio, advantage)
    assert measured == (pytest.approx(loss, abs=1e-12), is_clipped, pytest.approx(gradient, abs=1e-12))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (2.9, -2.0, 5.8, False),
        (5.0, -2.0, 6.0, True),  # at most 3 |A|
        (0.5, -2.0, 1.6, True),
        (5.0, 2.0, -2.56, True),  # positive advantages know no dual clip
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, is_clipped: bool) -> None:
    gradient = 0.0 if is_clipped else loss
    measured = term(ratio, advantage, DUAL)
    assert measured == (pytest.approx(loss, abs=1e-12), is_clipped, pytest.approx(gradient, abs=1e-12))


def test_on_policy_the_gradient_is_minus_the_advantage_exactly() -> None:
    # The first step after sampling: ratio 1 for every token, whatever its log-prob.
    policy = torch.tensor([-0.1, -3.0, -20.0], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5, 0.0])
    loss, is_clipped = clipped_policy_loss(policy, policy.detach(), advantages, DUAL)
    loss.sum().backward()
    assert torch.equal(loss, -advantages)
    assert torch.equal(policy.grad, -advantages)
    assert not is_clipped.any()


def test_gradients_agree_with_finite_differences_away_from_the_corners() -> None:
    old = torch.full((6,), -1.0, dtype=torch.float64)
    policy = old + torch.tensor([0.5, 0.9, 1.1, 1.5, 2.0, 4.0], dtype=torch.float64).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)

    def loss(policy: Tensor) -> Tensor:
        return clipped_policy_loss(policy, old, advantages, DUAL)[0]

    assert torch.autograd.gradcheck(loss, (policy.requires_grad_(),))


def test_no_tokens_give_no_terms() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    loss, is_clipped = clipped_policy_loss(nothing, nothing.detach(), torch.zeros(0), CLIP_HIGHER)
    assert loss.shape == is_clipped.shape == (0,)
    loss.sum().backward()
