"""Grading processes: the deadline is real, a killed process is gone, and the pool goes on."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from trace_rl.workers.grading import GradingPool, Verdict

TIMEOUT_S = 1.0
HANGS = ("\\boxed{9^{9^{9^9}}}", "\\boxed{2^{2^{40}}-1}")
"""Both are still at it after 8 s, inside one big-integer operation that no Python signal handler interrupts."""
RIGHT = ("\\boxed{70.0}", "70")


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    made = GradingPool(num_processes=2, timeout_s=TIMEOUT_S)
    made.grade([RIGHT, RIGHT])
    yield made
    made.close()


def is_grading(process: psutil.Process) -> bool:
    try:
        return "trace_rl.workers.grading" in process.cmdline()
    except psutil.NoSuchProcess:  # ended since it was listed; so has a zombie, whoever left it behind
        return False


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if is_grading(child)}


def wait_until(is_true: object, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_verdicts_are_in_order(pool: GradingPool) -> None:
    wrong = ("\\boxed{71}", "70")
    assert pool.grade([RIGHT, wrong, wrong, RIGHT]) == [
        Verdict(1.0, "graded"),
        Verdict(0.0, "graded"),
        Verdict(0.0, "graded"),
        Verdict(1.0, "graded"),
    ]


@pytest.mark.parametrize("text", HANGS)
def test_a_response_that_never_ends_is_killed_at_the_deadline(pool: GradingPool, text: str) -> None:
    before = children()
    assert len(before) == 2
    started = time.monotonic()
    verdicts = pool.grade([(text, "70"), RIGHT, RIGHT])
    assert TIMEOUT_S <= time.monotonic() - started < TIMEOUT_S + 5
    assert verdicts == [Verdict(0.0, "timeout"), Verdict(1.0, "graded"), Verdict(1.0, "graded")]
    killed = before - children()
    assert len(killed) == 1 and not psutil.pid_exists(killed.pop())
    assert pool.grade([RIGHT] * 4) == [Verdict(1.0, "graded")] * 4
    assert len(children()) == 2


def test_waiting_for_a_process_does_not_count(pool: GradingPool) -> None:
    """Six texts on two processes: the last ones start after two deadlines, and are still graded."""
    verdicts = pool.grade([(HANGS[0], "70")] * 4 + [RIGHT] * 2)
    assert [verdict.cause for verdict in verdicts] == ["timeout"] * 4 + ["graded"] * 2


def test_a_process_that_dies_is_an_error_and_is_replaced(pool: GradingPool) -> None:
    with ThreadPoolExecutor(1) as thread:
        busy = thread.submit(pool.grade, [(HANGS[0], "70")])
        time.sleep(0.3)
        victims = [psutil.Process(pid) for pid in children()]  # also the idle one, which must not cost the next text
        for victim in victims:
            victim.kill()
        (verdict,) = busy.result(timeout=20)
    wait_until(lambda: all(not v.is_running() or v.status() == psutil.STATUS_ZOMBIE for v in victims))
    assert (verdict.reward, verdict.cause) == (0.0, "error") and "status -9" in verdict.detail
    assert pool.grade([RIGHT] * 4) == [Verdict(1.0, "graded")] * 4


def test_a_process_that_stops_reading_in_the_middle_of_a_text_is_killed() -> None:
    """Five million characters are far more than the pipe holds, so the send itself never ends."""
    others = children()
    made = GradingPool(num_processes=1, timeout_s=TIMEOUT_S)
    try:
        assert made.grade([RIGHT]) == [Verdict(1.0, "graded")]
        (child,) = children() - others
        os.kill(child, signal.SIGSTOP)
        started = time.monotonic()
        assert made.grade([("x" * 5_000_000, "70"), RIGHT]) == [Verdict(0.0, "timeout"), Verdict(1.0, "graded")]
        assert TIMEOUT_S <= time.monotonic() - started < TIMEOUT_S + 5
        assert not psutil.pid_exists(child)
    finally:
        made.close()


def test_an_error_of_the_grader_keeps_its_process(pool: GradingPool) -> None:
    before = children()
    (verdict,) = pool.grade([("\\boxed{1}", "")])
    assert (verdict.reward, verdict.cause) == (0.0, "error") and "reference answer" in verdict.detail
    assert children() == before


def test_memory_is_bounded(pool: GradingPool) -> None:
    """8 GiB of digits: refused by the address space limit or killed at the deadline, never allocated."""
    (verdict,) = pool.grade([("\\boxed{10^{20000000000}}", "70")])
    assert verdict.reward == 0.0 and verdict.cause in ("error", "timeout")
    assert pool.grade([RIGHT]) == [Verdict(1.0, "graded")]


def test_text_is_never_evaluated(pool: GradingPool, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    code = f"__import__('os').system('touch {marker}')"
    assert [verdict.reward for verdict in pool.grade([(code, "70"), (f"\\boxed{{{code}}}", "70")])] == [0.0, 0.0]
    assert not marker.exists()


def test_processes_import_no_torch_and_no_ray(pool: GradingPool) -> None:
    for pid in children():
        libraries = {Path(region.path).name for region in psutil.Process(pid).memory_maps()}
        assert not any(name.startswith(("libtorch", "_raylet")) for name in libraries)
        assert any(name.startswith("libpython") or "python" in name for name in libraries)


def test_closing_ends_all_processes() -> None:
    others = children()
    made = GradingPool(num_processes=2, timeout_s=TIMEOUT_S)
    made.grade([RIGHT])
    started = children() - others
    assert len(started) == 2
    made.close()
    wait_until(lambda: not started & children())
