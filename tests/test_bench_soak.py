"""What the soak calls flat."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
soak = pytest.importorskip("soak")


def samples(growth: float, handles: int = 0, threads: int = 0, spike: int = 0) -> list[object]:
    """A hundred, over 1,000 s, of 100 MiB that grow by a share of that."""
    noise = np.random.default_rng(0).normal(0, 0.002, 100)
    return [
        soak.Sample(
            10.0 * number,
            round(100 * soak.MIB * (1 + growth * number / 99 + noise[number])) + (spike if number == 50 else 0),
            20 + handles * number // 99,
            8 + threads * number // 99,
        )
        for number in range(100)
    ]


def test_growth_is_told_whatever_a_single_sample_says() -> None:
    verdict = soak.judge("engine", samples(0.05, spike=10**9))
    assert verdict.growth == pytest.approx(0.05, abs=0.003)
    assert verdict.growth_interval[0] < verdict.growth < verdict.growth_interval[1]
    assert not verdict.is_flat


def test_what_does_not_grow_is_flat() -> None:
    verdict = soak.judge("engine", samples(0.0))
    assert abs(verdict.growth) < 0.003 and verdict.is_flat
    assert (verdict.handles, verdict.threads) == ((20, 20), (8, 8))
    assert verdict.memory_mib == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("leak", [{"handles": 3}, {"threads": 3}])
def test_one_handle_or_thread_more_in_the_end_is_a_leak(leak: dict[str, int]) -> None:
    assert not soak.judge("engine", samples(0.0, **leak)).is_flat


def test_what_a_process_holds_is_counted_and_one_that_ended_is_not() -> None:
    import os

    sample = soak.take([os.getpid()], 1.0)
    assert sample.memory > soak.MIB and sample.handles > 2 and sample.threads >= 1
    assert soak.take([2**22 + 1], 1.0) is None  # beyond the kernel's largest process id
