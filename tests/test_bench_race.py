"""The race's bookkeeping; the race itself is `make race`."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
race = pytest.importorskip("race")


def side(step_s: float, *accuracies: float) -> dict[str, object]:
    curve = [{"step": 10.0 * n, "train_s": 10 * n * step_s, "accuracy": a} for n, a in enumerate(accuracies)]
    return {"seconds": [9.0, step_s, step_s], "step_s": step_s, "curve": curve, "peak_gib": 1.5, "wall_s": 100.0}


def test_the_first_step_does_not_count() -> None:
    assert race.Result([9.0, 2.0, 4.0, 3.0], [], 1.0, 20.0, {}).step_s == 3.0


def test_seconds_to_an_accuracy() -> None:
    curve = side(2.0, 0.1, 0.3, 0.2, 0.5)["curve"]
    assert race.seconds_to(curve, 0.3) == 20.0
    assert race.seconds_to(curve, 0.4) == 60.0
    assert race.seconds_to(curve, 0.6) is None


def test_the_table_tells_ratio_and_time_to_the_accuracy_that_both_reach() -> None:
    report = {
        "command": "the command",
        "date": "2026-01-01",
        "code": "abc",
        "machine": {"cores": 2},
        "peer": {"trl": "1.16.0"},
        "threads": 2,
        "results": {"short": {"ours": side(2.0, 0.2, 0.4, 0.6), "trl": side(8.0, 0.2, 0.3, 0.4)}},
    }
    text = race.to_markdown(report)
    assert "| 8 x 8 of 64 tokens | ours | 2.00 | 32.0 | 4.00 | 1.50 | 100 |" in text
    assert "| 8 x 8 of 64 tokens | trl | 8.00 | 8.0 | 1.00 | 1.50 | 100 |" in text
    assert "- short: to an accuracy of 0.400: ours 20 s, trl 160 s" in text
