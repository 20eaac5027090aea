"""Divergences and their clips: gradients against closed forms and finite differences, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trace_rl.divergences import (
    Bounded,
    Full,
    KlClip,
    Sampled,
    TopK,
    bound,
    forward_terms,
    jensen_shannon_terms,
    reverse_terms,
)

Terms = Callable[[Tensor, Tensor], Tensor]

NONE = KlClip(mode="none")
CLAMP = KlClip(mode="vocab_clamp", threshold=0.05)
RESCALE = KlClip(mode="token_rescale", threshold=0.05)
DROP = KlClip(mode="token_clamp", threshold=0.05)

TEACHER = (0.60, 0.25, 0.10, 0.05)
POLICY = (0.05, 0.60, 0.25, 0.10)


def divergence(terms: Terms, policy: Tensor, teacher: Tensor, clip: KlClip) -> Bounded:
    return bound(terms(policy, teacher), clip)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def logit_gradient(action: Terms, policy: tuple[float, ...], teacher: tuple[float, ...], clip: KlClip) -> Tensor:
    """Gradient of the divergence of one position with respect to the policy's logits."""
    logits = logs(*policy).requires_grad_()
    divergence(action, torch.log_softmax(logits, -1), logs(*teacher), clip).loss.sum().backward()
    assert logits.grad is not None
    return logits.grad[0]


def random_pair(seed: int, vocab: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy, teacher = 2 * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    return policy, torch.log_softmax(teacher, -1)


def test_values_by_hand() -> None:
    # FKL: 1/2 log(1/2 / 4/5) + 1/2 log(1/2 / 1/5) = 1/2 log(25/16); RKL: 4/5 log(8/5) + 1/5 log(2/5)
    policy, teacher = logs(0.8, 0.2), logs(0.5, 0.5)
    forward = divergence(forward_terms, policy, teacher, NONE).loss
    reverse = divergence(reverse_terms, policy, teacher, NONE).loss
    assert forward.item() == pytest.approx(0.5 * math.log(25 / 16), abs=1e-12)
    assert reverse.item() == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4), abs=1e-12)


def test_terms_are_the_summands() -> None:
    forward = forward_terms(logs(*POLICY), logs(*TEACHER))[0]
    reverse = reverse_terms(logs(*POLICY), logs(*TEACHER))[0]
    assert forward.tolist() == pytest.approx([q * math.log(q / p) for p, q in zip(POLICY, TEACHER, strict=True)])
    assert reverse.tolist() == pytest.approx([p * math.log(p / q) for p, q in zip(POLICY, TEACHER, strict=True)])


def test_forward_kl_gradient_is_policy_minus_teacher() -> None:
    gradient = logit_gradient(forward_terms, POLICY, TEACHER, NONE)
    assert gradient.tolist() == pytest.approx([-0.55, 0.35, 0.15, 0.05], abs=1e-12)


def test_reverse_kl_gradient_by_hand() -> None:
    # p = (4/5, 1/5), q = (1/2, 1/2): KL = 0.192745; 4/5 (log 1.6 - KL) = 0.221807, and the two sum to 0
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    gradient = logit_gradient(reverse_terms, (0.8, 0.2), (0.5, 0.5), NONE)
    assert gradient.tolist() == pytest.approx([0.8 * (math.log(1.6) - kl), 0.2 * (math.log(0.4) - kl)], abs=1e-12)
    assert gradient[0].item() == pytest.approx(0.221807, abs=1e-6)


@pytest.mark.parametrize("vocab", [2, 7, 50])
@pytest.mark.parametrize("seed", range(3))
def test_unclipped_gradients_have_their_closed_forms(seed: int, vocab: int) -> None:
    logits, teacher = random_pair(seed, vocab, rows=4)
    p, q = torch.softmax(logits, -1), teacher.exp()
    kl = (p * (p / q).log()).sum(-1, keepdim=True)
    for action, expected in ((forward_terms, p - q), (reverse_terms, p * ((p / q).log() - kl))):
        leaf = logits.clone().requires_grad_()
        divergence(action, torch.log_softmax(leaf, -1), teacher, NONE).loss.sum().backward()
        torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [NONE, CLAMP], ids=lambda clip: clip.mode)
@pytest.mark.parametrize("action", [forward_terms, reverse_terms])
def test_gradients_agree_with_finite_differences(action: Terms, clip: KlClip) -> None:
    logits, teacher = random_pair(3, 6, rows=5)

    def loss(logits: Tensor) -> Tensor:
        return divergence(action, torch.log_softmax(logits, -1), teacher, clip).loss

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


