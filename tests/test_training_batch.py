"""From routes to what the learner sees: denominators, token weights, advantages and teacher rows, by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from logits_loss import logits_loss
from rollouts import ALL, ERROR, HIDDEN, KEY, NO_POLICY_GRADIENT, annotated, configured, error, evidence_of, key

from trace_rl.batch import NOT_THE_POLICY, AnnotatedRollout, TrainingBatch, TrainingSequence
from trace_rl.config.run import RunConfig
from trace_rl.errors import WeightSyncError
from trace_rl.objective import objective_of, policy_loss
from trace_rl.packing import pack
from trace_rl.routing import route_rollouts
from trace_rl.states import states_array, states_tensor
from trace_rl.token_layout import Padded
from trace_rl.training_batch import Evidence, scored_tokens, token_denominators, training_batch

TRACE_ROUTES = {"key_spans": KEY, "error_spans": ERROR}
MIXED = [
    annotated("p", 0, 6, 1.0, key(1, 3), error(4, 5)),
    annotated("p", 1, 4, 0.0, key(0, 1), error(2, 4)),
]


def batch_at(rollouts: list[AnnotatedRollout], config: RunConfig, step: int = 0) -> TrainingBatch:
    rollouts = [at_version(item, step) for item in rollouts]
    routed = route_rollouts(rollouts, config, step)
    evidence = evidence_of(rollouts, config, step)
    return training_batch(routed, scored_tokens(routed, evidence, config), evidence, config, step)


def at_version(item: AnnotatedRollout, version: int) -> AnnotatedRollout:
    rollout = item.graded.rollout
    return annotated(
        rollout.prompt.prompt_id,
        rollout.sample,
        len(rollout.token_ids),
        item.graded.reward,
        *item.spans,
        finish_reason=rollout.finish_reason,
        version=version if rollout.newest_version >= 0 else -1,
    )


def by_position(sequence: TrainingSequence, route: int = 0) -> dict[int, float]:
    mine = sequence.route_index == route
    return dict(zip(sequence.route_positions[mine].tolist(), sequence.route_weight[mine].tolist(), strict=True))


def loss_and_gradient(batch: TrainingBatch, config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a batch under a random table of logits per token id, and its gradient with respect to the table."""
    packed = pack(batch.sequences, Padded())
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = table[packed.grid.input_ids.flatten()[packed.row_index]]
    head = torch.randn(HIDDEN, 40, generator=torch.Generator().manual_seed(1))
    teacher = packed.teacher_hidden @ head if packed.teacher_hidden.numel() else torch.zeros(0, 40)
    parts, _ = logits_loss(logits, packed.rows, objective_of(config.algorithm, 1.0), teacher)
    parts.total.backward()
    assert table.grad is not None
    return parts.total.detach(), table.grad


def test_denominators_by_hand() -> None:
    # two rollouts of 2 and 6 tokens: 1/(2 x 2) and 1/(2 x 6) a token, or 1/8 for every token, or 1/(2 x 10)
    assert token_denominators([2, 6], "seq-mean-token-mean", 10) == [4.0, 12.0]
    assert token_denominators([2, 6], "token-mean", 10) == [8.0, 8.0]
    assert token_denominators([2, 6], "seq-mean-token-sum-norm", 10) == [20.0, 20.0]
    assert token_denominators([], "token-mean", 10) == []


