"""The thread that owns an engine, with a fake engine that behaves: who gets which output, and what happens when not."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from trace_rl.errors import WorkerError
from trace_rl.workers.generator_thread import EngineRequest, EngineThread, Ticket


@dataclass
class Output:
    request_id: str
    token_ids: tuple[int, ...]
    finished: bool = True


@dataclass
class FakeEngine:
    """Finishes each request after as many steps as its params say; one step at a time has two places.

    Refuses requests of 99 tokens, and breaks in a step once told to.
    """

    places: int = 2
    breaks: bool = False
    forgets: bool = False
    gate: threading.Event = field(default_factory=threading.Event)
    """Cleared: a step lasts until it is set."""
    waiting: list[tuple[int, float, str]] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    token_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_steps: int = 0
    done: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.gate.set()

    def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        arrival_time: float | None = None,
        lora_request: Any = None,
        *,
        priority: int = 0,
    ) -> None:
        self._seen()
        if len(prompt["prompt_token_ids"]) == 99:
            raise ValueError("the prompt is too long")
        assert arrival_time is not None
        self.waiting.append((priority, arrival_time, request_id))
        self.waiting.sort()
        self.left[request_id] = params
        self.token_ids[request_id] = tuple(prompt["prompt_token_ids"])

    def step(self) -> list[Output]:
        self._seen()
        self.num_steps += 1
        assert self.gate.wait(20)
        if self.breaks:
            raise MemoryError("no memory left for the KV cache")
        if self.forgets:
            self.waiting.clear()
        running = [request_id for _, _, request_id in self.waiting[: self.places]]
        for request_id in running:
            self.left[request_id] -= 1
        done = [request_id for request_id in running if not self.left[request_id]]
        self._forget(done)
        self.done += done
        unfinished = [Output(request_id, (), finished=False) for request_id in running if request_id not in done]
        return [Output(request_id, self.token_ids[request_id]) for request_id in done] + unfinished

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def abort_request(self, request_ids: list[str]) -> None:
        self._seen()
        self._forget(request_ids)

    def _forget(self, request_ids: Sequence[str]) -> None:
        self.waiting = [entry for entry in self.waiting if entry[2] not in request_ids]

    def _seen(self) -> None:
        self.threads.add(threading.current_thread().name)


def started(**settings: Any) -> tuple[EngineThread, FakeEngine]:
    engine = FakeEngine(**settings)
    return EngineThread("engine 3", lambda: engine), engine


def requests(*num_steps: int) -> Callable[[], list[EngineRequest]]:
    """One request for each number of steps; its only token is its index."""
    return lambda: [EngineRequest((index,), steps) for index, steps in enumerate(num_steps)]


def results(ticket: Ticket, timeout_s: float | None = 20.0) -> list[list[int]]:
    """Indices of the requests by arrival; each output must be that of its own request."""
    arrived = []
    for finished in ticket.outputs(timeout_s):
        for index, output in finished:
            assert output.token_ids == (index,)
        arrived.append([index for index, _ in finished])
    return arrived


def test_outputs_of_one_step_come_together_and_in_the_order_in_which_they_finish() -> None:
    # Two places: 0 and 1 run in steps 1 to 3; 1 is done in step 2, 0 and then 2 in step 3.
    thread, _ = started()
    assert results(thread.submit(requests(3, 2, 1), 0)) == [[1], [0, 2]]
    assert results(thread.submit(requests(), 0)) == []


def test_each_caller_gets_its_own_outputs() -> None:
    thread, engine = started(places=100)
    engine.gate.clear()
    tickets = [thread.submit(requests(*range(1, 2 + number)), 1) for number in range(6)]
    engine.gate.set()
    found: dict[int, list[list[int]]] = {}
    readers = [
        threading.Thread(target=lambda number=number: found.update({number: results(tickets[number])}))  # type: ignore[misc]
        for number in range(6)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(20)
    assert found == {number: [[index] for index in range(number + 1)] for number in range(6)}


def test_a_lower_priority_number_goes_first() -> None:
    thread, engine = started(places=1)
    engine.gate.clear()
    first = thread.submit(requests(1), 1)
    while not engine.num_steps:
        time.sleep(0.001)
    late, urgent = thread.submit(requests(3), 1), thread.submit(requests(1), 0)
    engine.gate.set()
    assert [results(ticket) for ticket in (late, urgent, first)] == [[[0]]] * 3
    assert engine.done == ["0", "2", "1"]  # requests are numbered as they come: the urgent one overtakes


def test_an_engine_without_requests_does_not_step() -> None:
    thread, engine = started()
    results(thread.submit(requests(2), 0))
    time.sleep(0.05)
    assert engine.num_steps == 2


def test_steps_that_run_nothing_leave_the_processor_to_others() -> None:
    # Such a step takes microseconds, and is followed by a pause of 1 ms: at most 50 steps in 50 ms.
    thread, engine = started()
    ticket = thread.submit(requests(10**9), 0)
    num_steps = thread.run(lambda: engine.num_steps)
    time.sleep(0.05)
    assert thread.run(lambda: engine.num_steps) - num_steps < 60
    ticket.abort()


def test_work_runs_between_two_steps_in_the_engine_s_thread_and_may_call_for_more() -> None:
    thread, engine = started()
    ticket = thread.submit(requests(10**9), 0)
    names = thread.run(lambda: (threading.current_thread().name, thread.run(lambda: threading.current_thread().name)))
    assert names == ("engine 3", "engine 3")
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0)
    ticket.abort()
    assert engine.threads == {"engine 3"}


def test_aborted_requests_are_gone_before_later_work_runs() -> None:
    thread, engine = started()
    ticket = thread.submit(requests(10**9, 10**9), 0)
    ticket.abort()
    assert thread.run(lambda: list(engine.waiting)) == []
    assert results(thread.submit(requests(1), 0)) == [[0]]


def test_a_ticket_waits_no_longer_than_it_is_told() -> None:
    thread, engine = started()
    engine.gate.clear()
    stalled = thread.submit(requests(1), 0)
    never_added = thread.submit(requests(1), 0)  # behind the step that stalls
    for ticket in (stalled, never_added):
        asked = time.monotonic()
        with pytest.raises(TimeoutError, match="engine 3 gave no answer in time"):
            results(ticket, 0.05)
        assert 0.05 <= time.monotonic() - asked < 1
        ticket.abort()
    engine.gate.set()
    assert thread.run(lambda: list(engine.waiting)) == []


def test_all_of_a_priority_give_way_with_a_reason_and_the_others_go_on() -> None:
    thread, engine = started(places=3)
    others = thread.submit(requests(30), 1)
    tickets = [thread.submit(requests(10**9), 0) for _ in range(2)]
    thread.abort_all(0, InterruptedError("new weights"))
    assert thread.run(lambda: len(engine.waiting)) <= 1
    for ticket in tickets:
        with pytest.raises(InterruptedError, match="new weights"):
            results(ticket)
    assert results(others) == [[0]]


def test_a_refused_request_takes_its_companions_along_and_nothing_else() -> None:
    thread, engine = started()
    refused = thread.submit(lambda: [EngineRequest((0,), 10**9), EngineRequest((0,) * 99, 1)], 0)
    with pytest.raises(ValueError, match="the prompt is too long"):
        results(refused)
    assert thread.run(lambda: list(engine.waiting)) == []
    with pytest.raises(ZeroDivisionError):
        results(thread.submit(lambda: [EngineRequest((0,), 1 // 0)], 0))
    assert results(thread.submit(requests(2), 0)) == [[0]]


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("breaks", r"engine 3 has failed in a step of vLLM \(MemoryError\('no memory left for the KV cache'\)\)"),
        ("forgets", "vLLM has lost 1 requests"),
    ],
)
def test_all_who_wait_for_an_engine_that_dies_are_told_and_all_who_come_later(failure: str, message: str) -> None:
    thread, engine = started()
    engine.gate.clear()
    ticket = thread.submit(requests(5), 0)
    caught: list[BaseException] = []

    def wait_for_work() -> None:
        try:
            thread.run(lambda: None)
        except WorkerError as error:
            caught.append(error)

    while not engine.num_steps:
        time.sleep(0.001)
    waiter = threading.Thread(target=wait_for_work)
    waiter.start()
    setattr(engine, failure, True)
    engine.gate.set()
    with pytest.raises(WorkerError, match=message):
        results(ticket, None)
    waiter.join(5)
    with pytest.raises(WorkerError, match=message):
        thread.run(lambda: None)
    with pytest.raises(WorkerError, match=message):
        results(thread.submit(requests(1), 0), None)
    assert not waiter.is_alive()


def test_what_finished_before_the_engine_died_is_delivered() -> None:
    thread, engine = started()
    done = thread.submit(requests(1), 0)
    assert thread.run(lambda: True)
    while thread.run(lambda: engine.has_unfinished_requests()):
        pass
    engine.breaks = True
    with pytest.raises(WorkerError, match="no memory left"):
        results(thread.submit(requests(1), 0))
    assert results(done) == [[0]]


def test_an_engine_that_cannot_be_built_says_why() -> None:
    def build() -> FakeEngine:
        raise OSError("the folder has no config.json")

    with pytest.raises(OSError, match=r"no config\.json"):
        EngineThread("engine 3", build)