@pytest.mark.parametrize("clip", [NONE, CLAMP, RESCALE, DROP], ids=lambda clip: clip.mode)
@pytest.mark.parametrize("action", [forward_terms, reverse_terms])
def test_a_teacher_that_is_the_policy_gives_exactly_zero(action: Terms, clip: KlClip) -> None:
    logits = random_pair(1, 50, rows=3)[0].float().requires_grad_()
    result = divergence(action, torch.log_softmax(logits, -1), torch.log_softmax(logits.detach(), -1), clip)
    result.loss.sum().backward()
    assert (result.loss == 0).all()
    assert not result.is_clipped.any()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def test_literal_clip_pushes_a_supported_token_down() -> None:
    # Terms q log(q/p): 0.6 log 12 = 1.49 is clipped, the others are negative. With the unclipped teacher mass 0.4:
    # 0.05 x 0.4 = 0.02; 0.6 x 0.4 - 0.25 = -0.01; 0.25 x 0.4 - 0.10 = 0; 0.10 x 0.4 - 0.05 = -0.01
    gradient = logit_gradient(forward_terms, POLICY, TEACHER, CLAMP)
    assert gradient.tolist() == pytest.approx([0.02, -0.01, 0.0, -0.01], abs=1e-12)


def test_vocab_clamp_turns_the_gradient_around_at_a_mild_gap_too() -> None:
    # 0.55 log(1.1) = 0.0524 > 0.05; unclipped teacher mass 0.45: 0.5 x 0.45 = 0.225; 0.33 x 0.45 - 0.30 = -0.1515;
    # 0.11 x 0.45 - 0.10 = -0.0505; 0.06 x 0.45 - 0.05 = -0.023
    policy, teacher = (0.50, 0.33, 0.11, 0.06), (0.55, 0.30, 0.10, 0.05)
    unclipped = logit_gradient(forward_terms, policy, teacher, NONE)
    assert unclipped.tolist() == pytest.approx([-0.05, 0.03, 0.01, 0.01], abs=1e-12)
    gradient = logit_gradient(forward_terms, policy, teacher, CLAMP)
    assert gradient.tolist() == pytest.approx([0.225, -0.1515, -0.0505, -0.023], abs=1e-12)


def test_vocab_clamp_of_the_reverse_kl_keeps_the_terms_that_are_left() -> None:
    # gradient_u = c_u [u unclipped] - p_u sum of unclipped c, with c = p (log(p/q) + 1)
    coupled = [p * (math.log(p / q) + 1) for p, q in zip(POLICY, TEACHER, strict=True)]
    is_free = [p * math.log(p / q) <= 0.05 for p, q in zip(POLICY, TEACHER, strict=True)]
    assert is_free == [True, False, False, False]  # 0.6 log 2.4, 0.25 log 2.5 and 0.1 log 2 = 0.069 are clipped
    left = sum(c for c, free in zip(coupled, is_free, strict=True) if free)
    expected = [c * free - p * left for c, free, p in zip(coupled, is_free, POLICY, strict=True)]
    assert logit_gradient(reverse_terms, POLICY, TEACHER, CLAMP).tolist() == pytest.approx(expected, abs=1e-12)


def test_vocab_clamp_bounds_each_term_and_names_the_clipped_ones() -> None:
    result = divergence(forward_terms, logs(*POLICY), logs(*TEACHER), CLAMP)
    below = sum(q * math.log(q / p) for p, q in list(zip(POLICY, TEACHER, strict=True))[1:])
    assert result.loss.item() == pytest.approx(0.05 + below, abs=1e-12)
    assert result.unclipped.item() == pytest.approx(0.6 * math.log(12) + below, abs=1e-12)
    assert result.is_clipped.tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("action", [forward_terms, reverse_terms])
def test_token_rescale_bounds_the_position_and_keeps_the_direction(action: Terms) -> None:
    result = divergence(action, logs(*POLICY), logs(*TEACHER), RESCALE)
    assert result.loss.item() == pytest.approx(0.05, abs=1e-12)
    assert result.unclipped.item() > 0.05
    assert result.is_clipped.all()
    free = logit_gradient(action, POLICY, TEACHER, NONE)
    bounded = logit_gradient(action, POLICY, TEACHER, RESCALE)
    torch.testing.assert_close(bounded, free * (0.05 / result.unclipped.item()), rtol=0, atol=1e-12)


