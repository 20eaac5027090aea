"""Limits of annotation requests: the rate in every window, the breaker's states, and a budget that holds."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_rl.annotators import Budget
from trace_rl.workers.annotation_limits import CircuitBreaker, Purse, Spent, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_without_a_rate_nothing_waits() -> None:
    bucket = TokenBucket(0, Clock())
    assert [bucket.reserve() for _ in range(1000)] == [0.0] * 1000


def test_a_second_worth_of_requests_goes_at_once_and_the_rest_in_turn() -> None:
    """240 a minute are 4 a second: 4 go at once, then one each 0.25 s; 1 s of silence fills the bucket, 9 s do too."""
    clock = Clock()
    bucket = TokenBucket(240, clock)
    assert [bucket.reserve() for _ in range(7)] == [0, 0, 0, 0, 0.25, 0.5, 0.75]
    clock.now += 0.75 + 9
    assert [bucket.reserve() for _ in range(5)] == [0, 0, 0, 0, 0.25]


def test_a_slow_rate_lets_one_through_at_a_time() -> None:
    """6 a minute: one at once, the second after 10 s; booked 4 s later, the third waits for 16 s."""
    clock = Clock()
    bucket = TokenBucket(6, clock)
    assert [bucket.reserve(), bucket.reserve()] == [0, 10]
    clock.now += 4
    assert bucket.reserve() == pytest.approx(16)


@given(
    per_minute=st.floats(1, 10_000),
    pauses=st.lists(st.one_of(st.just(0.0), st.floats(0, 0.2), st.floats(0, 120)), min_size=1, max_size=80),
)
def test_no_window_holds_more_than_the_capacity_and_its_share_of_the_rate(
    per_minute: float, pauses: list[float]
) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    sent = []
    for pause in pauses:
        clock.now += pause
        sent.append(clock.now + bucket.reserve())
    assert sent == sorted(sent)
    rate, capacity = per_minute / 60, max(1.0, per_minute / 60)
    for first in range(len(sent)):
        for last in range(first, len(sent)):
            assert last - first + 1 <= capacity + rate * (sent[last] - sent[first]) + 1e-6


@given(st.floats(1, 10_000))
def test_whoever_asks_all_the_time_gets_the_whole_rate(per_minute: float) -> None:
    """The n-th request after the capacity is sent (n - capacity) / rate seconds later, not after that."""
    bucket = TokenBucket(per_minute, Clock())
    rate, capacity = per_minute / 60, max(1.0, per_minute / 60)
    waits = [bucket.reserve() for _ in range(300)]
    assert waits == pytest.approx([max(0.0, (n - capacity) / rate) for n in range(1, 301)], abs=1e-6)


def opened(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(failures=3, pause_s=30, clock=clock)
    for _ in range(3):
        assert breaker.admit()
        breaker.failed()
    return breaker


def test_only_failures_in_a_row_open_the_breaker() -> None:
    breaker = CircuitBreaker(failures=3, pause_s=30, clock=Clock())
    for _ in range(5):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
        assert breaker.admit() and not breaker.is_open
    breaker.failed()
    breaker.failed()
    assert breaker.admit()
    breaker.failed()
    assert breaker.is_open and not breaker.admit()


def test_one_trial_after_the_pause_and_its_success_closes() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 29.9
    assert not breaker.admit()
    clock.now += 0.1
    assert [breaker.admit() for _ in range(4)] == [True, False, False, False] and breaker.is_open
    breaker.succeeded()
    assert [breaker.admit() for _ in range(4)] == [True] * 4 and not breaker.is_open


def test_a_failed_trial_opens_for_another_pause() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 31
    assert breaker.admit()
    clock.now += 20
    breaker.failed()
    clock.now += 29.9
    assert not breaker.admit()
    clock.now += 0.1
    assert breaker.admit()


def test_a_trial_that_never_reports_is_replaced_a_pause_later() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += 30
    assert breaker.admit()
    clock.now += 29.9
    assert not breaker.admit()
    clock.now += 0.1
    assert breaker.admit() and not breaker.admit()


def test_a_trial_that_is_not_sent_makes_room_for_another() -> None:
    clock = Clock()
    breaker = opened(clock)
    breaker.cancelled()  # of a request that was admitted before: there is no trial yet
    assert not breaker.admit()
    clock.now += 30
    assert breaker.admit() and not breaker.admit()
    breaker.cancelled()
    assert breaker.admit() and not breaker.admit()


def test_late_reports_of_earlier_requests() -> None:
    """A failure while the breaker is open does not prolong the pause; a success shows that the server answers."""
    clock = Clock()
    breaker = opened(clock)
    clock.now += 25
    breaker.failed()
    clock.now += 5
    assert breaker.admit()
    breaker = opened(clock)
    breaker.succeeded()
    assert not breaker.is_open and breaker.admit()


PRICED = Budget(money=1.0, price_per_million_prompt_tokens=1000, price_per_million_completion_tokens=4000)


def test_money_is_booked_before_it_is_spent() -> None:
    """100 prompt and 50 completion tokens cost 0.1 + 0.2 = 0.3: three fit into 1.0; after one of them was answered in 0
    completion tokens, 0.1 + 0.3 + 0.3 + 0.3 = 1.0 fit too."""
    purse = Purse(PRICED, Spent())
    first, second, third = (purse.reserve(100, 50) for _ in range(3))
    assert first and second and third and purse.reserve(100, 50) is None
    assert first.settle(100, 0) == Spent(1, 100, 0, 0.1) == purse.spent
    assert purse.reserve(100, 50) is not None and purse.reserve(1, 0) is None


def test_an_unlimited_budget_still_counts() -> None:
    purse = Purse(Budget(price_per_million_prompt_tokens=1000), Spent(5, 7, 9, 2.0))
    booked = purse.reserve(10**9, 10**9)
    assert booked is not None and purse.spent == Spent(5, 7, 9, 2.0)
    assert booked.settle(200, 30, requests=2) == Spent(2, 200, 30, 0.2)
    assert purse.spent == Spent(7, 207, 39, 2.2)


def test_requests_count_even_where_they_fail_and_tokens_as_the_server_counts_them() -> None:
    purse = Purse(Budget(requests=3, tokens=300), Spent(requests=1))
    failed = purse.reserve(100, 100)
    assert failed is not None and purse.reserve(101, 0) is None and purse.reserve(50, 50) is not None
    failed.settle(0, 0)
    assert purse.spent == Spent(requests=2)  # and one under way: 3
    assert purse.reserve(0, 0) is None


def test_what_was_spent_before_a_resume_counts() -> None:
    assert Purse(Budget(tokens=300), Spent(1, 200, 50)).reserve(30, 20) is not None
    assert Purse(Budget(tokens=300), Spent(1, 200, 50)).reserve(31, 20) is None
    assert Purse(PRICED, Spent(money=0.9)).reserve(100, 1) is None
    assert Purse(PRICED, Spent(money=0.9)).reserve(100, 0) is not None
    to_the_cent = PRICED.model_copy(update={"money": 0.3})  # and 0.1 + 0.2 > 0.3 in floating point
    assert Purse(to_the_cent, Spent(money=0.1)).reserve(200, 0) is not None


def test_a_reservation_is_closed_once_and_a_cancelled_one_leaves_nothing() -> None:
    purse = Purse(Budget(requests=1), Spent())
    booked = purse.reserve(10, 10)
    assert booked is not None
    booked.cancel()
    assert purse.spent == Spent()
    again = purse.reserve(10, 10)
    assert again is not None
    again.settle(1, 1)
    for close in (booked.cancel, again.cancel, lambda: again.settle(1, 1)):
        with pytest.raises(ValueError, match="second time"):
            close()
    assert purse.spent == Spent(1, 1, 1)


@given(st.integers(0, 2**32), st.integers(0, 30), st.integers(0, 3000), st.floats(0, 3))
def test_no_order_of_requests_overspends(seed: int, requests: int, tokens: int, money: float) -> None:
    """Answers as long as the estimate at most, in any order, some cancelled, some failed."""
    budget = Budget(
        requests=requests,
        tokens=tokens,
        money=money,
        price_per_million_prompt_tokens=700,
        price_per_million_completion_tokens=1300,
    )
    draw = random.Random(seed)
    purse = Purse(budget, Spent())
    under_way = []
    for _ in range(200):
        if draw.random() < 0.6 or not under_way:
            size = (draw.randint(0, 200), draw.randint(1, 200))
            if booked := purse.reserve(*size):
                under_way.append((booked, size))
            continue
        booked, (prompt, completion) = under_way.pop(draw.randrange(len(under_way)))
        if draw.random() < 0.1:
            booked.cancel()
        else:
            booked.settle(draw.randint(0, prompt), draw.randint(0, completion))
    for booked, size in under_way:
        booked.settle(*size)
    spent = purse.spent
    assert not requests or spent.requests <= requests
    assert not tokens or spent.prompt_tokens + spent.completion_tokens <= tokens
    assert not money or spent.money <= money * (1 + 1e-9)
