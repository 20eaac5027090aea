"""Idle shares against a clock that the test moves."""

from concurrent.futures import Future

import pytest

from trace_rl.workers.idle import IdleMeter, IdleShares


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_idle_is_the_time_in_which_nothing_was_open():
    clock = Clock()
    meter = IdleMeter(clock)
    clock.now += 2  # idle
    meter.begin(2)
    clock.now += 3
    meter.end()
    clock.now += 1  # one is still open
    meter.end()
    clock.now += 4  # idle
    reading = meter.read()
    assert (reading.idle_frac, reading.busy_s) == pytest.approx((6 / 10, 4))
    with meter.busy():
        clock.now += 1
    clock.now += 3
    assert meter.read().idle_frac == pytest.approx(3 / 4)  # since the last reading


def test_a_reading_in_the_middle_of_work_divides_it():
    clock = Clock()
    meter = IdleMeter(clock)
    answer = Future()
    meter.until(answer)
    clock.now += 5
    assert meter.read().idle_frac == 0
    clock.now += 5
    answer.set_result(1)
    clock.now += 5
    assert meter.read().idle_frac == pytest.approx(0.5)
    assert meter.read().idle_frac == 1  # no time has passed, and nothing is open


def test_shares_are_means_over_the_actors_of_a_role():
    clock = Clock()
    engines = [IdleMeter(clock), IdleMeter(clock)]
    engines[0].begin()
    clock.now += 1
    shares = IdleShares({"generator": engines, "teacher": []})
    assert shares.metrics() == {"idle/generator_frac": 0.5, "busy/generator_s": 0.5}