@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 40), threshold=st.floats(1e-3, 5.0))
@settings(max_examples=50, deadline=None)
def test_token_rescale_never_leaves_its_bound_or_its_direction(seed: int, vocab: int, threshold: float) -> None:
    logits, teacher = random_pair(seed, vocab)
    clip = KlClip(mode="token_rescale", threshold=threshold)
    for action in (forward_terms, reverse_terms):
        free_leaf, leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        divergence(action, torch.log_softmax(free_leaf, -1), teacher, NONE).loss.sum().backward()
        result = divergence(action, torch.log_softmax(leaf, -1), teacher, clip)
        result.loss.sum().backward()
        assert -1e-12 <= result.loss.item() <= threshold * (1 + 1e-12)
        assert torch.nn.functional.cosine_similarity(leaf.grad, free_leaf.grad).item() == pytest.approx(1.0, abs=1e-9)


def test_inside_the_bound_token_rescale_changes_nothing() -> None:
    # KL of these two is about 0.004
    policy, teacher = logs(0.50, 0.30, 0.20), logs(0.54, 0.27, 0.19)
    result = divergence(forward_terms, policy, teacher, RESCALE)
    assert torch.equal(result.loss, divergence(forward_terms, policy, teacher, NONE).loss)
    assert not result.is_clipped.any()


def test_metrics_carry_no_gradient() -> None:
    logits, teacher = random_pair(0, 5)
    result = divergence(forward_terms, torch.log_softmax(logits.requires_grad_(), -1), teacher, CLAMP)
    assert result.loss.requires_grad
    assert not result.unclipped.requires_grad
    assert not result.is_clipped.requires_grad


@pytest.mark.parametrize("clip", [NONE, CLAMP, RESCALE, DROP], ids=lambda clip: clip.mode)
@pytest.mark.parametrize("action", [forward_terms, reverse_terms])
def test_probabilities_that_underflow_stay_finite(action: Terms, clip: KlClip) -> None:
    logits = torch.tensor([[0.0, -1000.0, 500.0]], requires_grad=True)
    teacher = torch.log_softmax(torch.tensor([[900.0, 0.0, -900.0]]), -1)
    result = divergence(action, torch.log_softmax(logits, -1), teacher, clip)
    result.loss.sum().backward()
    assert torch.isfinite(result.loss).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_token_clamp_drops_positions_above_the_bound() -> None:
    result = divergence(forward_terms, logs(*POLICY), logs(*TEACHER), DROP)
    assert result.loss.item() == pytest.approx(0.05, abs=1e-12)
    assert result.is_clipped.all()
    assert (logit_gradient(forward_terms, POLICY, TEACHER, DROP) == 0).all()
    near = (0.58, 0.26, 0.11, 0.05)
    free = logit_gradient(forward_terms, near, TEACHER, NONE)
    assert torch.equal(logit_gradient(forward_terms, near, TEACHER, DROP), free)


def test_jensen_shannon_by_hand() -> None:
    # p = (4/5, 1/5), q = (1/2, 1/2), beta = 1/2: m = (0.65, 0.35)
    kl_q = 0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.5 / 0.35)
    kl_p = 0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35)
    value = jensen_shannon_terms(logs(0.8, 0.2), logs(0.5, 0.5), 0.5).sum().item()
    assert value == pytest.approx(0.5 * kl_q + 0.5 * kl_p, abs=1e-12)
    # beta = 1/4: m = 1/4 q + 3/4 p = (0.725, 0.275), and the teacher's KL has weight 1/4
    kl_q = 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275)
    kl_p = 0.8 * math.log(0.8 / 0.725) + 0.2 * math.log(0.2 / 0.275)
    value = jensen_shannon_terms(logs(0.8, 0.2), logs(0.5, 0.5), 0.25).sum().item()
    assert value == pytest.approx(0.25 * kl_q + 0.75 * kl_p, abs=1e-12)


def test_jensen_shannon_gradient_agrees_with_finite_differences() -> None:
    logits, teacher = random_pair(4, 6, rows=3)

    def loss(logits: Tensor) -> Tensor:
        return jensen_shannon_terms(torch.log_softmax(logits, -1), teacher, 0.3).sum(-1)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


