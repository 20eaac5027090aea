"""The loss of packed rows: hand-worked sums, gradients, and the invariants that make TRACE a superset of GRPO."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from trace_rl.batch import Action
from trace_rl.config.algorithm import Algorithm, KlClip, PolicyGradient, Route, Selector
from trace_rl.token_loss import LossRows, RouteLoss, route_losses, summarise, target_logprobs, token_loss

PG = PolicyGradient()
NONE = KlClip(mode="none")
FKL = RouteLoss("key_spans", Action.FKL, NONE, 1.0)
RKL = RouteLoss("error_spans", Action.RKL, NONE, 1.0)
VOCAB = 11


def make_rows(num_rows: int, seed: int = 0, num_routes: int = 2) -> LossRows:
    """Random constants of `num_rows` tokens; about half of them routed."""
    generator = torch.Generator().manual_seed(seed)
    kl_row = torch.nonzero(torch.rand(num_rows, generator=generator) < 0.5).squeeze(-1)
    return LossRows(
        targets=torch.randint(VOCAB, (num_rows,), generator=generator),
        advantages=torch.randn(num_rows, generator=generator),
        rollout_logprobs=-torch.rand(num_rows, generator=generator),
        pg_weight=torch.rand(num_rows, generator=generator) / num_rows,
        kl_row=kl_row,
        kl_route=torch.randint(num_routes, (len(kl_row),), generator=generator),
        kl_weight=torch.rand(len(kl_row), generator=generator) / num_rows,
    )


def plain(rows: LossRows) -> LossRows:
    """The same rows without any route."""
    none = torch.zeros(0, dtype=torch.long)
    return replace(rows, kl_row=none, kl_route=none, kl_weight=torch.zeros(0))


def make_logits(rows: LossRows, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(policy logits of every row, teacher logits of the routed ones)"""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(len(rows.targets), VOCAB, generator=generator)
    return policy.requires_grad_(), torch.randn(len(rows.kl_row), VOCAB, generator=generator)


def part(rows: LossRows, start: int, end: int) -> tuple[LossRows, Tensor]:
    """Rows [start, end) and the mask over the routed rows that belongs to them."""
    mine = (rows.kl_row >= start) & (rows.kl_row < end)
    cut = {name: getattr(rows, name)[start:end] for name in ("targets", "advantages", "rollout_logprobs", "pg_weight")}
    return LossRows(
        **cut, kl_row=rows.kl_row[mine] - start, kl_route=rows.kl_route[mine], kl_weight=rows.kl_weight[mine]
    ), mine


