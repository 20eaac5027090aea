"""Items go through a role as they come: none is lost, none waits for another, every failure has a name."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_rl.errors import WorkerError
from trace_rl.workers.streaming import Call, Gate, Unserved, stream


def call(serve: Callable[[Sequence[int]], Sequence[int]], **options: object) -> Call[int, int]:
    """A role of two threads that does not want negative numbers."""
    pool = ThreadPoolExecutor(2)
    settings = {"deadline_s": lambda num_served: 10.0, "is_wanted": lambda item: item >= 0, **options}
    return Call(
        submit=lambda batch: pool.submit(serve, batch),
        suspect="the doubler",
        doing="doubling",
        **settings,  # type: ignore[arg-type]
    )


def double(batch: Sequence[int]) -> list[int]:
    return [2 * item for item in batch]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5, 100)), st.integers(1, 5), st.integers(1, 3))
def test_every_item_comes_out_once(items: list[int], max_batch: int, max_in_flight: int) -> None:
    out = list(stream(items, call(double, max_batch=max_batch, gate=Gate(max_in_flight))))
    expected = [(item, 2 * item if item >= 0 else Unserved.SKIPPED) for item in items]
    assert sorted(out, key=str) == sorted(expected, key=str)


def test_results_come_out_while_the_producer_is_still_busy() -> None:
    first_is_out = threading.Event()

    def producer() -> Iterator[int]:
        yield 1
        assert first_is_out.wait(10), "the first result waited for the second item"
        yield 2

    out = []
    for pair in stream(producer(), call(double)):
        out.append(pair)
        first_is_out.set()
    assert out == [(1, 2), (2, 4)]


def test_batches_fill_while_calls_are_under_way() -> None:
    sizes = []

    def serve(batch: Sequence[int]) -> list[int]:
        sizes.append(len(batch))
        time.sleep(0.05)
        return double(batch)

    assert len(list(stream(range(300), call(serve, max_batch=100, gate=Gate(1))))) == 300
    assert sum(sizes) == 300 and len(sizes) <= 6 and max(sizes) <= 100


def test_late_calls_give_up_their_items() -> None:
    released = threading.Event()

    def serve(batch: Sequence[int]) -> list[int]:
        if 7 in batch:
            released.wait(10)
        return double(batch)

    started = time.monotonic()
    late_call = call(serve, max_batch=1, deadline_s=lambda num_served: 0.2)
    assert sorted(stream([1, 7, 2], late_call), key=str) == [(1, 2), (2, 4), (7, Unserved.LATE)]
    assert time.monotonic() - started < 5
    released.set()


def test_a_role_that_hangs_costs_one_deadline() -> None:
    def serve(batch: Sequence[int]) -> list[int]:
        released.wait(10)
        return double(batch)

    released = threading.Event()
    started = time.monotonic()
    hung = call(serve, max_batch=1, gate=Gate(2), deadline_s=lambda num_served: 0.3)
    assert sorted(stream(range(20), hung)) == [(item, Unserved.LATE) for item in range(20)]
    assert time.monotonic() - started < 3
    released.set()


def test_what_is_left_when_the_items_have_ended_is_waited_for_so_long_and_no_longer() -> None:
    """Item 7 hangs far beyond the drain of 0.3 s, the others are served; the producer's own 0.6 s do not count."""
    released = threading.Event()

    def serve(batch: Sequence[int]) -> list[int]:
        if 7 in batch:
            released.wait(10)
        return double(batch)

    def producer() -> Iterator[int]:
        yield 7
        time.sleep(0.6)
        yield from [1, 2]

    started = time.monotonic()
    drained = call(serve, max_batch=1, drain_s=0.3)
    assert sorted(stream(producer(), drained), key=str) == [(1, 2), (2, 4), (7, Unserved.LATE)]
    assert 0.85 < time.monotonic() - started < 5
    released.set()


def test_the_deadline_knows_how_much_is_being_served() -> None:
    asked: list[int] = []

    def deadline_s(num_served: int) -> float:
        asked.append(num_served)
        return 10.0

    gate = threading.Event()
    waiting: list[Future[Sequence[int]]] = []

    def submit(batch: Sequence[int]) -> Future[Sequence[int]]:
        future: Future[Sequence[int]] = Future()
        waiting.append(future)
        if len(waiting) == 3:
            gate.set()
        return future

    def finish() -> None:
        gate.wait(10)
        for future in waiting:
            future.set_result([0])

    finisher = threading.Thread(target=finish)
    finisher.start()
    held = Call(submit, lambda item: True, deadline_s, "the holder", "holding", max_batch=1, gate=Gate(3))
    assert len(list(stream([1, 2, 3], held))) == 3
    finisher.join(10)
    assert asked == [1, 2, 3]


def test_a_producers_error_comes_out_as_it_is() -> None:
    def producer() -> Iterator[int]:
        yield 1
        raise LookupError("no more prompts")

    with pytest.raises(LookupError, match="no more prompts"):
        list(stream(producer(), call(double)))


def test_a_roles_error_names_it() -> None:
    def serve(batch: Sequence[int]) -> list[int]:
        raise ValueError("out of paper")

    with pytest.raises(WorkerError, match=r"the doubler failed while doubling.*out of paper"):
        list(stream([1], call(serve)))


def test_a_wrong_number_of_results_is_refused() -> None:
    with pytest.raises(WorkerError, match="the doubler answered 0 results to a call with 1 items"):
        list(stream([1], call(lambda batch: [])))


def test_stopping_early_stops_the_producer() -> None:
    pulled = []
    gate = threading.Event()

    def producer() -> Iterator[int]:
        for item in range(1000):
            pulled.append(item)
            yield item
            if item == 1:
                gate.wait(10)

    results = stream(producer(), call(double))
    next(results)
    results.close()  # type: ignore[attr-defined]
    gate.set()
    deadline = time.monotonic() + 10
    while any(thread.name == "feed the doubler" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(pulled) <= 3


def test_streams_of_one_role_share_its_places() -> None:
    """Three streams, two places: never more calls under way, and every item is served."""
    gate, lock = Gate(2), threading.Lock()
    under_way = [0, 0]  # now, and at most

    def serve(batch: Sequence[int]) -> Sequence[int]:
        with lock:
            under_way[0] += 1
            under_way[1] = max(under_way)
        time.sleep(0.01)
        with lock:
            under_way[0] -= 1
        return double(batch)

    found: list[list[Any]] = [[], [], []]
    feeding = [
        threading.Thread(target=lambda out=out: out.extend(stream(range(20), call(serve, max_batch=2, gate=gate))))
        for out in found
    ]
    for thread in feeding:
        thread.start()
    for thread in feeding:
        thread.join(20)
    assert [sorted(out) for out in found] == [[(item, 2 * item) for item in range(20)]] * 3
    assert under_way == [0, 2]


def test_a_stream_that_finds_no_place_gives_up_after_its_drain_time() -> None:
    gate = Gate(1)
    assert gate.enter(queue.SimpleQueue()) is not None  # somebody else's, for ever
    started = time.monotonic()
    out = list(stream(range(3), call(double, gate=gate, drain_s=0.3)))
    assert out == [(item, Unserved.LATE) for item in range(3)]
    assert time.monotonic() - started < 2


def test_a_place_is_given_back_once() -> None:
    gate = Gate(1)
    leave = gate.enter(queue.SimpleQueue())
    assert leave is not None
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    assert gate.enter(waiting) is None
    leave()
    leave()
    assert waiting.qsize() == 1  # woken
    assert gate.enter(waiting) is not None
    assert gate.enter(waiting) is None
