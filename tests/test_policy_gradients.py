"""Policy-gradient terms: every branch by hand, where the gradient stops, and the correction for the sampler."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trace_rl.policy_gradients import (
    Cispo,
    Clipped,
    Gspo,
    NoPolicyGradient,
    PolicyGradient,
    PolicyRows,
    Reinforce,
    RolloutCorrection,
    SamplerRows,
    mismatch_statistics,
)

CLIP_HIGHER = Clipped(clip_low=0.2, clip_high=0.28)
DUAL = Clipped(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
EVERY = [CLIP_HIGHER, DUAL, Gspo(), Cispo(), Reinforce(), NoPolicyGradient()]
IDS = [f"{number}-{each.type}" for number, each in enumerate(EVERY)]


def rows_of(policy: Tensor, old: Tensor, advantages: list[float], lengths: list[int] | None = None) -> PolicyRows:
    lengths = lengths or [len(policy)]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return PolicyRows(policy, old, torch.tensor(advantages, dtype=policy.dtype), sequence, len(lengths))


def one_token(ratio: float, advantage: float, kind: PolicyGradient) -> tuple[float, bool, float]:
    """(loss, is clipped, d loss / d policy log-prob) of one token."""
    old = torch.tensor([-1.0], dtype=torch.float64)
    policy = (old + math.log(ratio)).requires_grad_()
    terms = kind.terms(rows_of(policy, old, [advantage]))
    terms.loss.sum().backward()
    assert policy.grad is not None
    return terms.loss.item(), bool(terms.is_clipped.item()), policy.grad.item()


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
    measured = one_token(ratio, advantage, CLIP_HIGHER)
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
    measured = one_token(ratio, advantage, DUAL)
    assert measured == (pytest.approx(loss, abs=1e-12), is_clipped, pytest.approx(gradient, abs=1e-12))


def test_gspo_by_hand() -> None:
    # Two completions of 2 and 1 tokens; token ratios 2 and 1/2 give s = 1, ratio 1.5 gives s = 1.5. With a clip of
    # 0.1: s = 1 is free, so each token has the gradient -s A = -1; s = 1.5 at A = 1 is clipped to 1.1, no gradient.
    old = torch.tensor([-1.0, -2.0, -1.0], dtype=torch.float64)
    policy = (old + torch.tensor([2.0, 0.5, 1.5], dtype=torch.float64).log()).requires_grad_()
    terms = Gspo(clip_low=0.1, clip_high=0.1).terms(rows_of(policy, old, [1.0, 1.0, 1.0], [2, 1]))
    terms.loss.sum().backward()
    assert terms.loss.tolist() == pytest.approx([-1.0, -1.0, -1.1], abs=1e-12)
    assert terms.is_clipped.tolist() == [False, False, True]
    assert policy.grad.tolist() == pytest.approx([-1.0, -1.0, 0.0], abs=1e-12)


def test_gspo_gradient_is_that_of_the_sequence_ratio() -> None:
    # d/d theta of -s A with s = exp(mean log r): -s A / |y| per token; the mean over the completion brings the 1/|y|.
    old = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    policy = (old + torch.tensor([0.1, -0.3, 0.15], dtype=torch.float64)).requires_grad_()
    direct = -(policy - old).mean().exp() * 0.7
    (expected,) = torch.autograd.grad(direct, policy)
    mean = Gspo(clip_low=0.5, clip_high=0.5).terms(rows_of(policy, old, [0.7] * 3)).loss.mean()
    (found,) = torch.autograd.grad(mean, policy)
    assert mean.item() == pytest.approx(direct.item(), abs=1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"), [(1.0, 2.0, 1.0), (1.5, 2.0, 1.28), (1.5, -2.0, 1.28), (0.1, 2.0, 0.1)]
)
def test_cispo_bounds_the_weight_and_keeps_the_gradient(ratio: float, advantage: float, weight: float) -> None:
    loss, is_clipped, gradient = one_token(ratio, advantage, Cispo())
    assert gradient == pytest.approx(-weight * advantage, abs=1e-12)
    assert loss == pytest.approx(-weight * advantage * (math.log(ratio) - 1), abs=1e-12)
    assert is_clipped == (ratio > 1.28)


def test_cispo_may_have_a_lower_bound() -> None:
    _, is_clipped, gradient = one_token(0.1, 2.0, Cispo(clip_low=0.5))
    assert gradient == pytest.approx(-0.5 * 2.0, abs=1e-12)
    assert is_clipped


@pytest.mark.parametrize("kind", EVERY, ids=IDS)
@pytest.mark.parametrize("gap", [100.0, 300.0, -300.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_ratios_beyond_all_measure_stay_finite(kind: PolicyGradient, gap: float, advantage: float) -> None:
    policy = torch.tensor([-1.0, -1.0], requires_grad=True)
    terms = kind.terms(rows_of(policy, torch.tensor([-1.0 - gap, -1.0]), [advantage, advantage]))
    terms.loss.sum().backward()
    assert torch.isfinite(terms.loss).all()
    assert torch.isfinite(policy.grad).all()


def test_reinforce_has_no_ratio() -> None:
    loss, is_clipped, gradient = one_token(3.0, 2.0, Reinforce())
    assert (loss, gradient) == (pytest.approx(-2 * (math.log(3) - 1)), -2.0)
    assert not is_clipped


def test_none_is_a_differentiable_zero() -> None:
    assert one_token(3.0, 2.0, NoPolicyGradient()) == (0.0, False, 0.0)


@pytest.mark.parametrize("kind", [each for each in EVERY if each.type != "none"], ids=lambda each: each.type)
def test_on_policy_every_kind_has_the_gradient_of_the_score_function(kind: PolicyGradient) -> None:
    policy = torch.tensor([-0.1, -3.0, -20.0], requires_grad=True)
    terms = kind.terms(rows_of(policy, policy.detach().clone(), [1.5, -0.5, 0.0], [2, 1]))
    terms.loss.sum().backward()
    assert policy.grad.tolist() == [-1.5, 0.5, 0.0]
    assert not terms.is_clipped.any()


@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_the_order_of_completions_does_not_matter(kind: PolicyGradient) -> None:
    generator = torch.Generator().manual_seed(0)
    policy, old, advantages = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    sequence = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    policy = (policy / 4 + old).requires_grad_()
    terms = kind.terms(PolicyRows(policy, old, advantages, sequence, 3))
    order = torch.tensor([5, 6, 7, 8, 0, 1, 2, 3, 4])
    moved = PolicyRows(policy[order], old[order], advantages[order], sequence[order], 3)
    torch.testing.assert_close(kind.terms(moved).loss, terms.loss[order], rtol=0, atol=1e-14)
    assert terms.loss.requires_grad


@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_no_tokens_give_no_terms(kind: PolicyGradient) -> None:
    nothing = torch.zeros(0, requires_grad=True)
    rows = PolicyRows(nothing, nothing.detach(), torch.zeros(0), torch.zeros(0, dtype=torch.long), 0)
    terms = kind.terms(rows)
    assert terms.loss.shape == terms.is_clipped.shape == (0,)
    terms.loss.sum().backward()


@pytest.mark.parametrize("kind", [CLIP_HIGHER, DUAL], ids=["clipped", "dual"])
def test_gradients_agree_with_finite_differences_away_from_the_corners(kind: PolicyGradient) -> None:
    old = torch.full((6,), -1.0, dtype=torch.float64)
    policy = old + torch.tensor([0.5, 0.9, 1.1, 1.5, 2.0, 4.0], dtype=torch.float64).log()

    def loss(policy: Tensor) -> Tensor:
        return kind.terms(rows_of(policy, old, [1.0, -1.0, 1.0, -1.0, 1.0, -1.0])).loss

    assert torch.autograd.gradcheck(loss, (policy.requires_grad_(),))


OLD = torch.tensor([0.5, 0.25, 0.4, 0.1], dtype=torch.float64).log()
SAMPLER = torch.tensor([0.25, 0.5, 0.1, 0.1], dtype=torch.float64).log()
"""Ratios 2, 1/2, 4, 1."""
SAMPLED = SamplerRows(OLD, SAMPLER, torch.tensor([False, True, True, True]), torch.tensor([0, 0, 1, 1]), 2)


@pytest.mark.parametrize(
    ("level", "weights"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0]),
        ("stale", [1.0, 0.5, 3.0, 1.0]),  # 2 belongs to a fresh token, 4 is cut at 3
        ("token", [2.0, 0.5, 3.0, 1.0]),  # 4 is cut at 3
        ("sequence", [1.0, 1.0, 3.0, 3.0]),  # products 1 and 4
    ],
)
def test_rollout_correction_by_hand(level: str, weights: list[float]) -> None:
    rows = replace(SAMPLED, old_logprobs=OLD.clone().requires_grad_())
    found, is_capped = RolloutCorrection(level=level, cap=3.0).weights(rows)
    assert is_capped.tolist() == [weight == 3.0 for weight in weights]
    assert found.tolist() == pytest.approx(weights, abs=1e-12)
    assert not found.requires_grad


def test_a_fresh_token_has_weight_one_whatever_the_sampler_says() -> None:
    for sampler in (SAMPLER, SAMPLER + 30, SAMPLER - 300):
        rows = replace(SAMPLED, rollout_logprobs=sampler)
        found, is_capped = RolloutCorrection(cap=1.0).weights(rows)
        assert (found[0], is_capped[0]) == (1.0, False)


def test_token_correction_makes_a_mismatched_sampler_unbiased() -> None:
    # Without a cut, sum over tokens of sampler x weight x f is sum of learner x f.
    learner, sampler = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.4, 0.6]).log()
    rows = SamplerRows(learner, sampler, torch.zeros(2, dtype=torch.bool), torch.arange(2), 2)
    weights, _ = RolloutCorrection(level="token", cap=100).weights(rows)
    torch.testing.assert_close(sampler.exp() * weights, learner.exp())


def test_mismatch_by_hand() -> None:
    # gaps log 2, -log 2, log 4, 0; k3 = r - 1 - log r: 1 - log 2, -1/2 + log 2, 3 - log 4, 0
    correction = RolloutCorrection(level="token", cap=3.0).weights(SAMPLED)
    found = {name: value.item() for name, value in mismatch_statistics(SAMPLED, *correction).items()}
    assert found == {
        "mismatch": pytest.approx(4 * math.log(2)),
        "mismatch_max": pytest.approx(2 * math.log(2)),
        "mismatch_k3": pytest.approx(3.5 - 2 * math.log(2)),
        "correction": pytest.approx(6.5),
        "correction_capped": 1.0,
        # the first token is fresh, the others are not
        "stale_tokens": 3.0,
        "fresh_mismatch": pytest.approx(math.log(2)),
        "fresh_mismatch_max": pytest.approx(math.log(2)),
        "fresh_mismatch_k3": pytest.approx(1 - math.log(2)),
        "fresh_correction": pytest.approx(2.0),
        "fresh_correction_capped": 0.0,
        "stale_mismatch": pytest.approx(3 * math.log(2)),
        "stale_mismatch_max": pytest.approx(2 * math.log(2)),
        "stale_mismatch_k3": pytest.approx(2.5 - math.log(2)),
        "stale_correction": pytest.approx(4.5),
        "stale_correction_capped": 1.0,
    }
    none = torch.zeros(0)
    nothing = SamplerRows(none, none, none.bool(), none.long(), 0)
    assert all(value == 0 for value in mismatch_statistics(nothing, none, none.bool()).values())


@pytest.mark.parametrize("level", ["none", "stale", "token", "sequence"])
def test_a_sampler_that_is_the_policy_is_never_capped(level: str) -> None:
    weights, is_capped = RolloutCorrection(level=level, cap=1.0).weights(replace(SAMPLED, rollout_logprobs=OLD))
    assert weights.tolist() == [1.0] * 4
    assert not is_capped.any()
