"""Items go through a role as they come: none is lost, none waits for another, every failure has a name."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_rl.errors import WorkerError
from trace_rl.workers.streaming import Call, Unserved, stream


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
    out = list(stream(items, call(double, max_batch=max_batch, max_in_flight=max_in_flight)))
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

    assert len(list(stream(range(300), call(serve, max_batch=100, max_in_flight=1)))) == 300
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
    hung = call(serve, max_batch=1, max_in_flight=2, deadline_s=lambda num_served: 0.3)
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
    held = Call(submit, lambda item: True, deadline_s, "the holder", "holding", max_batch=1, max_in_flight=3)
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