@pytest.mark.parametrize(
    ("aggregation", "per_token"),
    [
        ("seq-mean-token-mean", (1 / 12, 1 / 8)),
        ("token-mean", (1 / 10, 1 / 10)),
        ("seq-mean-token-sum-norm", (1 / 200, 1 / 200)),
    ],
)
def test_weights_carry_the_global_denominators(aggregation: str, per_token: tuple[float, float]) -> None:
    # |y| = 6 and 4; at step 25 lambda = 1/4 and the ramp is 1/2
    first, second = batch_at(MIXED, configured(TRACE_ROUTES, aggregation=aggregation), 25).sequences
    a, b = per_token
    assert first.pg_weight.tolist() == pytest.approx([a, a / 2, a / 2, a, a, a], rel=1e-6)
    assert by_position(first) == {1: pytest.approx(a / 4), 2: pytest.approx(a / 4)}
    assert second.pg_weight.tolist() == pytest.approx([b, b, b / 2, b / 2], rel=1e-6)
    assert by_position(second, 1) == {2: pytest.approx(b / 4), 3: pytest.approx(b / 4)}
    assert first.pg_weight.dtype == first.route_weight.dtype == first.advantages.dtype == np.float32


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean"])
def test_plain_weights_of_a_batch_sum_to_one(aggregation: str) -> None:
    rollouts = [annotated("p", sample, length, 1.0) for sample, length in enumerate((1, 5, 9, 17))]
    batch = batch_at(rollouts, configured(aggregation=aggregation))
    assert sum(item.pg_weight.sum() for item in batch.sequences) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("normalisation", "key_weight", "error_weight"),
    [
        # 3 key tokens and 2 error tokens are routed; lambda = 1
        ("policy", 1 / 14, 1 / 14),
        ("route-mean", 1 / 3, 1 / 2),
        ("routes-mean", 1 / 5, 1 / 5),
    ],
)
def test_normalisations_of_a_route(normalisation: str, key_weight: float, error_weight: float) -> None:
    constant = {"schedule": {"type": "constant", "value": 1.0}, "normalisation": normalisation}
    routes = {"key_spans": {**KEY, **constant}, "error_spans": {**ERROR, **constant}}
    rollouts = [*MIXED, annotated("q", 0, 4, 1.0, key(2, 3))]
    batch = batch_at(rollouts, configured(routes, aggregation="token-mean"))
    found = [by_position(item) | by_position(item, 1) for item in batch.sequences]
    k, e = pytest.approx(key_weight), pytest.approx(error_weight)
    assert found == [{1: k, 2: k}, {2: e, 3: e}, {2: k}]


@pytest.mark.parametrize(
    ("routes", "step"),
    [
        (TRACE_ROUTES, 40),
        (TRACE_ROUTES, 1000),
        ({"r": {**KEY, "schedule": {"type": "constant", "value": 0.0}}}, 0),
        ({"r": {**KEY, "multiplier": 0.0, "on_routed": "replace"}}, 0),
    ],
    ids=["after the schedule", "long after", "lambda 0", "multiplier 0"],
)
def test_lambda_zero_is_bit_equal_to_grpo(routes: Any, step: int) -> None:
    # token-mean: on-policy, the sequence means of a group's advantages cancel to a loss of 0
    grpo, other = configured(aggregation="token-mean"), configured(routes, aggregation="token-mean")
    grpo_loss, grpo_gradient = loss_and_gradient(batch_at(MIXED, grpo, step), grpo)
    zero_loss, zero_gradient = loss_and_gradient(batch_at(MIXED, other, step), other)
    assert grpo_loss != 0.0
    assert grpo_gradient.abs().max() > 0.0
    assert torch.equal(zero_loss, grpo_loss)
    assert torch.equal(zero_gradient, grpo_gradient)


def test_an_all_correct_group_learns_on_its_spans_only() -> None:
    group = [annotated("p", sample, 6, 1.0, key(2, 4)) for sample in range(2)]
    grpo, trace = configured(), configured(TRACE_ROUTES)
    _, grpo_gradient = loss_and_gradient(batch_at(group, grpo), grpo)
    assert (grpo_gradient == 0).all()
    _, gradient = loss_and_gradient(batch_at(group, trace), trace)
    # Token t has id 10 + t; the state that predicts token 2 is that of token 1 (id 11), and so on.
    assert torch.nonzero(gradient.abs().sum(-1)).flatten().tolist() == [11, 12]


def test_rollouts_of_other_weights_are_refused() -> None:
    config = configured()
    routed = route_rollouts(MIXED, config, 0)
    with pytest.raises(WeightSyncError, match=r"sample 0 of prompt p with .* version 0, expected 1 \(scheduling"):
        training_batch(routed, {}, Evidence([], {}), config, 1)


def older(step: int, max_staleness: int, *versions: int) -> TrainingBatch:
    """A completion whose tokens were written by these versions, beside a wrong one of the step's weights."""
    config = configured()
    scheduling = config.scheduling.model_copy(update={"max_staleness": max_staleness})
    config = config.model_copy(update={"scheduling": scheduling})
    rollouts = [annotated("p", 0, len(versions), 1.0, version=versions), annotated("p", 1, 3, 0.0, version=step)]
    return training_batch(route_rollouts(rollouts, config, step), {}, Evidence([], {}), config, step)


