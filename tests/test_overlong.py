"""Long completions: the soft penalty of arXiv:2503.14476 by hand."""

import pytest

from trace_rl.overlong import Overlong


@pytest.mark.parametrize(
    ("length", "penalty"),
    # the paper's lengths: 16384 + 4096 = 20480
    [(1, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (20481, -1.0), (30000, -1.0)],
)
def test_penalty_by_hand(length: int, penalty: float) -> None:
    assert Overlong(penalty_frac=0.2).penalty(length, 20480) == pytest.approx(penalty, abs=1e-12)


def test_off_by_default() -> None:
    assert Overlong().penalty(10**6, 100) == 0.0
    assert not Overlong().mask
