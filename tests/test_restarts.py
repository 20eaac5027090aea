"""Which failures a run survives by itself, and how often; and SIGTERM."""

import os
import signal
import time

import pytest

from trace_rl.errors import PreemptedError, TrainingError, WeightSyncError, WorkerError
from trace_rl.launch.preemption import Preemption
from trace_rl.launch.restarts import Attempt, persist


class Fates:
    """Attempts that begin, come to a checkpoint and fail as they are told."""

    def __init__(self, *fates: tuple[int, Exception | None], begins: bool = True) -> None:
        self.fates, self.begins = list(fates), begins
        self.checkpoint, self.numbers, self.told = 0, [], []

    def attempt(self, this: Attempt) -> None:
        self.numbers.append(this.number)
        this.has_begun = self.begins
        self.checkpoint, error = self.fates.pop(0)
        if error is not None:
            raise error

    def persist(self, max_restarts: int = 2) -> None:
        persist(self.attempt, max_restarts, lambda: self.checkpoint, self.told.append)


def test_a_run_starts_again_after_a_loss_and_says_why() -> None:
    run = Fates((0, WorkerError("learner rank 0 died")), (4, WeightSyncError("engine 1 lost")), (9, None))
    run.persist()
    assert run.numbers == [0, 1, 2]
    assert "learner rank 0 died. It starts again after step 0 (restart 1 of at most 2" in run.told[0]
    assert "engine 1 lost. It starts again after step 4 (restart 1 of" in run.told[1]


def test_losses_in_a_row_without_a_checkpoint_end_the_run_with_the_cause() -> None:
    run = Fates((3, WorkerError("a")), (3, WorkerError("b")), (3, WorkerError("c")))
    with pytest.raises(WorkerError, match=r"c \(the run was started again 2 times, the last 2 of them without reach"):
        run.persist()
    assert run.numbers == [0, 1, 2]


def test_a_checkpoint_between_losses_starts_the_count_anew() -> None:
    fates = [(step, WorkerError("x")) for step in range(10)]
    run = Fates(*fates, (10, None))
    run.persist(max_restarts=1)
    assert len(run.numbers) == 11


def test_what_would_come_again_is_not_tried_again() -> None:
    run = Fates((3, TrainingError("the loss is not finite")), (3, None))
    with pytest.raises(TrainingError, match=r"^the loss is not finite$"):
        run.persist()


def test_a_run_that_cannot_start_is_not_started_again() -> None:
    run = Fates((0, WorkerError("no room")), (0, None), begins=False)
    with pytest.raises(WorkerError, match=r"^no room$"):
        run.persist()
    assert run.numbers == [0]


def test_without_restarts_the_first_loss_is_the_last() -> None:
    with pytest.raises(WorkerError, match=r"^x$"):
        Fates((0, WorkerError("x"))).persist(max_restarts=0)


def test_sigterm_is_a_question_and_the_handler_before_it_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(grace_s=60) as preemption:
        preemption.has_begun()
        assert not preemption.is_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.is_asked()
        os.kill(os.getpid(), signal.SIGTERM)  # some systems repeat it
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_does_not_end_within_its_grace_is_interrupted() -> None:
    with (
        pytest.raises(PreemptedError, match=r"checkpoint within 0\.2 s \(run\.preemption_grace_s"),
        Preemption(grace_s=0.2) as preemption,
    ):
        preemption.has_begun()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


def test_a_run_whose_roles_still_start_ends_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(PreemptedError, match="before its roles were ready"), Preemption(grace_s=60):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert time.monotonic() - started < 5


def test_an_error_of_a_run_that_was_told_to_end_stays_that_error() -> None:
    with pytest.raises(WorkerError, match="a role died"), Preemption(grace_s=60) as preemption:
        preemption.has_begun()
        os.kill(os.getpid(), signal.SIGTERM)
        raise WorkerError("a role died")
