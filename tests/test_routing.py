"""Routing: advantages per group, which tokens take which route with which weight, and the global denominators."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from trace_rl.absent import AbsentAnnotator, AbsentTeacher
from trace_rl.batch import (
    AnnotatedRollout,
    GradedRollout,
    Prompt,
    Rollout,
    RolloutKey,
    Span,
    TeacherRequest,
    TeacherRows,
    TrainingBatch,
)
from trace_rl.config.algorithm import Algorithm, Constant, PolicyGradient, Route, Selector
from trace_rl.errors import WeightSyncError
from trace_rl.packing import pack
from trace_rl.routing import (
    active_span_classes,
    route_rollouts,
    routing_metrics,
    token_denominators,
    training_batch,
)
from trace_rl.token_loss import route_losses, token_loss

KEY = Route(selector=Selector(rollouts="correct", tokens="key_spans"), action="fkl")
ERROR = Route(selector=Selector(rollouts="wrong", tokens="error_spans"), action="rkl")
GRPO = Algorithm()
TRACE = Algorithm(routes={"key_spans": KEY, "error_spans": ERROR})
HIDDEN = 3


def annotated(
    prompt_id: str, sample: int, length: int, reward: float, *spans: Span, finish_reason: str = "stop"
) -> AnnotatedRollout:
    rollout = Rollout(
        prompt=Prompt(prompt_id, "question", "answer"),
        sample=sample,
        prompt_token_ids=(7, 8),
        token_ids=tuple(range(10, 10 + length)),
        rollout_logprobs=-np.ones(length, dtype=np.float32),
        finish_reason=finish_reason,
        policy_version=0,
        text="text",
    )
    return AnnotatedRollout(GradedRollout(rollout, reward, "graded"), spans, "annotated")


def key(start: int, end: int) -> Span:
    return Span(start, end, "key", "arith")


def error(start: int, end: int) -> Span:
    return Span(start, end, "error", "copy")


def batch_at(rollouts: list[AnnotatedRollout], algorithm: Algorithm, step: int) -> TrainingBatch:
    routed = route_rollouts(rollouts, algorithm, step)
    rows = {
        item.annotated.graded.rollout.key: TeacherRows(
            item.annotated.graded.rollout.key, np.full((int(item.is_routed.sum()), HIDDEN), 0.5, dtype=np.float32)
        )
        for item in routed
    }
    return training_batch(routed, rows, algorithm, step, policy_version=0)


def loss_and_gradient(batch: TrainingBatch, algorithm: Algorithm) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a batch under a random table of logits per token id, and its gradient with respect to the table."""
    packed = pack(batch.sequences)
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = table[packed.input_ids.flatten()[packed.row_index]]
    head = torch.randn(HIDDEN, 40, generator=torch.Generator().manual_seed(1))
    teacher = packed.teacher_hidden @ head if packed.teacher_hidden.numel() else torch.zeros(0, 40)
    loss, _ = token_loss(logits, packed.rows, algorithm.policy_gradient, route_losses(algorithm), teacher)
    loss.backward()
    assert table.grad is not None
    return loss.detach(), table.grad


# A mixed group with spans of both classes on each rollout: only the class that fits the reward may be routed.
MIXED = [
    annotated("p", 0, 6, 1.0, key(1, 3), error(4, 5)),
    annotated("p", 1, 4, 0.0, key(0, 1), error(2, 4)),
]


def test_key_spans_are_routed_on_correct_rollouts_and_error_spans_on_wrong_ones() -> None:
    correct, wrong = route_rollouts(MIXED, TRACE, step=0)
    assert correct.route_index.tolist() == [-1, 0, 0, -1, -1, -1]
    assert wrong.route_index.tolist() == [-1, -1, 1, 1]
    assert correct.is_routed.tolist() == [False, True, True, False, False, False]


