"""Metrics of a step by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rollouts import ERROR, KEY, annotated, configured, error, key

from trace_rl.batch import RolloutKey, TeacherRequest, TeacherRows, TrainingBatch
from trace_rl.config.run import RunConfig
from trace_rl.flops import TeacherCost, TransformerShape
from trace_rl.routing import route_rollouts
from trace_rl.step_metrics import learner_work, rollout_metrics, route_metrics, staleness_metrics, teacher_metrics
from trace_rl.training_batch import Evidence, training_batch

TRACE = configured({"key_spans": KEY, "error_spans": ERROR})
ROLLOUTS = [
    annotated("p", 0, 6, 1.0, key(1, 3), error(4, 5)),
    annotated("p", 1, 4, 0.0, key(0, 1), error(2, 4)),
    annotated("q", 0, 10, 0.0, finish_reason="length"),
    annotated("q", 1, 4, 0.0),
]


def test_rollout_metrics_by_hand() -> None:
    assert rollout_metrics([item.graded for item in ROLLOUTS], 3) == {
        "reward/graded": 4.0,
        "reward/truncated": 0.0,
        "reward/timeouts": 0.0,
        "reward/errors": 0.0,
        "reward/zeros_frac": 0.75,
        "reward/mean": 0.25,
        "reward/zero_variance_groups_frac": 0.5,
        "response/length_mean_tokens": 6.0,
        "response/length_max_tokens": 10.0,
        "response/truncated_frac": 0.25,
        "sampling/completions": 4.0,
        "sampling/trained_frac": 0.75,
    }


def test_staleness_by_hand() -> None:
    config = configured()
    config = config.model_copy(update={"scheduling": config.scheduling.model_copy(update={"max_staleness": 3})})
    versions = {"p": [3, 3, 4, 5], "q": [5, 5, 5, 5]}
    routed = route_rollouts([annotated(name, 0, 4, 1.0, version=each) for name, each in versions.items()], config, 5)
    batch = training_batch(routed, {}, Evidence([], {}), config, 5)
    assert staleness_metrics(batch, 3) == {
        "staleness/0_frac": 5 / 8,
        "staleness/1_frac": 1 / 8,
        "staleness/2_frac": 2 / 8,
        "staleness/3_frac": 0.0,
        "staleness/mean": 5 / 8,
        "staleness/max": 2.0,
    }
    assert staleness_metrics(TrainingBatch(5, ()), 3) == {}
    in_turn = staleness_metrics(TrainingBatch(5, batch.sequences[1:]), 0)
    assert in_turn == {"staleness/0_frac": 1.0, "staleness/mean": 0.0, "staleness/max": 0.0}


def test_route_metrics_by_hand() -> None:
    metrics = route_metrics(route_rollouts(ROLLOUTS, TRACE, 25), TRACE.algorithm, 25)
    # steps 0 to 9 at 1/2, then 1/2 (1 - j/30) for j = 0 to 15, squared, for two routes
    exposure = 2 * (10 / 4 + sum((0.5 * (1 - j / 30)) ** 2 for j in range(16)))
    assert metrics == {
        "route/token_frac": pytest.approx(4 / 24),
        "route/rollouts_frac": 0.5,
        "exposure/lambda_sq_sum": pytest.approx(exposure),
        "route/key_spans/lambda": 0.25,
        "route/key_spans/policy_weight": 0.5,
        "route/key_spans/selected_frac": pytest.approx(2 / 24),
        "route/error_spans/lambda": 0.25,
        "route/error_spans/policy_weight": 0.5,
        "route/error_spans/selected_frac": pytest.approx(2 / 24),
    }
    after = route_metrics(route_rollouts(ROLLOUTS, TRACE, 40), TRACE.algorithm, 40)
    assert after["route/token_frac"] == after["route/key_spans/lambda"] == 0.0
    assert after["route/key_spans/policy_weight"] == 1.0


def test_the_exposure_of_the_published_schedule_is_finite() -> None:
    for step in (40, 10**4):
        metrics = route_metrics([], configured({"key": KEY}).algorithm, step)
        assert metrics["exposure/lambda_sq_sum"] == pytest.approx(5.12639, abs=5e-6)


def test_a_route_without_a_teacher_is_no_exposure() -> None:
    assert (
        route_metrics([], configured({"key": {**KEY, "action": "none"}}).algorithm, 3)["exposure/lambda_sq_sum"] == 0.0
    )


def test_nothing_trained_on_is_nothing_to_tell() -> None:
    assert rollout_metrics([], 0) == {}
    assert route_metrics([], TRACE.algorithm, 0)["route/token_frac"] == 0.0


def asked(sample: int, num_prompt_tokens: int, positions: list[int]) -> tuple[TeacherRequest, TeacherRows]:
    """Of a rollout of prompt p; its states are two numbers of 4 bytes."""
    name, last, found = RolloutKey("p", sample), positions[-1], np.array(positions)
    outputs = frozenset({"states"})
    request = TeacherRequest(name, 0, tuple(range(num_prompt_tokens)), tuple(range(last + 1)), found, outputs)
    states = np.zeros((len(found), 2), dtype=np.float32)
    return request, TeacherRows(name, 0, found, states, np.zeros(0), np.zeros(0))


def test_teacher_metrics_by_hand() -> None:
    # P = 5, L W = 1, d V = 10: F(T, R) = 10 T + 2 T^2 + 20 R
    shape = TransformerShape(num_layer_parameters=5, num_layers=1, attention_width=1, hidden=2, vocab=5)
    routed = route_rollouts(ROLLOUTS, TRACE, 0)
    requests, rows = zip(asked(0, 4, [1, 2]), asked(1, 3, [2, 3]), strict=True)
    # sent: F(4 + 3, 2) = 70 + 98 + 40 = 208, F(3 + 4, 2) = 208. In full: F(4 + 6, 6) = 100 + 200 + 120 = 420,
    # F(3 + 4, 4) = 70 + 98 + 80 = 248, and behind the student's prompt of 2 tokens
    # F(2 + 10, 10) = 120 + 288 + 200 = 608 and F(2 + 4, 4) = 60 + 72 + 80 = 212
    assert teacher_metrics(routed, [requests], rows, 1, TeacherCost((shape,))) == {
        "teacher/flops_saved_frac": pytest.approx(1 - 416 / (420 + 248 + 608 + 212)),
        "teacher/forward_tokens": 14.0,
        "teacher/state_bytes": 4 * 2 * 4.0,
    }
    # F(3, 0) = 30 + 18 of a prompt of 4 tokens that two requests have is done once where prompts are shared
    twice, cost = [asked(0, 4, [1, 2])[0], asked(1, 4, [2, 3])[0]], TeacherCost((shape,), shared_within=100)
    apart = teacher_metrics(routed, [twice], rows, 1, TeacherCost((shape,)))
    together = teacher_metrics(routed, [twice], rows, 1, cost)
    # F(4 + 3, 2) = 208, F(4 + 4, 2) = 80 + 128 + 40 = 248. In full: 420, F(4 + 4, 4) = 80 + 128 + 80 = 288, 608, 212
    assert apart["teacher/flops_saved_frac"] == pytest.approx(1 - 456 / 1528)
    assert together["teacher/flops_saved_frac"] == pytest.approx(1 - (456 - 48) / 1528)
    assert (apart["teacher/forward_tokens"], together["teacher/forward_tokens"]) == (15, 12)
    two_calls = teacher_metrics(routed, [[each] for each in twice], rows, 1, cost)
    assert two_calls["teacher/forward_tokens"] == 15  # a call shares nothing with another one
    # with 3 parameters that only read tokens go through 2 x 3 of each of 10 that are not read, of 14, is left out
    spared = TeacherCost((replace(shape, num_read_parameters=3),))
    found = teacher_metrics(routed, [requests], rows, 1, spared)
    assert found["teacher/flops_saved_frac"] == pytest.approx(1 - (416 - 60) / 1488)
    # of 12 tokens of the two with one prompt 8 are not read
    spared = TeacherCost(spared.shapes, shared_within=100)
    found = teacher_metrics(routed, [twice], rows, 1, spared)
    assert found["teacher/flops_saved_frac"] == pytest.approx(1 - (456 - 48 - 48) / 1528)
    # two equal models do twice the work on both sides; a second view that was not asked makes F of student prompts
    assert teacher_metrics(routed, [requests], rows, 1, TeacherCost((shape, shape))) == teacher_metrics(
        routed, [requests], rows, 1, TeacherCost((shape,))
    )
    # F(2 + 6, 6) = 80 + 128 + 120 = 328 and F(2 + 4, 4) = 212 for the two that were sent in the first view only
    two_views = teacher_metrics(routed, [requests], rows, 2, TeacherCost((shape,)))
    assert two_views["teacher/flops_saved_frac"] == pytest.approx(1 - 416 / (1488 + 328 + 212 + 608 + 212))


def with_learner(**settings: Any) -> RunConfig:
    config = configured()
    return config.model_copy(update={"learner": config.learner.model_copy(update=settings)})


def test_the_learners_work_by_hand() -> None:
    shape = TransformerShape(num_layer_parameters=5, num_layers=1, attention_width=1, hidden=2, vocab=5)
    routed = route_rollouts(ROLLOUTS[:2], configured(), 0)
    batch = training_batch(routed, {}, Evidence([], {}), configured(), 0)
    # prompts of 2 tokens: F(2 + 6, 6) = 80 + 128 + 120 = 328 and F(2 + 4, 4) = 60 + 72 + 80 = 212
    assert learner_work(batch, shape, configured()) == {
        "learner/tokens": 14.0,
        "learner/forward_tflop": pytest.approx((328 + 212) / 1e12),
    }
    # both have the same prompt, of which one token is computed once: F(1, 0) = 10 + 2
    assert batch.sequences[0].prompt_token_ids == batch.sequences[1].prompt_token_ids
    shared = learner_work(batch, shape, with_learner(layout="shared"))
    assert shared["learner/forward_tflop"] == pytest.approx((328 + 212 - 12) / 1e12)
    # the first alone can have a gradient
    plain = replace(batch.sequences[1], advantages=0 * batch.sequences[1].advantages)
    one = replace(batch, sequences=(batch.sequences[0], plain))
    assert learner_work(one, shape, configured())["learner/tokens"] == 14
    found = learner_work(one, shape, with_learner(measured_sequences="trained"))
    assert found == {"learner/tokens": 8.0, "learner/forward_tflop": pytest.approx(328 / 1e12)}


def test_a_teacher_that_was_not_asked_was_spared_everything() -> None:
    shape = TransformerShape(5, 1, 1, 2, 5)
    nothing = {"teacher/flops_saved_frac": 1.0, "teacher/forward_tokens": 0.0, "teacher/state_bytes": 0.0}
    routed = route_rollouts(ROLLOUTS, TRACE, 0)
    assert teacher_metrics(routed, [], [], 0, TeacherCost((shape,))) == nothing  # lambda is 0
    assert teacher_metrics(routed, [], [], 1, TeacherCost((shape,))) == nothing  # nobody found a span
    assert teacher_metrics([], [], [], 1, TeacherCost((shape,))) == nothing
    assert teacher_metrics(routed, [], [], 0, TeacherCost()) == {}


def test_scoring_everything_spares_nothing() -> None:
    shape = TransformerShape(5, 1, 1, 2, 5)
    routed = route_rollouts(ROLLOUTS[:2], TRACE, 0)
    requests, rows = zip(asked(0, 4, list(range(6))), asked(1, 3, list(range(4))), strict=True)
    assert teacher_metrics(routed, [requests], rows, 1, TeacherCost((shape,)))["teacher/flops_saved_frac"] == 0.0
