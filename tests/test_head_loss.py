"""The loss of packed rows: hand-worked sums, gradients, and the invariants that make TRACE a superset of GRPO."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from logits_loss import logits_loss, only, target_logprobs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trace_rl.actions import RowAction
from trace_rl.config.algorithm import Algorithm
from trace_rl.divergences import KlClip
from trace_rl.head_loss import Projection, head_loss
from trace_rl.objective import LossRows, Objective, RouteLoss, objective_of, summarise
from trace_rl.policy_gradients import Cispo, Clipped, Gspo, PolicyGradient, Reinforce, RolloutCorrection
from trace_rl.row_actions import Fkl, Nll, Rkl


class Products(TorchDispatchMode):
    """Adds up the multiplications of all matrix products."""

    multiplications = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


NONE = KlClip(mode="none")
VOCAB = 11
ROW_FIELDS = ("targets", "sequence", "advantages", "rollout_logprobs", "is_stale", "pg_weight")
ROUTED_FIELDS = ("route_row", "route_index", "route_weight", "teacher_row")


def route(index: int, name: str, action: RowAction, temperature: float = 1.0) -> RouteLoss:
    return RouteLoss(name, index, action, temperature, action)


FKL = route(0, "key_spans", Fkl(clip=NONE))
RKL = route(1, "error_spans", Rkl(clip=NONE))


def objective(
    *routes: RouteLoss,
    policy_gradient: PolicyGradient = Clipped(),  # noqa: B008  frozen
    correction: RolloutCorrection = RolloutCorrection(),  # noqa: B008  frozen
    temperature: float = 1.0,
) -> Objective:
    return Objective(policy_gradient, correction, routes, temperature)


BOTH = objective(FKL, RKL)
CUT = RolloutCorrection(cap=1.5)


def rows_of(**given: Any) -> LossRows:
    """Loss rows from lists; without routes where none are given, and every token in one sequence."""
    time = len(given["targets"])
    fields: dict[str, Any] = {"sequence": [0] * time, "num_sequences": 1, "advantages": [0.0] * time}
    fields |= {"rollout_logprobs": [0.0] * time, "is_stale": [False] * time, "pg_weight": [1.0] * time}
    fields |= {"route_row": [], "route_index": [], "route_weight": [], "teacher_row": []}
    fields |= given
    dtypes = dict.fromkeys(("targets", "sequence", "route_row", "route_index", "teacher_row"), torch.long)
    dtypes["is_stale"] = torch.bool
    return LossRows(
        num_sequences=fields.pop("num_sequences"),
        **{name: torch.tensor(value, dtype=dtypes.get(name, torch.float32)) for name, value in fields.items()},
    )


def make_rows(num_rows: int, seed: int = 0) -> LossRows:
    """Random constants of `num_rows` tokens in sequences of 5; about half of them in one of two routes.

    Older weights wrote the first two of each sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    route_row = torch.nonzero(torch.rand(num_rows, generator=generator) < 0.5).squeeze(-1)
    return LossRows(
        targets=torch.randint(VOCAB, (num_rows,), generator=generator),
        sequence=torch.arange(num_rows) // 5,
        num_sequences=-(-num_rows // 5),
        advantages=torch.randn(num_rows, generator=generator),
        rollout_logprobs=-torch.rand(num_rows, generator=generator),
        is_stale=torch.arange(num_rows) % 5 < 2,
        pg_weight=torch.rand(num_rows, generator=generator) / num_rows,
        route_row=route_row,
        route_index=torch.randint(2, (len(route_row),), generator=generator),
        route_weight=torch.rand(len(route_row), generator=generator) / num_rows,
        teacher_row=torch.arange(len(route_row)),
    )


def plain(rows: LossRows) -> LossRows:
    """The same rows without any route."""
    return replace(rows, **{name: getattr(rows, name)[:0] for name in ROUTED_FIELDS})


def fresh(rows: LossRows) -> LossRows:
    """The same rows as if the weights of the step had written all of them."""
    return replace(rows, is_stale=torch.zeros_like(rows.is_stale))


def make_logits(rows: LossRows, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(policy logits of every row, teacher logits of the routed ones)"""
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(len(rows.targets), VOCAB, generator=generator)
    return policy.requires_grad_(), torch.randn(len(rows.route_row), VOCAB, generator=generator)


def part(rows: LossRows, start: int, end: int) -> tuple[LossRows, Tensor]:
    """Rows [start, end), which are whole sequences, and the mask over the routed rows that belongs to them."""
    mine = (rows.route_row >= start) & (rows.route_row < end)
    cut = {name: getattr(rows, name)[start:end] for name in ROW_FIELDS}
    cut["sequence"] = cut["sequence"] - start // 5
    return LossRows(
        **cut,
        num_sequences=-(-(end - start) // 5),
        route_row=rows.route_row[mine] - start,
        route_index=rows.route_index[mine],
        route_weight=rows.route_weight[mine],
        teacher_row=torch.arange(int(mine.sum())),
    ), mine


def metrics_of(sums: dict[str, Tensor], loss: Objective) -> dict[str, float]:
    return summarise({name: value.item() for name, value in sums.items()}, loss)


def gradient_of(logits: Tensor, rows: LossRows, loss: Objective, teacher: Tensor, *old: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(logits_loss(logits, rows, loss, teacher, *old)[0].total, logits)
    return gradient


def test_two_tokens_by_hand() -> None:
    # Policy (3/4, 1/4) at both tokens. On-policy the first term is -A w = -(2 x 0.5) - (-1 x 0.25) = -0.75, and its
    # gradient per logit is -A w (onehot - p). Token 1 is routed: teacher (1/2, 1/2), so FKL = 1/2 log(2/3) + 1/2 log 2
    # = 1/2 log(4/3), times 0.4; its gradient is 0.4 (p - q) = 0.4 (1/4, -1/4).
    logits = torch.tensor([[0.75, 0.25], [0.75, 0.25]], dtype=torch.float64).log().requires_grad_()
    rows = rows_of(
        targets=[0, 1],
        advantages=[2.0, -1.0],
        rollout_logprobs=[math.log(0.75), math.log(0.25)],
        pg_weight=[0.5, 0.25],
        route_row=[1],
        route_index=[0],
        route_weight=[0.4],
        teacher_row=[0],
    )
    parts, sums = logits_loss(logits, rows, objective(FKL), torch.zeros(1, 2))
    parts.total.backward()
    value = 0.5 * math.log(4 / 3)
    assert parts.policy.item() == pytest.approx(-0.75, abs=1e-6)
    assert parts.routed.item() == pytest.approx(0.4 * value, abs=1e-6)
    assert parts.total.item() == parts.policy.item() + parts.routed.item()
    expected = torch.tensor([[-0.25, 0.25], [-0.1875 + 0.1, 0.1875 - 0.1]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-6)

    assert metrics_of(sums, objective(FKL)) == {
        "loss/policy_gradient": pytest.approx(-0.75, abs=1e-6),
        "loss/routed": pytest.approx(0.4 * value, abs=1e-6),
        "loss/total": pytest.approx(-0.75 + 0.4 * value, abs=1e-6),
        "policy/entropy_nats": pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-6),
        "policy/clip_frac": 0.0,
        "mismatch/logprob_gap_mean_nats": pytest.approx(0.0, abs=1e-6),
        "mismatch/logprob_gap_max_nats": pytest.approx(0.0, abs=1e-6),
        "mismatch/kl_nats": pytest.approx(0.0, abs=1e-6),
        "mismatch/correction_mean": 1.0,
        "mismatch/correction_capped_frac": 0.0,
        "route/key_spans/rows": 1.0,
        "route/key_spans/token_frac": 0.5,
        "route/key_spans/value_nats": pytest.approx(value, abs=1e-6),
        "route/key_spans/value_max_nats": pytest.approx(value, abs=1e-6),
        "route/key_spans/clipped_rows_frac": 0.0,
        "route/key_spans/clipped_terms_mean": 0.0,
        "route/key_spans/clipped_teacher_mass_frac": 0.0,
        "route/key_spans/teacher_entropy_nats": pytest.approx(math.log(2), abs=1e-6),
        "route/key_spans/teacher_advantage_nats": pytest.approx(math.log(2), abs=1e-6),  # log(1/2) - log(1/4)
    }


def test_clip_metrics_by_hand() -> None:
    # Teacher (0.60, 0.25, 0.10, 0.05) against policy (0.05, 0.60, 0.25, 0.10): only the first term exceeds 0.05. The
    # second routed row equals its teacher, so half of the rows are clipped, half a term a row, and (0.60 + 0)/2 of the
    # teacher's mass.
    policy = torch.tensor([[0.05, 0.60, 0.25, 0.10], [0.25, 0.25, 0.25, 0.25]]).log()
    teacher = torch.tensor([[0.60, 0.25, 0.10, 0.05], [0.25, 0.25, 0.25, 0.25]]).log()
    rows = rows_of(targets=[0, 0], route_row=[0, 1], route_index=[0, 0], route_weight=[1.0, 1.0], teacher_row=[0, 1])
    clipped = objective(route(0, "r", Fkl(clip=KlClip(mode="vocab_clamp", threshold=0.05))))
    metrics = metrics_of(logits_loss(policy, rows, clipped, teacher)[1], clipped)
    assert metrics["route/r/clipped_rows_frac"] == metrics["route/r/clipped_terms_mean"] == 0.5
    assert metrics["route/r/clipped_teacher_mass_frac"] == pytest.approx(0.30, abs=1e-6)


def test_mismatch_metrics_by_hand() -> None:
    # The learner gives the tokens 1/2 and 1/4, the sampler gave them 1/4 and 1/2: ratios 2 and 1/2, gaps of log 2 up
    # and down. The unbiased estimate of the KL is r - 1 - log r: 1 - log 2 and log 2 - 1/2, so 1/4 in the mean.
    logits = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).clamp(min=1e-30).log()
    rows = rows_of(targets=[0, 1], rollout_logprobs=[math.log(1 / 4), math.log(1 / 2)], advantages=[1.0, 1.0])
    half = math.log(2)
    for level, weights in (("none", (1.0, 1.0)), ("token", (1.5, 0.5)), ("sequence", (1.0, 1.0))):
        loss = objective(correction=RolloutCorrection(level=level, cap=1.5))
        parts, sums = logits_loss(logits, rows, loss, torch.zeros(0, 3))
        metrics = metrics_of(sums, loss)
        assert parts.policy.item() == pytest.approx(-sum(weights), abs=1e-6)
        assert metrics["mismatch/logprob_gap_mean_nats"] == pytest.approx(half, abs=1e-6)
        assert metrics["mismatch/logprob_gap_max_nats"] == pytest.approx(half, abs=1e-6)
        assert metrics["mismatch/kl_nats"] == pytest.approx(0.25, abs=1e-6)
        assert metrics["mismatch/correction_mean"] == pytest.approx(sum(weights) / 2, abs=1e-6)
        assert metrics["mismatch/correction_capped_frac"] == (0.5 if level == "token" else 0.0)


def test_tokens_of_older_weights_are_told_apart_by_hand() -> None:
    # As above, with a third token that the sampler knew nothing of. Older weights wrote the first two, ratios 2 (cut at
    # 1.5) and 1/2; the fresh ones are the third, and a fourth with ratio 4, which is not corrected.
    logits = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    rows = rows_of(
        targets=[0, 1, 0, 0],
        rollout_logprobs=[math.log(1 / 4), math.log(1 / 2), math.nan, math.log(1 / 8)],
        is_stale=[True, True, False, False],
        advantages=[1.0] * 4,
    )
    half = math.log(2)
    parts, sums = logits_loss(logits.clamp(min=1e-30).log(), rows, objective(correction=CUT), torch.zeros(0, 3))
    assert parts.policy.item() == pytest.approx(-(1.5 + 0.5 + 1 + 1), abs=1e-6)
    found = {name: value for name, value in metrics_of(sums, objective()).items() if name.startswith("mismatch/")}
    assert found == {
        "mismatch/logprob_gap_mean_nats": pytest.approx(4 / 3 * half, abs=1e-6),
        "mismatch/logprob_gap_max_nats": pytest.approx(2 * half, abs=1e-6),
        "mismatch/kl_nats": pytest.approx((0.5 + 3 - 2 * half) / 3, abs=1e-6),
        "mismatch/correction_mean": pytest.approx(1.0, abs=1e-6),
        "mismatch/correction_capped_frac": 0.25,
        "mismatch/stale_logprob_gap_mean_nats": pytest.approx(half, abs=1e-6),
        "mismatch/stale_logprob_gap_max_nats": pytest.approx(half, abs=1e-6),
        "mismatch/stale_kl_nats": pytest.approx(0.25, abs=1e-6),
        "mismatch/stale_correction_mean": pytest.approx(1.0, abs=1e-6),
        "mismatch/stale_correction_capped_frac": 0.5,
        "mismatch/fresh_logprob_gap_mean_nats": pytest.approx(2 * half, abs=1e-6),
        "mismatch/fresh_logprob_gap_max_nats": pytest.approx(2 * half, abs=1e-6),
        "mismatch/fresh_kl_nats": pytest.approx(3 - 2 * half, abs=1e-6),
        "mismatch/fresh_correction_mean": 1.0,
        "mismatch/fresh_correction_capped_frac": 0.0,
    }


@pytest.mark.parametrize("policy_gradient", [Clipped(), Gspo(), Cispo(), Reinforce()], ids=lambda each: each.type)
def test_where_no_weights_are_older_their_correction_changes_no_bit(policy_gradient: PolicyGradient) -> None:
    rows = fresh(make_rows(40))
    logits, teacher = make_logits(rows)
    corrected, without = (
        objective(FKL, RKL, policy_gradient=policy_gradient, correction=RolloutCorrection(level=level, cap=1.0))
        for level in ("stale", "none")
    )
    for old in ((), (target_logprobs(logits.detach(), rows.targets, 1.0) - 0.3,)):
        found, expected = (logits_loss(logits, rows, loss, teacher, *old) for loss in (corrected, without))
        assert torch.equal(found[0].total, expected[0].total)
        assert {name: value.item() for name, value in found[1].items()} == {
            name: value.item() for name, value in expected[1].items()
        }
        gradients = [gradient_of(logits, rows, loss, teacher, *old) for loss in (corrected, without)]
        assert torch.equal(*gradients)
        older = replace(rows, is_stale=~rows.is_stale)  # here it does
        assert not torch.equal(gradient_of(logits, older, corrected, teacher, *old), gradients[0])


def test_corrections_of_tokens_and_of_sequences_scale_the_policy_gradient_only() -> None:
    # Sequence 0 has the tokens 0 and 1 (ratios 2 and 2), sequence 1 the token 2 (ratio 1/2); the cap is 3. By token the
    # weights are 2, 2, 1/2; by sequence min(4, 3) twice and 1/2. The gradient per logit is -A w (onehot - p).
    logits = torch.zeros(3, 2, requires_grad=True)
    rows = rows_of(
        targets=[0, 0, 0],
        sequence=[0, 0, 1],
        num_sequences=2,
        advantages=[1.0, 1.0, 1.0],
        rollout_logprobs=[math.log(1 / 4), math.log(1 / 4), 0.0],
        route_row=[0],
        route_index=[0],
        route_weight=[1.0],
        teacher_row=[0],
    )
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    for level, weights in (("token", (2.0, 2.0, 0.5)), ("sequence", (3.0, 3.0, 0.5))):
        corrected = objective(FKL, correction=RolloutCorrection(level=level, cap=3.0))
        policy = gradient_of(logits, only(rows, "policy"), corrected, teacher)
        assert policy[:, 0].tolist() == pytest.approx([-0.5 * weight for weight in weights], abs=1e-6)
        routed = gradient_of(logits, only(rows, "routed"), corrected, teacher)
        assert routed.tolist() == [pytest.approx([-0.25, 0.25], abs=1e-6), [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("level", ["none", "token", "sequence"])
def test_tokens_of_another_sampler_count_as_matched(level: str) -> None:
    # Demonstrations have no log-probs of the policy. Sequence 1 is one; metrics speak of the tokens of sequence 0.
    rows = make_rows(10)
    corrected = objective(FKL, RKL, correction=RolloutCorrection(level=level))
    logits, teacher = make_logits(rows)
    unknown = replace(rows, rollout_logprobs=torch.where(rows.sequence == 1, math.nan, rows.rollout_logprobs))
    parts, sums = logits_loss(logits, unknown, corrected, teacher)
    (gradient,) = torch.autograd.grad(parts.total, logits)
    assert parts.total.isfinite() and gradient.isfinite().all()
    metrics = metrics_of(sums, corrected)
    assert all(math.isfinite(value) for value in metrics.values())

    matched = target_logprobs(logits.detach(), rows.targets, 1.0)
    same = replace(rows, rollout_logprobs=torch.where(rows.sequence == 1, matched, rows.rollout_logprobs))
    expected, _ = logits_loss(logits, same, corrected, teacher)
    assert torch.equal(parts.total, expected.total)
    assert torch.equal(gradient, torch.autograd.grad(expected.total, logits)[0])

    sampled, _ = part(rows, 0, 5)
    alone = metrics_of(logits_loss(logits[:5], plain(sampled), corrected, teacher[:0])[1], corrected)
    for name in ("logprob_gap_mean_nats", "logprob_gap_max_nats", "kl_nats"):
        assert metrics[f"mismatch/{name}"] == pytest.approx(alone[f"mismatch/{name}"], abs=1e-6)


def test_a_batch_without_any_sampled_token_has_no_mismatch() -> None:
    rows = replace(make_rows(5), rollout_logprobs=torch.full((5,), math.nan))
    logits, teacher = make_logits(rows)
    metrics = metrics_of(logits_loss(logits, rows, BOTH, teacher)[1], BOTH)
    assert metrics["mismatch/logprob_gap_mean_nats"] == metrics["mismatch/kl_nats"] == 0.0
    assert metrics["mismatch/correction_mean"] == 1.0


def test_without_routed_rows_loss_and_gradient_are_bit_equal_to_grpo() -> None:
    rows = fresh(plain(make_rows(40)))
    logits, _ = make_logits(rows)
    found, alone = (logits_loss(logits, rows, loss, torch.zeros(0, 0))[0] for loss in (BOTH, objective()))
    assert torch.equal(found.total, alone.total)
    gradients = [gradient_of(logits, rows, loss, torch.zeros(0, 0)) for loss in (BOTH, objective())]
    assert torch.equal(*gradients)

    logprobs = logits.log_softmax(-1).gather(-1, rows.targets.unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(logprobs - logprobs.detach())
    surrogate = torch.minimum(ratio * rows.advantages, ratio.clamp(0.8, 1.28) * rows.advantages)
    grpo = (-surrogate * rows.pg_weight).sum()
    assert found.total.item() == pytest.approx(grpo.item(), abs=1e-7)
    torch.testing.assert_close(gradients[0], torch.autograd.grad(grpo, logits)[0], rtol=0, atol=1e-8)


def test_a_teacher_that_is_the_policy_adds_nothing() -> None:
    rows = make_rows(20)
    logits, _ = make_logits(rows)
    _, sums = logits_loss(logits, rows, BOTH, logits[rows.route_row])
    for name in ("key_spans", "error_spans"):
        assert sums[f"{name}/rows"] > 0
        assert sums[f"{name}/value"] == 0.0
        assert sums[f"{name}/loss"] == 0.0


def test_no_gradient_reaches_the_teacher() -> None:
    rows = make_rows(20)
    logits, teacher = make_logits(rows)
    teacher.requires_grad_()
    logits_loss(logits, rows, BOTH, teacher)[0].total.backward()
    assert logits.grad is not None
    assert teacher.grad is None


def test_without_advantage_only_the_routed_rows_have_a_gradient() -> None:
    # A group whose rewards are all equal: GRPO says nothing, the divergence still does.
    rows = replace(make_rows(20), advantages=torch.zeros(20))
    logits, teacher = make_logits(rows)
    logits_loss(logits, rows, BOTH, teacher)[0].total.backward()
    is_routed = torch.zeros(20, dtype=torch.bool)
    is_routed[rows.route_row] = True
    assert 0 < is_routed.sum() < 20
    assert (logits.grad[~is_routed] == 0).all()
    assert (logits.grad[is_routed].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("num_parts", [2, 3, 8])
@pytest.mark.parametrize("policy_gradient", [Clipped(), Gspo(clip_low=0.2, clip_high=0.2)], ids=lambda pg: pg.type)
@pytest.mark.parametrize("has_old", [False, True], ids=["on-policy", "off-policy"])
def test_any_split_adds_up_to_the_same_loss_gradient_and_metrics(
    num_parts: int, policy_gradient: PolicyGradient, has_old: bool
) -> None:
    loss = objective(FKL, RKL, policy_gradient=policy_gradient, correction=RolloutCorrection(level="sequence"))
    rows = make_rows(40)
    logits, teacher = make_logits(rows)
    old = target_logprobs(logits.detach(), rows.targets, 1.0) + 0.5 * torch.sin(torch.arange(40.0))
    whole, sums = logits_loss(logits, rows, loss, teacher, old if has_old else None)
    (gradient,) = torch.autograd.grad(whole.total, logits)

    bounds = (5 * torch.linspace(0, 8, num_parts + 1).round().int()).tolist()
    total, added = torch.zeros(()), dict.fromkeys(sums, 0.0)
    for start, end in pairwise(bounds):
        piece, mine = part(rows, start, end)
        parts, piece_sums = logits_loss(
            logits[start:end], piece, loss, teacher[mine], old[start:end] if has_old else None
        )
        total = total + parts.total
        for name, value in piece_sums.items():
            is_maximum = name.endswith("_max")
            added[name] = max(added[name], value.item()) if is_maximum else added[name] + value.item()
    (split_gradient,) = torch.autograd.grad(total, logits)
    assert total.item() == pytest.approx(whole.total.item(), abs=1e-6)
    torch.testing.assert_close(split_gradient, gradient, rtol=0, atol=1e-6)
    for name, value in sums.items():
        assert added[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("tile_rows", [1, 7, 40])
def test_three_products_a_token_and_one_for_each_row_that_reads_a_teacher(tile_rows: int) -> None:
    rows = make_rows(40)
    logits, teacher = make_logits(rows)
    one = VOCAB * VOCAB  # the head of `logits_loss` is as wide as the vocabulary
    for loss, states in ((BOTH, len(rows.route_row)), (objective(FKL, route(1, "likelihood", Nll())), 0)):
        states = states or int((rows.route_index == 0).sum())
        with Products() as products:
            logits_loss(logits, rows, loss, teacher, tile_bytes=4 * VOCAB * tile_rows)[0].total.backward()
        assert products.multiplications == (2 * 40 + states) * one  # nothing for the head, which wants no gradient
    head = torch.randn(VOCAB, 3, requires_grad=True)
    with Products() as products:
        head_loss(
            Projection(torch.randn(40, 3, requires_grad=True), head), rows, BOTH, Projection(torch.randn(40, 3), head)
        )[0].total.backward()
    assert products.multiplications == (3 * 40 + len(rows.route_row)) * VOCAB * 3


def test_the_order_of_rows_does_not_matter() -> None:
    rows = make_rows(30)
    logits, teacher = make_logits(rows)
    loss, _ = logits_loss(logits, rows, BOTH, teacher)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    moved = {name: getattr(rows, name)[order] for name in ROW_FIELDS}
    shuffled = replace(rows, **moved, route_row=torch.argsort(order)[rows.route_row])
    routed = torch.randperm(len(rows.route_row), generator=torch.Generator().manual_seed(6))
    shuffled = replace(shuffled, **{name: getattr(shuffled, name)[routed] for name in ROUTED_FIELDS})
    found, _ = logits_loss(logits[order], shuffled, BOTH, teacher)
    assert found.total.item() == pytest.approx(loss.total.item(), abs=1e-6)


def test_no_rows_at_all_give_a_differentiable_zero_with_every_metric() -> None:
    rows = plain(make_rows(5))
    nothing, _ = part(rows, 0, 0)
    hidden = torch.zeros(0, 3, requires_grad=True)
    head = torch.randn(3, VOCAB, requires_grad=True)
    parts, sums = logits_loss(hidden @ head, nothing, objective(FKL), torch.zeros(0, 0))
    parts.total.backward()
    assert parts.total.item() == 0.0
    assert head.grad is not None
    assert (head.grad == 0).all()
    full, _ = make_logits(rows)
    assert sums.keys() == logits_loss(full, rows, objective(FKL), torch.zeros(0, 0))[1].keys()
    assert all(value.item() == 0.0 for value in sums.values())
    assert all(math.isfinite(value) for value in metrics_of(sums, objective(FKL)).values())


def test_each_route_keeps_to_its_own_rows() -> None:
    rows = make_rows(30)
    logits, teacher = make_logits(rows)
    both, sums = logits_loss(logits, rows, BOTH, teacher)
    for each in (FKL, RKL):
        mine = rows.route_index == each.index
        alone = replace(rows, **{name: getattr(rows, name)[mine] for name in ROUTED_FIELDS})
        _, own = logits_loss(logits, alone, objective(each), teacher)
        assert own[f"{each.name}/loss"].item() == pytest.approx(sums[f"{each.name}/loss"].item(), abs=1e-7)
        assert own[f"{each.name}/rows"] == mine.sum()
    assert both.routed.item() == pytest.approx((sums["key_spans/loss"] + sums["error_spans/loss"]).item(), abs=1e-6)
    assert both.policy.item() == sums["loss/policy_gradient"].item()


def test_two_routes_on_one_token_share_its_teacher_state_and_add_up() -> None:
    # Policy (1/2, 1/2), teacher (3/4, 1/4): KL(q || p) = 3/4 log(3/2) + 1/4 log(1/2), KL(p || q) = 1/2 log(2/3) + 1/2
    # log 2. Gradients: p - q = (-1/4, 1/4), and p_u (log(p_u / q_u) - KL), that is -+ 1/2 x (log 2 - log(2/3)) / 2.
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    rows = rows_of(targets=[0], route_row=[0, 0], route_index=[0, 1], route_weight=[1.0, 2.0], teacher_row=[0, 0])
    parts, _ = logits_loss(logits, rows, BOTH, teacher)
    gradient = gradient_of(logits, only(rows, "routed"), BOTH, teacher)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert parts.routed.item() == pytest.approx(forward + 2 * reverse, abs=1e-12)
    down = -0.25 - 2 * 0.25 * math.log(3)
    assert gradient[0].tolist() == pytest.approx([down, -down], abs=1e-12)


def test_a_route_that_reads_no_teacher_has_rows_without_states() -> None:
    # The second route is a log-likelihood: its row refers to no state, and neither does its gradient, p - onehot.
    likelihood = objective(FKL, route(1, "likelihood", Nll()))
    logits = torch.tensor([[0.75, 0.25], [0.75, 0.25]], dtype=torch.float64).log().requires_grad_()
    rows = rows_of(targets=[0, 1], route_row=[0, 1], route_index=[0, 1], route_weight=[1.0, 0.5], teacher_row=[0, -1])
    teacher = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()  # equal to the policy
    parts, sums = logits_loss(logits, rows, likelihood, teacher)
    gradient = gradient_of(logits, only(rows, "routed"), likelihood, teacher)
    assert parts.routed.item() == pytest.approx(-0.5 * math.log(0.25), abs=1e-12)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0], [0.375, -0.375]], dtype=torch.float64))
    metrics = metrics_of(sums, likelihood)
    assert metrics["route/likelihood/value_nats"] == pytest.approx(-math.log(0.25), abs=1e-6)
    assert metrics["route/likelihood/teacher_entropy_nats"] == metrics["route/likelihood/teacher_advantage_nats"] == 0.0

    alone = replace(rows, **{name: getattr(rows, name)[1:] for name in ROUTED_FIELDS})
    without, _ = logits_loss(logits, alone, likelihood, torch.zeros(0, 2))  # a run of which no route reads a teacher
    assert without.routed.item() == parts.routed.item()


def test_sampling_temperature_belongs_to_the_policy_gradient_and_route_temperature_to_the_divergence() -> None:
    rows = make_rows(10)
    rows = replace(rows, route_index=torch.zeros_like(rows.route_index))
    logits, teacher = make_logits(rows)
    _, base = logits_loss(logits, rows, objective(FKL), teacher)
    _, sampled = logits_loss(logits, rows, objective(FKL, temperature=2.0), teacher)
    _, halved = logits_loss(logits / 2, rows, objective(FKL), teacher / 2)
    _, warmed = logits_loss(logits, rows, objective(route(0, "key_spans", FKL.action, 2.0)), teacher)
    assert torch.equal(sampled["key_spans/value"], base["key_spans/value"])
    assert torch.equal(sampled["entropy"], halved["entropy"])
    assert torch.equal(sampled["mismatch"], halved["mismatch"])
    assert torch.equal(warmed["key_spans/value"], halved["key_spans/value"])
    for name in ("key_spans/teacher_advantage", "key_spans/teacher_entropy"):
        assert torch.equal(warmed[name], halved[name])
    assert torch.equal(warmed["entropy"], base["entropy"])


def test_target_logprobs_are_those_of_the_sampler() -> None:
    # softmax((log 9, 0) / 2) = (3, 1)/4
    logits = torch.tensor([[math.log(9.0), 0.0]])
    assert target_logprobs(logits, torch.tensor([1]), 2.0).item() == pytest.approx(math.log(0.25), abs=1e-6)
    nats = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    rows = rows_of(targets=[1])
    sums = logits_loss(logits, rows, objective(temperature=2.0), torch.zeros(0, 2))[1]
    assert sums["entropy"].item() == pytest.approx(nats, abs=1e-6)


def test_half_precision_logits_are_compared_in_float32() -> None:
    rows = make_rows(10)
    logits, teacher = make_logits(rows)
    rounded = logits.detach().bfloat16()
    warm = objective(FKL, RKL, temperature=0.7)  # a quotient that bfloat16 would round
    parts, sums = logits_loss(rounded.requires_grad_(), rows, warm, teacher.bfloat16())
    expected, precise = logits_loss(rounded.detach().float(), rows, warm, teacher.bfloat16().float())
    assert parts.total.dtype == torch.float32
    assert torch.equal(parts.total, expected.total)
    assert {name: value.item() for name, value in sums.items()} == {n: value.item() for n, value in precise.items()}


def test_double_precision_stays_double() -> None:
    rows = make_rows(20).to(torch.float64)
    logits, teacher = (each.detach().double() for each in make_logits(rows))
    loss = objective(FKL, RKL, correction=RolloutCorrection(level="token"))
    parts, _ = logits_loss(logits.requires_grad_(), rows, loss, teacher)
    assert parts.total.dtype == parts.policy.dtype == parts.routed.dtype == torch.float64

    old = target_logprobs(logits.detach(), rows.targets, 1.0) - 0.05
    gradient = gradient_of(logits, rows, loss, teacher, old)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        up, down = (logits_loss(logits + step * direction, rows, loss, teacher, old)[0].total for step in (1e-6, -1e-6))
    assert ((up - down) / 2e-6).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-8)


def test_old_logprobs_make_the_ratio() -> None:
    # ratio 2 at A = 1 is clipped at 1.28 and counted
    rows = rows_of(targets=[0], advantages=[1.0], rollout_logprobs=[math.log(0.5)])
    parts, sums = logits_loss(
        torch.zeros(1, 2), rows, objective(), torch.zeros(0, 0), old_logprobs=torch.tensor([math.log(0.25)])
    )
    assert parts.total.item() == pytest.approx(-1.28, abs=1e-6)
    assert sums["pg_clipped"] == 1.0
    # the sampler is compared with the old policy, not with the one that is trained
    assert sums["mismatch"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_an_importance_weight_is_the_ratio_of_the_token_and_carries_no_gradient() -> None:
    # FKL of teacher (3/4, 1/4) to policy (1/2, 1/2), times the ratio 2 cut at 1.5
    weighed = route(0, "r", Fkl(clip=NONE, importance_cap=1.5))
    logits = torch.zeros(1, 2, requires_grad=True)
    rows = rows_of(targets=[0], route_row=[0], route_index=[0], route_weight=[1.0], teacher_row=[0])
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    old = torch.tensor([math.log(0.25)])
    parts, _ = logits_loss(logits, rows, objective(weighed), teacher, old)
    gradient = gradient_of(logits, only(rows, "routed"), objective(weighed), teacher, old)
    assert parts.routed.item() == pytest.approx(1.5 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([-0.375, 0.375], abs=1e-6)


def test_the_objective_has_the_routes_that_add_a_term_with_their_own_index() -> None:
    wrong = {"rollouts": "wrong", "tokens": "error_spans"}
    algorithm = Algorithm.model_validate(
        {
            "policy_gradient": {"type": "cispo"},
            "rollout_correction": {"level": "token"},
            "routes": {
                "weighed": {"selector": wrong, "action": "adv_mult"},
                "second_name": {"selector": wrong, "action": {"type": "rkl", "clip": {"threshold": 0.1}}},
                "ramp": {"selector": wrong, "action": "none"},
                "a_name": {
                    "selector": {"tokens": {"type": "top", "score": "soft_or", "rank_by": "fkl"}},
                    "action": "nll",
                    "temperature": 2.0,
                },
            },
        }
    )
    found = objective_of(algorithm, 0.9)
    assert found == Objective(
        algorithm.policy_gradient,
        RolloutCorrection(level="token"),
        (
            RouteLoss("second_name", 1, Rkl(clip=KlClip(threshold=0.1)), 1.0, Rkl(clip=KlClip(threshold=0.1))),
            RouteLoss("a_name", 3, Nll(), 2.0, Fkl()),
        ),
        0.9,
    )