def test_two_tokens_by_hand() -> None:
    # Policy (3/4, 1/4) at both tokens. On-policy the first term is -A w = -(2 x 0.5) - (-1 x 0.25) = -0.75, and its
    # gradient per logit is -A w (onehot - p). Token 1 is routed: teacher (1/2, 1/2), so FKL = 1/2 log(2/3) + 1/2 log 2
    # = 1/2 log(4/3), times 0.4; its gradient is 0.4 (p - q) = 0.4 (1/4, -1/4).
    logits = torch.tensor([[0.75, 0.25], [0.75, 0.25]], dtype=torch.float64).log().requires_grad_()
    rows = LossRows(
        targets=torch.tensor([0, 1]),
        advantages=torch.tensor([2.0, -1.0]),
        rollout_logprobs=torch.tensor([math.log(0.75), math.log(0.25)]),
        pg_weight=torch.tensor([0.5, 0.25]),
        kl_row=torch.tensor([1]),
        kl_route=torch.tensor([0]),
        kl_weight=torch.tensor([0.4]),
    )
    teacher = torch.zeros(1, 2)
    loss, sums = token_loss(logits, rows, PG, [FKL], teacher)
    loss.backward()
    kl = 0.5 * math.log(4 / 3)
    assert loss.item() == pytest.approx(-0.75 + 0.4 * kl, abs=1e-6)
    expected = torch.tensor([[-0.25, 0.25], [-0.1875 + 0.1, 0.1875 - 0.1]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)

    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    metrics = summarise({name: value.item() for name, value in sums.items()}, [FKL])
    assert metrics == {
        "loss/policy_gradient": pytest.approx(-0.75, abs=1e-6),
        "loss/kl": pytest.approx(0.4 * kl, abs=1e-6),
        "loss/total": pytest.approx(-0.75 + 0.4 * kl, abs=1e-6),
        "policy/entropy_nats": pytest.approx(entropy, abs=1e-6),
        "policy/clip_frac": 0.0,
        "mismatch/logprob_gap_mean_nats": pytest.approx(0.0, abs=1e-6),
        "mismatch/logprob_gap_max_nats": pytest.approx(0.0, abs=1e-6),
        "route/key_spans/rows": 1.0,
        "route/key_spans/token_frac": 0.5,
        "route/key_spans/kl_nats": pytest.approx(kl, abs=1e-6),
        "route/key_spans/kl_max_nats": pytest.approx(kl, abs=1e-6),
        "route/key_spans/clipped_rows_frac": 0.0,
        "route/key_spans/clipped_teacher_mass_frac": 0.0,
        "route/key_spans/teacher_entropy_nats": pytest.approx(math.log(2), abs=1e-6),
        "route/key_spans/teacher_advantage_nats": pytest.approx(math.log(2), abs=1e-6),  # log(1/2) - log(1/4)
    }


def test_clip_metrics_by_hand() -> None:
    # Teacher (0.60, 0.25, 0.10, 0.05) against policy (0.05, 0.60, 0.25, 0.10): only the first term exceeds 0.05. The
    # second routed row equals its teacher, so half of the rows are clipped and (0.60 + 0)/2 of the teacher's mass.
    policy = torch.tensor([[0.05, 0.60, 0.25, 0.10], [0.25, 0.25, 0.25, 0.25]]).log()
    teacher = torch.tensor([[0.60, 0.25, 0.10, 0.05], [0.25, 0.25, 0.25, 0.25]]).log()
    rows = LossRows(
        targets=torch.tensor([0, 0]),
        advantages=torch.zeros(2),
        rollout_logprobs=torch.zeros(2),
        pg_weight=torch.ones(2),
        kl_row=torch.tensor([0, 1]),
        kl_route=torch.tensor([0, 0]),
        kl_weight=torch.ones(2),
    )
    route = RouteLoss("r", Action.FKL, KlClip(mode="vocab_clamp", threshold=0.05), 1.0)
    _, sums = token_loss(policy, rows, PG, [route], teacher)
    metrics = summarise({name: value.item() for name, value in sums.items()}, [route])
    assert metrics["route/r/clipped_rows_frac"] == 0.5
    assert metrics["route/r/clipped_teacher_mass_frac"] == pytest.approx(0.30, abs=1e-6)
    # log-prob gaps to the recorded 0: -log 0.05 and -log 0.25
    assert metrics["mismatch/logprob_gap_max_nats"] == pytest.approx(-math.log(0.05), abs=1e-5)
    assert metrics["mismatch/logprob_gap_mean_nats"] == pytest.approx(-math.log(0.05 * 0.25) / 2, abs=1e-5)


@pytest.mark.parametrize("routes", [[], [FKL, RKL]], ids=["no routes", "routes without rows"])
def test_without_routed_rows_loss_and_gradient_are_bit_equal_to_grpo(routes: list[RouteLoss]) -> None:
    rows = plain(make_rows(40))
    logits, _ = make_logits(rows)
    loss, _ = token_loss(logits, rows, PG, routes, torch.zeros(0, 0))
    loss.backward()

    grpo_logits = logits.detach().clone().requires_grad_()
    logprobs = target_logprobs(grpo_logits, rows.targets, 1.0)
    ratio = torch.exp(logprobs - logprobs.detach())
    surrogate = torch.minimum(ratio * rows.advantages, ratio.clamp(0.8, 1.28) * rows.advantages)
    grpo = (-surrogate * rows.pg_weight).sum()
    grpo.backward()
    assert torch.equal(loss, grpo)
    assert torch.equal(logits.grad, grpo_logits.grad)


def test_a_teacher_that_is_the_policy_adds_nothing() -> None:
    rows = make_rows(20)
    logits, _ = make_logits(rows)
    _, sums = token_loss(logits, rows, PG, [FKL, RKL], logits[rows.kl_row])
    for name in ("key_spans", "error_spans"):
        assert sums[f"{name}/rows"] > 0
        assert sums[f"{name}/kl"] == 0.0
        assert sums[f"{name}/loss"] == 0.0


def test_no_gradient_reaches_the_teacher() -> None:
    rows = make_rows(20)
    logits, teacher = make_logits(rows)
    teacher.requires_grad_()
    loss, _ = token_loss(logits, rows, PG, [FKL, RKL], teacher)
    loss.backward()
    assert logits.grad is not None
    assert teacher.grad is None


def test_without_advantage_only_the_routed_rows_have_a_gradient() -> None:
    # A group whose rewards are all equal: GRPO says nothing, the divergence still does.
    rows = make_rows(20)
    rows = replace(rows, advantages=torch.zeros(20))
    logits, teacher = make_logits(rows)
    loss, _ = token_loss(logits, rows, PG, [FKL, RKL], teacher)
    loss.backward()
    is_routed = torch.zeros(20, dtype=torch.bool)
    is_routed[rows.kl_row] = True
    assert 0 < is_routed.sum() < 20
    assert (logits.grad[~is_routed] == 0).all()
    assert (logits.grad[is_routed].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("num_parts", [2, 3, 7, 40])
@pytest.mark.parametrize("has_old", [False, True], ids=["on-policy", "off-policy"])
def test_any_split_adds_up_to_the_same_loss_gradient_and_metrics(num_parts: int, has_old: bool) -> None:
    rows = make_rows(40)
    logits, teacher = make_logits(rows)
    old = target_logprobs(logits.detach(), rows.targets, 1.0) + 0.5 * torch.sin(torch.arange(40.0))
    whole, sums = token_loss(logits, rows, PG, [FKL, RKL], teacher, old_logprobs=old if has_old else None)
    (gradient,) = torch.autograd.grad(whole, logits)

    bounds = torch.linspace(0, 40, num_parts + 1).round().int().tolist()
    total, added = torch.zeros(()), dict.fromkeys(sums, 0.0)
    for start, end in pairwise(bounds):
        piece, mine = part(rows, start, end)
        old_piece = old[start:end] if has_old else None
        loss, piece_sums = token_loss(logits[start:end], piece, PG, [FKL, RKL], teacher[mine], old_logprobs=old_piece)
        total = total + loss
        for name, value in piece_sums.items():
            is_maximum = name.endswith("_max")
            added[name] = max(added[name], value.item()) if is_maximum else added[name] + value.item()
    (split_gradient,) = torch.autograd.grad(total, logits)
    assert total.item() == pytest.approx(whole.item(), abs=1e-6)
    torch.testing.assert_close(split_gradient, gradient, rtol=0, atol=1e-6)
    for name, value in sums.items():
        assert added[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name


def test_the_order_of_rows_does_not_matter() -> None:
    rows = make_rows(30)
    logits, teacher = make_logits(rows)
    loss, _ = token_loss(logits, rows, PG, [FKL, RKL], teacher)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    place = torch.argsort(order)
    moved = {name: getattr(rows, name)[order] for name in ("targets", "advantages", "rollout_logprobs", "pg_weight")}
    shuffled = replace(rows, **moved, kl_row=place[rows.kl_row])
    assert token_loss(logits[order], shuffled, PG, [FKL, RKL], teacher)[0].item() == pytest.approx(
        loss.item(), abs=1e-6
    )


def test_no_rows_at_all_give_a_differentiable_zero_with_every_metric() -> None:
    rows = plain(make_rows(5))
    nothing, _ = part(rows, 0, 0)
    hidden = torch.zeros(0, 3, requires_grad=True)
    head = torch.randn(3, VOCAB, requires_grad=True)
    loss, sums = token_loss(hidden @ head, nothing, PG, [FKL], torch.zeros(0, 0))
    loss.backward()
    assert loss.item() == 0.0
    assert head.grad is not None
    assert (head.grad == 0).all()
    full, _ = make_logits(rows)
    assert sums.keys() == token_loss(full, rows, PG, [FKL], torch.zeros(0, 0))[1].keys()
    assert all(value.item() == 0.0 for value in sums.values())
    assert all(math.isfinite(value) for value in summarise({k: v.item() for k, v in sums.items()}, [FKL]).values())


def test_each_route_keeps_to_its_own_rows() -> None:
    rows = make_rows(30)
    logits, teacher = make_logits(rows)
    both, sums = token_loss(logits, rows, PG, [FKL, RKL], teacher)
    for index, route in enumerate((FKL, RKL)):
        mine = rows.kl_route == index
        alone = replace(
            rows, kl_row=rows.kl_row[mine], kl_route=torch.zeros(int(mine.sum()), dtype=torch.long),
            kl_weight=rows.kl_weight[mine],
        )  # fmt: skip
        _, own = token_loss(logits, alone, PG, [route], teacher[mine])
        assert own[f"{route.name}/loss"].item() == pytest.approx(sums[f"{route.name}/loss"].item(), abs=1e-7)
        assert own[f"{route.name}/rows"] == mine.sum()
    parts = sums["loss/policy_gradient"] + sums["key_spans/loss"] + sums["error_spans/loss"]
    assert both.item() == pytest.approx(parts.item(), abs=1e-6)


def test_sampling_temperature_belongs_to_the_policy_gradient_and_route_temperature_to_the_divergence() -> None:
    rows = make_rows(10, num_routes=1)
    logits, teacher = make_logits(rows)
    warm = RouteLoss("key_spans", Action.FKL, NONE, 2.0)
    _, base = token_loss(logits, rows, PG, [FKL], teacher)
    _, sampled = token_loss(logits, rows, PG, [FKL], teacher, sampling_temperature=2.0)
    _, halved = token_loss(logits / 2, rows, PG, [FKL], teacher / 2)
    _, warmed = token_loss(logits, rows, PG, [warm], teacher)
    assert torch.equal(sampled["key_spans/kl"], base["key_spans/kl"])
    assert torch.equal(sampled["entropy"], halved["entropy"])
    assert torch.equal(sampled["mismatch"], halved["mismatch"])
    assert torch.equal(warmed["key_spans/kl"], halved["key_spans/kl"])
    assert torch.equal(warmed["entropy"], base["entropy"])


def test_target_logprobs_are_those_of_the_sampler() -> None:
    # softmax((log 9, 0) / 2) = (3, 1)/4
    logits = torch.tensor([[math.log(9.0), 0.0]])
    assert target_logprobs(logits, torch.tensor([1]), 2.0).item() == pytest.approx(math.log(0.25), abs=1e-6)


def test_half_precision_logits_are_compared_in_float32() -> None:
    rows = make_rows(10)
    logits, teacher = make_logits(rows)
    rounded = logits.detach().bfloat16()
    loss, _ = token_loss(rounded.requires_grad_(), rows, PG, [FKL, RKL], teacher.bfloat16())
    expected, _ = token_loss(rounded.detach().float(), rows, PG, [FKL, RKL], teacher.bfloat16().float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_old_logprobs_make_the_ratio() -> None:
    # ratio 2 at A = 1 is clipped at 1.28 and counted
    logits = torch.zeros(1, 2)
    rows = LossRows(
        targets=torch.tensor([0]), advantages=torch.ones(1), rollout_logprobs=torch.tensor([math.log(0.5)]),
        pg_weight=torch.ones(1), kl_row=torch.zeros(0, dtype=torch.long), kl_route=torch.zeros(0, dtype=torch.long),
        kl_weight=torch.zeros(0),
    )  # fmt: skip
    loss, sums = token_loss(logits, rows, PG, [], torch.zeros(0, 0), old_logprobs=torch.tensor([math.log(0.25)]))
    assert loss.item() == pytest.approx(-1.28, abs=1e-6)
    assert sums["pg_clipped"] == 1.0


def test_routes_of_the_configuration_in_the_order_of_their_indices() -> None:
    clip = KlClip(mode="vocab_clamp", threshold=0.1)
    wrong, correct = (
        Selector(rollouts="wrong", tokens="error_spans"),
        Selector(rollouts="correct", tokens="key_spans"),
    )
    algorithm = Algorithm(
        routes={
            "second_name": Route(selector=wrong, action="rkl", clip=clip),
            "a_name": Route(selector=correct, action="fkl", temperature=2.0),
        }
    )
    assert route_losses(algorithm) == (
        RouteLoss("second_name", Action.RKL, clip, 1.0),
        RouteLoss("a_name", Action.FKL, KlClip(), 2.0),
    )
