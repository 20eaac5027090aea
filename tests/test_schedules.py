"""Schedules: the published curve, number by number, and the ramp that hands tokens back to the policy gradient."""

import pytest

from trace_rl.config.algorithm import Route
from trace_rl.schedules import Constant, HoldThenLinear, Linear

PAPER = HoldThenLinear(initial=0.5, hold_steps=10, decay_steps=30)


def route(**settings: object) -> Route:
    selector = {"rollouts": "correct", "tokens": "key_spans"}
    return Route.model_validate({"selector": selector, "action": "fkl", "schedule": PAPER, **settings})


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.5), (9, 0.5), (10, 0.5), (11, 0.5 * 29 / 30), (25, 0.25), (39, 1 / 60), (40, 0.0), (41, 0.0), (10**6, 0.0)],
)
def test_the_published_schedule(step: int, expected: float) -> None:
    assert PAPER.at(step) == pytest.approx(expected, abs=1e-15)


def test_exposure_of_the_published_schedule() -> None:
    # hold: 10 x 0.5 = 5; decay: 0.5 (30 + 29 + ... + 1)/30 = 0.5 x 15.5 = 7.75
    values = [PAPER.at(step) for step in range(60)]
    assert sum(values) == pytest.approx(12.75, abs=1e-12)
    # hold: 10/4 = 2.5; decay: 1/4 x (30 x 31 x 61 / 6)/900 = 9455/3600
    assert sum(value**2 for value in values) == pytest.approx(2.5 + 9455 / 3600, abs=1e-12)
    assert sum(value**2 for value in values) == pytest.approx(5.12639, abs=5e-6)


def test_after_the_end_lambda_is_exactly_zero() -> None:
    assert [PAPER.at(step) for step in (40, 100)] == [0.0, 0.0]
    assert not route().is_active(40)
    assert route().is_active(39)


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
    assert [schedule.at(step) for step in range(4)] == values


def test_constant() -> None:
    assert [Constant(value=0.3).at(step) for step in (0, 7, 10**6)] == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(("step", "weight"), [(0, 0.0), (10, 0.0), (25, 0.5), (39, 29 / 30), (40, 1.0), (99, 1.0)])
def test_the_ramp_is_one_minus_lambda_over_its_start(step: int, weight: float) -> None:
    assert route().policy_weight(step) == pytest.approx(weight, abs=1e-15)


def test_the_ramp_does_not_depend_on_the_size_of_lambda_or_on_the_multiplier() -> None:
    small = route(schedule=HoldThenLinear(initial=0.01, hold_steps=10, decay_steps=30), multiplier=7.0)
    for step in range(45):
        assert small.policy_weight(step) == pytest.approx(route().policy_weight(step), abs=1e-12)


def test_keep_and_replace_do_not_ramp() -> None:
    for step in (0, 25, 39):
        assert route(on_routed="keep").policy_weight(step) == 1.0
        assert route(on_routed="replace").policy_weight(step) == 0.0


def test_a_route_that_has_ended_leaves_the_whole_policy_gradient() -> None:
    for on_routed in ("ramp", "keep", "replace"):
        assert route(on_routed=on_routed).policy_weight(40) == 1.0


def test_peak_values() -> None:
    assert PAPER.peak == 0.5
    assert Constant(value=0.3).peak == 0.3
    assert Linear(initial=0.1, final=0.4).peak == 0.4


def test_linear() -> None:
    # arXiv:2604.03128: 0.5 -> 0 in 50 steps
    schedule = Linear(initial=0.5, final=0.0, steps=50)
    assert [schedule.at(step) for step in (0, 25, 49, 50, 90)] == pytest.approx([0.5, 0.25, 0.01, 0.0, 0.0], abs=1e-15)
    assert Linear(initial=0.0, final=1.0, steps=4).at(3) == 0.75


@pytest.mark.parametrize(
    "settings", [{"multiplier": 0.0}, {"schedule": Constant(value=0.0)}, {"schedule": HoldThenLinear(initial=0.0)}]
)
def test_a_route_of_no_weight_is_never_active_and_takes_nothing(settings: dict[str, object]) -> None:
    assert not any(route(**settings).is_active(step) for step in range(50))


def test_the_ramp_of_a_schedule_that_is_zero_everywhere_is_one() -> None:
    assert route(schedule=Constant(value=0.0)).policy_weight(0) == 1.0