def test_a_class_without_a_route_keeps_its_policy_gradient() -> None:
    correct, wrong = route_rollouts(MIXED, Algorithm(routes={"key_spans": KEY}), step=0)
    assert correct.pg_weight.tolist() == [1, 0, 0, 1, 1, 1]
    assert wrong.pg_weight.tolist() == [1, 1, 1, 1]
    assert not wrong.is_routed.any()


# lambda and the ramp 1 - lambda/lambda_0 at steps of the published schedule (0.5, hold 10, decay 30)
@pytest.mark.parametrize(("step", "kl", "pg"), [(0, 0.5, 0.0), (10, 0.5, 0.0), (25, 0.25, 0.5), (39, 1 / 60, 29 / 30)])
def test_weights_follow_the_schedule(step: int, kl: float, pg: float) -> None:
    correct, _ = route_rollouts(MIXED, TRACE, step)
    assert correct.kl_weight.tolist() == pytest.approx([0, kl, kl, 0, 0, 0], abs=1e-12)
    assert correct.pg_weight.tolist() == pytest.approx([1, pg, pg, 1, 1, 1], abs=1e-12)


@pytest.mark.parametrize(("on_routed", "pg"), [("ramp", 0.0), ("keep", 1.0), ("replace", 0.0)])
def test_policy_gradient_on_routed_tokens(on_routed: str, pg: float) -> None:
    algorithm = Algorithm(routes={"r": KEY.model_copy(update={"on_routed": on_routed, "multiplier": 3.0})})
    correct, _ = route_rollouts(MIXED, algorithm, step=0)
    assert correct.pg_weight.tolist() == [1, pg, pg, 1, 1, 1]
    assert correct.kl_weight.tolist() == [0, 1.5, 1.5, 0, 0, 0]  # 0.5 x 3


def test_a_token_belongs_to_the_first_route_that_selects_it() -> None:
    second = KEY.model_copy(update={"schedule": Constant(value=0.125), "on_routed": "keep"})
    algorithm = Algorithm(routes={"first": KEY, "second": second})
    correct, _ = route_rollouts(MIXED, algorithm, step=0)
    assert correct.route_index.tolist() == [-1, 0, 0, -1, -1, -1]
    # at step 40 the first route has ended, and the second one has its place
    correct, _ = route_rollouts(MIXED, algorithm, step=40)
    assert correct.route_index.tolist() == [-1, 1, 1, -1, -1, -1]
    assert correct.kl_weight.tolist() == [0, 0.125, 0.125, 0, 0, 0]


def test_overlapping_spans_count_once() -> None:
    (routed,) = route_rollouts([annotated("p", 0, 6, 1.0, key(1, 4), key(3, 5))], TRACE, step=0)
    assert routed.kl_weight.tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0]


def test_only_classes_with_an_active_route_are_annotated() -> None:
    assert active_span_classes(GRPO, 0) == frozenset()
    assert active_span_classes(TRACE, 0) == {"key", "error"}
    assert active_span_classes(Algorithm(routes={"r": KEY}), 39) == {"key"}
    assert active_span_classes(TRACE, 40) == frozenset()


def test_advantages_compare_the_completions_of_one_prompt() -> None:
    # p: 1, 0 -> mean 1/2, sample std sqrt(1/2) -> +-1/sqrt 2; q: all correct -> 0
    rollouts = [
        annotated("q", 1, 2, 1.0),
        annotated("p", 1, 2, 0.0),
        annotated("q", 0, 2, 1.0),
        annotated("p", 0, 2, 1.0),
    ]
    routed = route_rollouts(rollouts, GRPO, step=0)
    assert [item.annotated.graded.rollout.key for item in routed] == [("p", 0), ("p", 1), ("q", 0), ("q", 1)]
    root = 0.5**0.5
    assert [item.advantage for item in routed] == pytest.approx([root, -root, 0.0, 0.0], abs=2e-6)
    assert routed[2].advantage == routed[3].advantage == 0.0


