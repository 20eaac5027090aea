"""Actions that add a term: values, gradients, estimators whose mean is exact, and what they must not touch."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from trace_rl.actions import Action, RoutedRows, RowAction
from trace_rl.divergences import KlClip, TopK
from trace_rl.row_actions import Fkl, Jsd, Nll, Rkl

NONE = KlClip(mode="none")
ACTIONS = [
    Fkl(clip=NONE),
    Rkl(clip=NONE),
    Jsd(clip=NONE),
    Fkl(),
    Rkl(clip=KlClip(mode="vocab_clamp")),
    Jsd(beta=0.2, support=TopK(k=3, by="union"), clip=KlClip(mode="token_clamp")),
    Fkl(support=TopK(k=3, tail="renormalise")),
    Rkl(support="sampled", clip=NONE),
    Fkl(support="sampled", clip=NONE),
]
IDS = [f"{number}-{action.type}" for number, action in enumerate(ACTIONS)]


def make_rows(num_rows: int = 6, vocab: int = 7, temperature: float = 1.0, seed: int = 0) -> RoutedRows:
    generator = torch.Generator().manual_seed(seed)
    policy, teacher = 1.5 * torch.randn(2, num_rows, vocab, generator=generator, dtype=torch.float64)
    return RoutedRows(
        policy_logits=policy.requires_grad_(),
        teacher_logits=teacher,
        targets=torch.randint(vocab, (num_rows,), generator=generator),
        temperature=temperature,
        ratio=torch.rand(num_rows, generator=generator, dtype=torch.float64) * 4,
    )


def gradient(action: RowAction, rows: RoutedRows) -> Tensor:
    fresh = replace(rows)  # rows keep their log-probs, and a graph is good for one backward pass
    (found,) = torch.autograd.grad(action.terms(fresh).loss.sum(), rows.policy_logits)
    return found


def both(rows: RoutedRows) -> tuple[Tensor, Tensor]:
    """Probabilities of policy and teacher at the rows' temperature."""
    return (rows.policy_logits.detach() / rows.temperature).softmax(-1), (
        rows.teacher_logits / rows.temperature
    ).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_and_gradients_have_their_closed_forms(temperature: float) -> None:
    # with T the gradient per logit is 1/T times that of the softmax, and there is no factor T^2
    rows = make_rows(temperature=temperature)
    p, q = both(rows)
    forward, reverse = (q * (q / p).log()).sum(-1), (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(Fkl(clip=NONE).terms(rows).loss.detach(), forward)
    torch.testing.assert_close(Rkl(clip=NONE).terms(rows).loss.detach(), reverse)
    torch.testing.assert_close(gradient(Fkl(clip=NONE), rows), (p - q) / temperature)
    expected = p * ((p / q).log() - reverse.unsqueeze(-1)) / temperature
    torch.testing.assert_close(gradient(Rkl(clip=NONE), rows), expected)
    picked = p.gather(-1, rows.targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(Nll().terms(rows).loss.detach(), -picked.log())


def test_the_endpoints_of_the_jensen_shannon_divergence_are_the_two_kls() -> None:
    rows = make_rows()
    assert torch.equal(Jsd(beta=0.0).terms(rows).loss, Fkl().terms(rows).loss)
    assert torch.equal(Jsd(beta=1.0).terms(rows).loss, Rkl().terms(rows).loss)
    # next to them it vanishes instead of converging, which is why they are special
    assert Jsd(beta=1e-6, clip=NONE).terms(rows).loss.max() < 1e-4
    assert Fkl(clip=NONE).terms(rows).loss.min() > 1e-2


def test_the_middle_is_symmetric() -> None:
    rows = make_rows()
    swapped = RoutedRows(rows.teacher_logits, rows.policy_logits.detach(), rows.targets, 1.0, rows.ratio)
    there, back = (Jsd(clip=NONE).terms(each).loss.detach() for each in (rows, swapped))
    torch.testing.assert_close(there, back)
    assert (there <= math.log(2)).all()


@pytest.mark.parametrize("action", [Fkl(support="sampled", clip=NONE), Rkl(support="sampled", clip=NONE)])
def test_estimators_from_sampled_tokens_are_exact_on_average(action: RowAction) -> None:
    # One position, every token once, weighted with its probability under the policy (detached).
    logits = make_rows(1).policy_logits.detach()
    teacher, vocab = make_rows(1).teacher_logits, logits.shape[-1]
    p = logits.softmax(-1)[0]
    rows = RoutedRows(
        logits.expand(vocab, vocab).clone().requires_grad_(),
        teacher.expand(vocab, vocab),
        torch.arange(vocab),
        1.0,
        torch.ones(vocab, dtype=torch.float64),
    )
    terms = action.terms(rows)
    exact_rows = make_rows(1)
    exact = type(action)(clip=NONE)
    assert (p * terms.unclipped).sum().item() == pytest.approx(exact.terms(exact_rows).unclipped.item(), abs=1e-12)
    assert (p * terms.loss.detach()).sum().item() == pytest.approx(exact.terms(exact_rows).loss.item(), abs=1e-12)
    (found,) = torch.autograd.grad((p * terms.loss).sum(), rows.policy_logits)
    torch.testing.assert_close(found.sum(0), gradient(exact, exact_rows)[0], rtol=0, atol=1e-12)


def test_the_sampled_forward_estimate_is_never_negative() -> None:
    assert (Fkl(support="sampled", clip=NONE).terms(make_rows(200)).unclipped >= 0).all()


def test_a_rescaled_estimate_keeps_its_direction() -> None:
    rows = make_rows(20)
    free, bounded = Rkl(support="sampled", clip=NONE), Rkl(support="sampled")
    terms = bounded.terms(rows)
    assert (terms.loss <= 0.05 + 1e-12).all()
    scale = (terms.loss / free.terms(rows).loss).detach()
    torch.testing.assert_close(gradient(bounded, rows), gradient(free, rows) * scale.unsqueeze(-1))
    assert 0 < terms.num_clipped_terms.sum() < len(terms.loss)


def test_sampled_jensen_shannon_is_refused() -> None:
    with pytest.raises(ValidationError, match="no estimator from the sampled token; choose support full or topk"):
        Jsd(support="sampled")


@pytest.mark.parametrize("action", ACTIONS, ids=IDS)
def test_a_teacher_that_is_the_policy_gives_nothing(action: RowAction) -> None:
    rows = make_rows()
    same = RoutedRows(rows.policy_logits, rows.policy_logits.detach().clone(), rows.targets, 1.3, rows.ratio)
    terms = action.terms(same)
    assert terms.loss.abs().max() < 1e-12
    assert gradient(action, same).abs().max() < 1e-12
    assert not terms.num_clipped_terms.any()
    assert (terms.clipped_teacher_mass == 0).all()


@pytest.mark.parametrize("action", [*ACTIONS, Nll()], ids=[*IDS, "nll"])
def test_rows_are_computed_each_for_itself_and_the_teacher_gets_no_gradient(action: RowAction) -> None:
    rows = make_rows()
    rows.teacher_logits.requires_grad_()
    whole = action.terms(rows)
    whole.loss.sum().backward()
    assert rows.teacher_logits.grad is None
    for row in range(len(rows.targets)):
        part = slice(row, row + 1)
        alone = action.terms(
            RoutedRows(rows.policy_logits[part], rows.teacher_logits[part], rows.targets[part], 1.0, rows.ratio[part])
        )
        torch.testing.assert_close(alone.loss, whole.loss[part], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.clipped_teacher_mass, whole.clipped_teacher_mass[part], rtol=0, atol=1e-12)


@pytest.mark.parametrize("action", [*ACTIONS, Nll()], ids=[*IDS, "nll"])
def test_no_rows_are_no_terms(action: RowAction) -> None:
    terms = action.terms(make_rows(0))
    assert [len(value) for value in vars(terms).values()] == [0, 0, 0, 0]


@pytest.mark.parametrize("action", [*ACTIONS, Nll()], ids=[*IDS, "nll"])
@pytest.mark.parametrize(("given", "computed"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_precision(action: RowAction, given: torch.dtype, computed: torch.dtype) -> None:
    rows = make_rows()
    cast = RoutedRows(rows.policy_logits.to(given), rows.teacher_logits.to(given), rows.targets, 1.0, rows.ratio)
    assert action.terms(cast).loss.dtype == computed


@pytest.mark.parametrize("action", [Fkl(clip=NONE, importance_cap=2.0), Nll(importance_cap=2.0)])
def test_importance_weights_are_cut_and_change_the_loss_only(action: RowAction) -> None:
    rows = make_rows(30)
    plain = action.model_copy(update={"importance_cap": 0.0}).terms(rows)
    weighed = action.terms(rows)
    torch.testing.assert_close(weighed.loss, plain.loss * rows.ratio.clamp(max=2))
    assert (rows.ratio > 2).any() and (rows.ratio < 1).any()
    assert torch.equal(weighed.unclipped, plain.unclipped)


def test_clipped_mass_by_hand() -> None:
    # Teacher (0.60, 0.25, 0.10, 0.05) against policy (0.05, 0.60, 0.25, 0.10): only the first term exceeds 0.05.
    policy, teacher = torch.tensor([[0.05, 0.60, 0.25, 0.10]]).log(), torch.tensor([[0.60, 0.25, 0.10, 0.05]]).log()
    rows = RoutedRows(policy, teacher, torch.tensor([0]), 1.0, torch.ones(1))
    literal = Fkl(clip=KlClip(mode="vocab_clamp")).terms(rows)
    assert literal.clipped_teacher_mass.item() == pytest.approx(0.60, abs=1e-6)
    assert Fkl().terms(rows).clipped_teacher_mass.item() == pytest.approx(1.0, abs=1e-6)
    assert Fkl(clip=NONE).terms(rows).clipped_teacher_mass.item() == 0.0


def test_actions_are_known_by_name_and_refuse_what_they_do_not_know() -> None:
    assert {"fkl", "rkl", "jsd", "nll", "none"} <= set(Action.kinds)
    assert Fkl.reads == {"states"}
    assert Nll.reads == frozenset()
    with pytest.raises(ValidationError):
        Fkl(bata=1)