def test_staleness_is_counted_in_versions_for_each_token() -> None:
    first, second = older(4, 2, 2, 3, 3, 4).sequences
    assert first.staleness.tolist() == [2, 1, 1, 0]
    assert second.staleness.tolist() == [0, 0, 0]


def test_no_token_is_older_than_the_bound_or_newer_than_the_policy() -> None:
    assert len(older(4, 1, 3, 3, 4).sequences) == 2
    expected = r"sample 0 of prompt p with .* version 2, expected 3 to 4 \(scheduling\.max_staleness is 1\)"
    with pytest.raises(WeightSyncError, match=expected):
        older(4, 1, 2, 3, 4)
    with pytest.raises(WeightSyncError, match=r"version 5, expected 3 to 4"):
        older(4, 1, 4, 4, 5)
    with pytest.raises(WeightSyncError, match=r"version 3, expected 4 \(scheduling\.max_staleness is 0\)"):
        older(4, 0, 4, 4, 3)


def test_versions_3_3_4_at_step_4_are_weighed_by_hand() -> None:
    # The policy gives every token 1/2; the sampler gave them 1, 1/8 and 1/8. The ratios are 1/2, 4 (cut at 2) and 4,
    # which is not looked at, because version 4 is the one that is trained. The tokens have 1/6 of the loss each.
    batch = older(4, 1, 3, 3, 4)
    first = replace(batch.sequences[0], rollout_logprobs=np.log([1, 1 / 8, 1 / 8]), advantages=np.full(3, -3.0))
    policy = torch.full((3,), math.log(1 / 2), requires_grad=True)
    loss, _ = policy_loss(policy, None, pack([first], Padded()).rows, objective_of(configured().algorithm, 1.0))
    (slope,) = torch.autograd.grad(loss, policy)
    assert slope.tolist() == pytest.approx([3 / 6 * weight for weight in (1 / 2, 2, 1)], abs=1e-6)


def test_the_oldest_and_the_newest_version_are_those_of_any_token() -> None:
    rollout = annotated("p", 0, 3, 1.0, version=[3, 4, 4]).graded.rollout
    assert (rollout.oldest_version, rollout.newest_version) == (3, 4)
    for length in (0, 2):
        of_another = annotated("p", 0, length, 1.0, version=NOT_THE_POLICY).graded.rollout
        assert (of_another.oldest_version, of_another.newest_version) == (NOT_THE_POLICY, NOT_THE_POLICY)


def test_completions_that_are_not_the_policys_have_no_version() -> None:
    config = configured({"all": {**ALL, "action": "nll"}}, **NO_POLICY_GRADIENT)
    batch = batch_at([annotated("p", 0, 3, 1.0, version=-1)], config, 7)
    assert by_position(batch.sequences[0]) == {position: pytest.approx(1 / 3) for position in range(3)}
    assert batch.sequences[0].teacher_row.tolist() == [-1, -1, -1]
    assert batch.sequences[0].teacher_hidden.size == 0
    assert batch.sequences[0].staleness.tolist() == [0, 0, 0]


def test_each_row_finds_its_teacher_state() -> None:
    # Two routes of one view share states; a third looks with another context, a fourth reads none.
    routes = {
        "key": {**KEY, "context": "none", "on_routed": "keep"},
        "all": {**ALL, "action": "rkl", "context": "none"},
        "told": {**KEY, "context": "answer", "on_routed": "keep"},
        "likely": {**KEY, "action": "nll", "on_routed": "keep"},
    }
    (sequence,) = batch_at([annotated("p", 2, 4, 1.0, key(1, 3))], configured(routes)).sequences
    assert sequence.route_positions.tolist() == [1, 2, 0, 1, 2, 3, 1, 2, 1, 2]
    assert sequence.route_index.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3]
    assert len(sequence.teacher_hidden) == 4 + 2
    assert sequence.teacher_row.tolist() == [1, 2, 0, 1, 2, 3, 4, 5, -1, -1]
    states = sequence.teacher_hidden[:, 0].tolist()
    assert states == pytest.approx([2.0, 2.1, 2.2, 2.3, 2.1, 2.2])  # sample + position / 10


