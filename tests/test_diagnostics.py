"""What a step did to the policy, by hand."""

import numpy as np
import pytest

from trace_rl.batch import RolloutKey, TokenStatistics
from trace_rl.diagnostics import EXPOSURE, Exposure, one_step_lift


def statistics(sample: int, policy: list[float], teacher: list[float], route: int = 0) -> TokenStatistics:
    none = np.zeros(len(policy))
    return TokenStatistics(RolloutKey("p", sample), route, none, none, np.array(policy), np.array(teacher))


def test_lift_by_hand() -> None:
    # supported: log q >= log p before, in the first and third token; lifts 0.5 and 0.1
    before = [statistics(0, [-2.0, -1.0], [-1.0, -3.0]), statistics(1, [-1.0], [-1.0])]
    after = [statistics(1, [-0.9], [-1.0]), statistics(0, [-1.5, -4.0], [-1.0, -3.0])]
    assert one_step_lift(before, after, ["key_spans"]) == {
        "diagnostics/key_spans/one_step_lift_nats": pytest.approx(0.3),
        "diagnostics/key_spans/lifted_tokens": 2.0,
    }


def test_each_route_has_a_lift_of_its_own_and_those_without_a_teacher_have_none() -> None:
    # the first route's token came up by 1 and the third's went down by 3; a mean over both would say -1
    before = [
        statistics(0, [-2.0], [-1.0], route=0),
        statistics(0, [-2.0], [], route=1),
        statistics(0, [-2.0], [-1.0], route=2),
    ]
    after = [
        statistics(0, [-5.0], [-1.0], route=2),
        statistics(0, [-9.0], [], route=1),
        statistics(0, [-1.0], [-1.0], route=0),
    ]
    assert one_step_lift(before, after, ["key", "plain", "error"]) == {
        "diagnostics/key/one_step_lift_nats": pytest.approx(1.0),
        "diagnostics/key/lifted_tokens": 1.0,
        "diagnostics/error/one_step_lift_nats": pytest.approx(-3.0),
        "diagnostics/error/lifted_tokens": 1.0,
    }


def test_without_supported_tokens_there_is_no_lift() -> None:
    assert one_step_lift([], [], ["r"]) == {}
    one = [statistics(0, [-1.0], [-2.0])]
    assert one_step_lift(one, one, ["r"]) == {}


def test_exposure_goes_on_where_a_run_left_off() -> None:
    exposure = Exposure(5, [{EXPOSURE: 1.0}, {"reward/mean": 0.5}])
    assert exposure.add({"reward/mean": 0.5}) == {}
    assert exposure.add({"diagnostics/routed_grad_norm": 0.2}) == {EXPOSURE: pytest.approx(2.0)}
    assert exposure.add({"diagnostics/routed_grad_norm": 0.1}) == {EXPOSURE: pytest.approx(2.5)}