def test_the_order_of_arrival_does_not_matter() -> None:
    rollouts = [annotated(prompt, sample, 4, float(sample == 1), key(1, 3)) for prompt in "ba" for sample in (2, 0, 1)]
    one, other = batch_at(rollouts, TRACE, 0), batch_at(rollouts[::-1], TRACE, 0)
    assert [item.key for item in one.sequences] == [item.key for item in other.sequences]
    for left, right in zip(one.sequences, other.sequences, strict=True):
        assert left.advantage == right.advantage
        assert np.array_equal(left.kl_positions, right.kl_positions)


def test_an_empty_rollout_counts_in_its_group_and_is_left_out() -> None:
    rollouts = [annotated("p", 0, 0, 0.0), annotated("p", 1, 3, 1.0)]
    (routed,) = route_rollouts(rollouts, GRPO, step=0)
    assert routed.annotated.graded.rollout.key == ("p", 1)
    assert routed.advantage == pytest.approx(0.5**0.5, abs=2e-6)


def test_denominators_by_hand() -> None:
    # two rollouts of 2 and 6 tokens: 1/(2 x 2) and 1/(2 x 6) a token, or 1/8 for every token
    assert token_denominators([2, 6], "seq-mean-token-mean") == [4.0, 12.0]
    assert token_denominators([2, 6], "token-mean") == [8.0, 8.0]
    assert token_denominators([], "token-mean") == []


@pytest.mark.parametrize(
    ("aggregation", "per_token"), [("seq-mean-token-mean", (1 / 12, 1 / 8)), ("token-mean", (1 / 10, 1 / 10))]
)
def test_weights_carry_the_global_denominators(aggregation: str, per_token: tuple[float, float]) -> None:
    # |y| = 6 and 4; at step 25 lambda = 1/4 and the ramp is 1/2
    first, second = batch_at(MIXED, TRACE.model_copy(update={"aggregation": aggregation}), 25).sequences
    a, b = per_token
    assert first.pg_weight.tolist() == pytest.approx([a, a / 2, a / 2, a, a, a], rel=1e-6)
    assert first.kl_weight.tolist() == pytest.approx([a / 4, a / 4], rel=1e-6)
    assert first.kl_positions.tolist() == [1, 2]
    assert first.kl_route.tolist() == [0, 0]
    assert second.pg_weight.tolist() == pytest.approx([b, b, b / 2, b / 2], rel=1e-6)
    assert second.kl_weight.tolist() == pytest.approx([b / 4, b / 4], rel=1e-6)
    assert second.kl_route.tolist() == [1, 1]
    assert first.pg_weight.dtype == first.kl_weight.dtype == np.float32


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "token-mean"])
def test_plain_weights_of_a_batch_sum_to_one(aggregation: str) -> None:
    rollouts = [annotated("p", sample, length, 1.0) for sample, length in enumerate((1, 5, 9, 17))]
    batch = batch_at(rollouts, Algorithm(aggregation=aggregation), 0)
    assert sum(item.pg_weight.sum() for item in batch.sequences) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "step"),
    [
        (TRACE, 40),
        (TRACE, 1000),
        (Algorithm(routes={"r": KEY.model_copy(update={"schedule": Constant(value=0.0)})}), 0),
        (Algorithm(routes={"r": KEY.model_copy(update={"multiplier": 0.0, "on_routed": "replace"})}), 0),
    ],
    ids=["after the schedule", "long after", "lambda 0", "multiplier 0"],
)
def test_lambda_zero_is_bit_equal_to_grpo(algorithm: Algorithm, step: int) -> None:
    # token-mean: on-policy, the sequence means of a group's advantages cancel to a loss of 0
    grpo, algorithm = (each.model_copy(update={"aggregation": "token-mean"}) for each in (GRPO, algorithm))
    grpo_loss, grpo_gradient = loss_and_gradient(batch_at(MIXED, grpo, step), grpo)
    zero_loss, zero_gradient = loss_and_gradient(batch_at(MIXED, algorithm, step), algorithm)
    assert grpo_loss != 0.0
    assert grpo_gradient.abs().max() > 0.0
    assert torch.equal(zero_loss, grpo_loss)
    assert torch.equal(zero_gradient, grpo_gradient)