def test_top_k_by_hand() -> None:
    # The student's top 2 are entries 1 and 2 with (0.60, 0.25); the teacher has (0.25, 0.10) there. Tails: 0.15, 0.65.
    bucket = TopK(k=2, by="student", tail="bucket").reduce(logs(*POLICY), logs(*TEACHER))
    assert bucket.policy.exp()[0].tolist() == pytest.approx([0.60, 0.25, 0.15], abs=1e-12)
    assert bucket.teacher.exp()[0].tolist() == pytest.approx([0.25, 0.10, 0.65], abs=1e-12)
    renormalised = TopK(k=2, by="student", tail="renormalise").reduce(logs(*POLICY), logs(*TEACHER))
    assert renormalised.policy.exp()[0].tolist() == pytest.approx([0.60 / 0.85, 0.25 / 0.85], abs=1e-12)
    assert renormalised.teacher.exp()[0].tolist() == pytest.approx([0.25 / 0.35, 0.10 / 0.35], abs=1e-12)


def test_a_union_counts_shared_tokens_once() -> None:
    # Student's top 2: entries 1, 2; teacher's: 0, 1. Entry 1 is shared, and its second place is empty.
    outcomes = TopK(k=2, by="union", tail="bucket").reduce(logs(*POLICY), logs(*TEACHER))
    assert outcomes.policy.exp()[0].tolist() == pytest.approx([0.60, 0.25, 0.05, 0.0, 0.10], abs=1e-12)
    assert outcomes.teacher.exp()[0].tolist() == pytest.approx([0.25, 0.10, 0.60, 0.0, 0.05], abs=1e-12)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 30), by=st.sampled_from(["student", "teacher", "union"]))
@settings(max_examples=60, deadline=None)
def test_a_top_k_with_its_tail_is_a_divergence_below_the_full_one(seed: int, k: int, by: str) -> None:
    logits, teacher = random_pair(seed, 20, rows=3)
    policy = torch.log_softmax(logits, -1)
    for terms in (forward_terms, reverse_terms, lambda p, q: jensen_shannon_terms(p, q, 0.5)):
        outcomes = TopK(k=k, by=by, tail="bucket").reduce(policy, teacher)
        value, full = terms(outcomes.policy, outcomes.teacher).sum(-1), terms(policy, teacher).sum(-1)
        assert (value >= -1e-12).all()
        assert (value <= full + 1e-9).all()
        renormalised = TopK(k=k, by=by, tail="renormalise").reduce(policy, teacher)
        assert (terms(renormalised.policy, renormalised.teacher).sum(-1) >= -1e-12).all()


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_at_least_the_whole_vocabulary_is_the_full_divergence(tail: str) -> None:
    logits, teacher = random_pair(0, 8)
    outcomes = TopK(k=8, tail=tail).reduce(torch.log_softmax(logits, -1), teacher)
    full = Full().reduce(torch.log_softmax(logits, -1), teacher)
    assert torch.equal(outcomes.policy, full.policy)
    assert torch.equal(outcomes.teacher, full.teacher)


def test_a_top_k_without_its_tail_can_be_negative() -> None:
    # What is refused to exist here: the bare sum over the student's top 2 of q log(q/p).
    bare = forward_terms(logs(*POLICY), logs(*TEACHER))[0, 1:3].sum().item()
    assert bare == pytest.approx(0.25 * math.log(0.25 / 0.60) + 0.10 * math.log(0.10 / 0.25), abs=1e-12)
    assert bare < -0.3


@pytest.mark.parametrize("by", ["student", "teacher", "union"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_top_k_gradients_agree_with_finite_differences(by: str, tail: str) -> None:
    logits, teacher = random_pair(11, 9, rows=4)
    support = TopK(k=3, by=by, tail=tail)

    def loss(logits: Tensor) -> Tensor:
        outcomes = support.reduce(torch.log_softmax(logits, -1), teacher)
        return forward_terms(outcomes.policy, outcomes.teacher).sum(-1)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


def test_a_tail_without_mass_stays_finite() -> None:
    # In float32 the other entries hold exp(-200): 1 - sum of the kept ones would be 0, and its log minus infinity.
    logits = torch.tensor([[0.0, 0.0, -200.0, -210.0]], requires_grad=True)
    outcomes = TopK(k=2, by="teacher", tail="bucket").reduce(
        torch.log_softmax(logits, -1), torch.log_softmax(torch.tensor([[1.0, 0.0, -190.0, -220.0]]), -1)
    )
    loss = forward_terms(outcomes.policy, outcomes.teacher).sum()
    loss.backward()
    assert outcomes.policy[0, 2].item() == pytest.approx(-200 - math.log(2), abs=1e-3)
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_sampled_has_nothing_to_sum_over() -> None:
    with pytest.raises(ValueError, match="no outcomes to sum over"):
        Sampled().reduce(logs(*POLICY), logs(*TEACHER))