def test_states_in_bfloat16_stay_so() -> None:
    rollouts, config = [annotated("p", 2, 5, 1.0, key(1, 3)), annotated("p", 3, 2, 0.0)], configured({"key": KEY})
    evidence = evidence_of(rollouts, config)
    shipped = {
        place: replace(rows, hidden=states_array(torch.from_numpy(rows.hidden).bfloat16()))
        for place, rows in evidence.teacher_rows.items()
    }
    routed, evidence = route_rollouts(rollouts, config, 0), replace(evidence, teacher_rows=shipped)
    batch = training_batch(routed, scored_tokens(routed, evidence, config), evidence, config, 0)
    hidden = states_tensor(batch.sequences[0].teacher_hidden)
    assert torch.equal(hidden, torch.tensor([[2.1] * HIDDEN, [2.2] * HIDDEN]).bfloat16())
    assert torch.equal(pack(batch.sequences, Padded()).teacher_hidden, hidden)


def test_advantages_of_tokens_are_what_an_action_makes_of_them() -> None:
    # log q = -t/10 and log p = -1, so Delta = 1 - t/10 at token t; A = +-1/2. RLSD at lambda 1/2 with clip 0.2:
    # A [1/2 + 1/2 clip(exp(sign(A) Delta), 0.8, 1.2)]: 1/2 (1/2 + 0.6) = 0.55, and -1/2 (1/2 + 0.4) = -0.45
    action = {"type": "adv_mult", "clip": 0.2}
    route = {
        **ALL,
        "action": action,
        "schedule": {"type": "constant", "value": 0.5},
        "selector": {"tokens": "key_spans"},
    }
    route["selector"] = {"rollouts": "correct", "tokens": "key_spans"}
    wrong = {**route, "selector": {"rollouts": "wrong", "tokens": "error_spans"}}
    config = configured({"key": route, "error": wrong}, advantage={"type": "group", "std": "none"})
    first, second = batch_at(MIXED, config).sequences
    assert first.advantages.tolist() == pytest.approx([0.5, 0.55, 0.55, 0.5, 0.5, 0.5])
    assert second.advantages.tolist() == pytest.approx([-0.5, -0.5, -0.45, -0.45])
    assert first.pg_weight.tolist() == pytest.approx([1 / 12] * 6)
    assert len(first.route_positions) == 0


def test_a_route_that_replaces_the_policy_gradient_leaves_the_log_ratio_alone() -> None:
    route = {**ALL, "action": "pg_logratio", "on_routed": "replace"}
    (sequence,) = batch_at([annotated("p", 0, 3, 1.0)], configured({"all": route}, advantage="none")).sequences
    assert sequence.advantages.tolist() == pytest.approx([1.0, 0.9, 0.8])
    assert sequence.pg_weight.tolist() == pytest.approx([1 / 3] * 3)


def test_srpo_by_hand() -> None:
    # Four rollouts of 2, 2, 4 and 2 tokens with rewards 1, 0, 0 | 0: in the first group the wrong ones (samples 1, 2)
    # have a correct sibling, in the second none has. token-mean: every denominator is 10. Teacher entropies 0.1 (2
    # tokens) and 0.2 (4 tokens): w = exp(-H) over its mean (2 e^-0.1 + 4 e^-0.2) / 6.
    rollouts = [
        annotated("p", 0, 2, 1.0),
        annotated("p", 1, 2, 0.0),
        annotated("p", 2, 4, 0.0),
        annotated("q", 0, 2, 0.0),
    ]
    route = {
        **ALL,
        "selector": {"rollouts": ["wrong", "has_context"], "tokens": "all"},
        "action": "jsd",
        "token_weight": {"type": "teacher_entropy", "beta": 1.0},
        "on_routed": "replace",
        "context": "sibling_first",
    }
    config = configured({"wrong": route}, advantage={"type": "group", "std": "none"}, aggregation="token-mean")
    batch = batch_at(rollouts, config)
    mean = (2 * math.exp(-0.1) + 4 * math.exp(-0.2)) / 6
    assert [item.pg_weight.tolist() for item in batch.sequences] == [
        pytest.approx([0.1, 0.1]),
        [0.0, 0.0],
        [0.0] * 4,
        pytest.approx([0.1, 0.1]),
    ]
    assert batch.sequences[1].route_weight.tolist() == pytest.approx([0.1 * math.exp(-0.1) / mean] * 2)
    assert batch.sequences[2].route_weight.tolist() == pytest.approx([0.1 * math.exp(-0.2) / mean] * 4)
    # the advantage is that of the whole group, although only the first rollout uses it
    assert batch.sequences[0].advantages.tolist() == pytest.approx([2 / 3] * 2)
