"""Schedules: the published curve, number by number, and the ramp that hands tokens back to the policy gradient."""

import pytest

from trace_rl.config.algorithm import Constant, HoldThenLinear, Route, Selector
from trace_rl.schedules import is_active, peak_value, routed_policy_weight, schedule_value

PAPER = HoldThenLinear(initial=0.5, hold_steps=10, decay_steps=30)
SELECTOR = Selector(rollouts="correct", tokens="key_spans")


def route(**settings: object) -> Route:
    return Route(**{"selector": SELECTOR, "action": "fkl", "schedule": PAPER, **settings})


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.5), (9, 0.5), (10, 0.5), (11, 0.5 * 29 / 30), (25, 0.25), (39, 1 / 60), (40, 0.0), (41, 0.0), (10**6, 0.0)],
)
def test_the_published_schedule(step: int, expected: float) -> None:
    assert schedule_value(PAPER, step) == pytest.approx(expected, abs=1e-15)


def test_exposure_of_the_published_schedule() -> None:
    # hold: 10 x 0.5 = 5; decay: 0.5 (30 + 29 + ... + 1)/30 = 0.5 x 15.5 = 7.75
    values = [schedule_value(PAPER, step) for step in range(60)]
    assert sum(values) == pytest.approx(12.75, abs=1e-12)
    # hold: 10/4 = 2.5; decay: 1/4 x (30 x 31 x 61 / 6)/900 = 9455/3600
    assert sum(value**2 for value in values) == pytest.approx(2.5 + 9455 / 3600, abs=1e-12)
    assert sum(value**2 for value in values) == pytest.approx(5.12639, abs=5e-6)


def test_after_the_end_lambda_is_exactly_zero() -> None:
    assert [schedule_value(PAPER, step) for step in (40, 100)] == [0.0, 0.0]
    assert not is_active(route(), 40)
    assert is_active(route(), 39)


@pytest.mark.parametrize(
    ("hold", "decay", "values"),
    [
        (2, 0, [0.5, 0.5, 0.0, 0.0]),
        (0, 2, [0.5, 0.25, 0.0, 0.0]),
        (0, 0, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_hold_or_decay_may_be_empty(hold: int, decay: int, values: list[float]) -> None:
    schedule = HoldThenLinear(initial=0.5, hold_steps=hold, decay_steps=decay)
    assert [schedule_value(schedule, step) for step in range(4)] == values


def test_constant() -> None:
    assert [schedule_value(Constant(value=0.3), step) for step in (0, 7, 10**6)] == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (10, 0.0), (25, 0.5), (39, 29 / 30), (40, 1.0), (99, 1.0)])
def test_the_ramp_is_one_minus_lambda_over_its_start(step: int, weight: float) -> None:
    assert routed_policy_weight(route(), step) == pytest.approx(weight, abs=1e-15)


def test_the_ramp_does_not_depend_on_the_size_of_lambda_or_on_the_multiplier() -> None:
    small = route(schedule=HoldThenLinear(initial=0.01, hold_steps=10, decay_steps=30), multiplier=7.0)
    for step in range(45):
        assert routed_policy_weight(small, step) == pytest.approx(routed_policy_weight(route(), step), abs=1e-12)


def test_keep_and_replace_ignore_the_schedule() -> None:
    for step in (0, 25, 60):
        assert routed_policy_weight(route(on_routed="keep"), step) == 1.0
        assert routed_policy_weight(route(on_routed="replace"), step) == 0.0


def test_peak_values() -> None:
    assert peak_value(PAPER) == 0.5
    assert peak_value(Constant(value=0.3)) == 0.3


@pytest.mark.parametrize(
    "settings", [{"multiplier": 0.0}, {"schedule": Constant(value=0.0)}, {"schedule": HoldThenLinear(initial=0.0)}]
)
def test_a_route_of_no_weight_is_never_active_and_takes_nothing(settings: dict[str, object]) -> None:
    assert not any(is_active(route(**settings), step) for step in range(50))


def test_the_ramp_of_a_schedule_that_is_zero_everywhere_is_one() -> None:
    assert routed_policy_weight(route(schedule=Constant(value=0.0)), 0) == 1.0
