"""Metrics of a step by hand."""

import pytest
from rollouts import ERROR, KEY, annotated, configured, error, key

from trace_rl.routing import route_rollouts
from trace_rl.step_metrics import rollout_metrics, route_metrics

TRACE = configured({"key_spans": KEY, "error_spans": ERROR})
ROLLOUTS = [
    annotated("p", 0, 6, 1.0, key(1, 3), error(4, 5)),
    annotated("p", 1, 4, 0.0, key(0, 1), error(2, 4)),
    annotated("q", 0, 10, 0.0, finish_reason="length"),
    annotated("q", 1, 4, 0.0),
]


def test_rollout_metrics_by_hand() -> None:
    assert rollout_metrics([item.graded for item in ROLLOUTS], 3) == {
        "reward/mean": 0.25,
        "reward/zero_variance_groups_frac": 0.5,
        "response/length_mean_tokens": 6.0,
        "response/truncated_frac": 0.25,
        "sampling/completions": 4.0,
        "sampling/trained_frac": 0.75,
    }


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