def test_without_spans_trace_is_bit_equal_to_grpo_from_the_first_step() -> None:
    bare = [replace(item, spans=()) for item in MIXED]
    grpo_loss, grpo_gradient = loss_and_gradient(batch_at(bare, GRPO, 0), GRPO)
    loss, gradient = loss_and_gradient(batch_at(bare, TRACE, 0), TRACE)
    assert torch.equal(loss, grpo_loss)
    assert torch.equal(gradient, grpo_gradient)


def test_an_all_correct_group_learns_on_its_spans_only() -> None:
    group = [annotated("p", sample, 6, 1.0, key(2, 4)) for sample in range(2)]
    _, grpo_gradient = loss_and_gradient(batch_at(group, GRPO, 0), GRPO)
    assert (grpo_gradient == 0).all()
    _, gradient = loss_and_gradient(batch_at(group, TRACE, 0), TRACE)
    # Token t has id 10 + t; the state that predicts token 2 is that of token 1 (id 11), and so on.
    assert torch.nonzero(gradient.abs().sum(-1)).flatten().tolist() == [11, 12]


def test_teacher_rows_must_match_the_routed_tokens() -> None:
    routed = route_rollouts(MIXED, TRACE, 0)
    rows = {key: TeacherRows(key, np.zeros((1, HIDDEN), dtype=np.float32)) for key in (RolloutKey("p", 0), ("p", 1))}
    with pytest.raises(ValueError, match="2 routed tokens but 1 teacher rows"):
        training_batch(routed, rows, TRACE, 0, 0)


def test_rollouts_of_other_weights_are_refused() -> None:
    routed = route_rollouts(MIXED, GRPO, 0)
    with pytest.raises(WeightSyncError, match=r"weights of version \[0\], expected 1 only"):
        training_batch(routed, {}, GRPO, 0, policy_version=1)


def test_metrics_by_hand() -> None:
    rollouts = [
        *MIXED,
        annotated("q", 0, 10, 0.0, finish_reason="length"),
        annotated("q", 1, 4, 0.0),
    ]
    metrics = routing_metrics(route_rollouts(rollouts, TRACE, 25), TRACE, 25)
    assert metrics == {
        "reward/mean": 0.25,
        "reward/zero_variance_groups_frac": 0.5,
        "response/length_mean_tokens": 6.0,
        "response/truncated_frac": 0.25,
        "route/token_frac": pytest.approx(4 / 24),
        "route/rollouts_frac": 0.5,
        "route/key_spans/lambda": 0.25,
        "route/key_spans/policy_weight": 0.5,
        "route/error_spans/lambda": 0.25,
        "route/error_spans/policy_weight": 0.5,
    }
    after = routing_metrics(route_rollouts(rollouts, TRACE, 40), TRACE, 40)
    assert after["route/token_frac"] == after["route/key_spans/lambda"] == 0.0
    assert after["route/key_spans/policy_weight"] == 1.0


def test_the_policy_gradient_settings_decide_the_advantage() -> None:
    algorithm = Algorithm(policy_gradient=PolicyGradient(std="none"))
    assert [item.advantage for item in route_rollouts(MIXED, algorithm, 0)] == [0.5, -0.5]


def test_stand_ins_pass_everything_on_and_refuse_real_work() -> None:
    graded = [item.graded for item in MIXED]
    passed = list(AbsentAnnotator().annotate(iter(graded), frozenset()))
    assert [item.graded for item in passed] == graded
    assert {(item.spans, item.cause) for item in passed} == {((), "not_requested")}
    assert AbsentAnnotator().metrics() == {}
    with pytest.raises(ValueError, match="no annotator"):
        list(AbsentAnnotator().annotate(graded, frozenset({"key"})))
    assert AbsentTeacher().score([]) == []
    assert AbsentTeacher().refresh(0) is False
    request = TeacherRequest(RolloutKey("p", 0), (1,), (2,), np.array([0]))
    with pytest.raises(ValueError, match="no teacher"):
        AbsentTeacher().score([request])
