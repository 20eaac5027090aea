"""The bookkeeping of `benchmarks/pipeline_step.py`; the runs themselves are `make bench-parts`."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
pipeline_step = pytest.importorskip("pipeline_step")


def record(step_s: float, routed: float) -> dict[str, float]:
    found = {"time/step_s": step_s, "time/learner_s": step_s / 2, "time/sync_s": 0.1, "busy/generator_s": step_s / 3}
    found |= {"busy/teacher_s": 0.5 if routed else 0.0, "route/token_frac": routed}
    return found | ({"annotation/coverage_frac": 0.2, "teacher/flops_saved_frac": 0.7} if routed else {})


RECORDS = [record(step_s, routed) for step_s, routed in ((11, 0.1), (10, 0), (24, 0.3), (20, 0), (13, 0.2), (10, 0))]


def test_each_step_with_routes_is_compared_with_the_one_behind_it() -> None:
    found = pipeline_step.summary(RECORDS)
    assert found["ratios"] == pytest.approx([1.1, 1.2, 1.3])
    assert found["ratio"] == pytest.approx(1.2) and found["quartiles"] == pytest.approx([1.1, 1.3])
    assert found["seconds"]["TRACE"]["teacher"] == 0.5 and "teacher" not in found["seconds"]["GRPO"]
    assert (found["seconds"]["TRACE"]["step"], found["seconds"]["GRPO"]["step"]) == (13, 10)
    assert (found["coverage"], found["routed"], found["teacher_flops"]) == pytest.approx((0.2, 0.2, 0.3))
    with pytest.raises(RuntimeError, match="did not take turns"):
        pipeline_step.summary(RECORDS[1:])


def test_the_table_has_both_kinds_of_steps() -> None:
    about = {"command": "c", "date": "d", "code": "abc", "machine": {"cores": 2}, "completions": 512, "pairs": 3}
    text = pipeline_step.to_markdown({**about, "results": {"TRACE": pipeline_step.summary(RECORDS)}})
    assert "| TRACE | 1.200 | 1.10 to 1.30 | 20% | 20% | 0.30 | 4.33 | 0.5 | 6.5 | 0.1 | 13 |" in text
    assert "| GRPO between | 1 | | | | | 3.33 |  | 5 | 0.1 | 10 |" in text


def test_a_route_is_on_at_every_other_step() -> None:
    schedule = pipeline_step.every_other.EveryOther()
    assert [schedule.at(step) for step in range(4)] == [1, 0, 1, 0] and schedule.peak == 1
