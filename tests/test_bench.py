"""The bench's figures by hand, and what it calls slower."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from trace_rl.launch.plan.cost import StepCost
from trace_rl.launch.plan.hardware import Roofs, measured
from trace_rl.launch.plan.stages import Stage
from trace_rl.overlays import load_config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
bench = pytest.importorskip("bench")
bench_compare = pytest.importorskip("bench_compare")
bench_stages = pytest.importorskip("bench_stages")

RECORD = {
    "sampling/completions": 8.0,
    "response/length_mean_tokens": 10.0,
    "response/length_max_tokens": 20.0,
    "learner/tokens": 120.0,
    "learner/duration_s": 0.5,
    "learner/forward_tflop": 0.25,
    "teacher/forward_tokens": 30.0,
    "teacher/flops_saved_frac": 0.75,
    "sync/weight_bytes": 4e6,
    "sync/transfer_s": 0.02,
    "time/rollout_s": 1.0,
    "time/learner_s": 0.6,
    "time/sync_s": 0.3,
    "time/step_s": 2.0,
    "idle/generator_frac": 0.5,
    "idle/rewarder_frac": 0.9,
    "busy/generator_s": 1.0,
    "busy/rewarder_s": 0.2,
    "busy/annotator_s": 0.1,
    "busy/teacher_s": 0.1,
    "memory/generator_engine_host_peak_gib": 1.5,
}
ROOFS = Roofs(matmul_flops=3e12, copy_bytes_per_s=1e10, link_bytes_per_s=1e9)


def test_seconds_of_stages_by_hand() -> None:
    assert bench_stages.stage_seconds(RECORD) == pytest.approx(
        {"generation": 1.0, "grading": 0.2, "annotation": 0.1, "teacher": 0.1, "learner": 0.6, "weight sync": 0.3}
        | {"step": 2.0}
    )


def test_throughput_by_hand() -> None:
    found = bench_stages.throughput([RECORD] * 3, matmul_flops=3e12)
    assert found["generation"] == pytest.approx({"tokens/s": 80.0})
    assert found["grading"] == pytest.approx({"completions/s": 40.0})
    assert found["annotation"] == pytest.approx({"completions/s": 80.0})
    assert found["teacher"] == pytest.approx({"tokens/s": 300.0, "FLOPs of a full pass": 0.25})
    assert found["learner"] == pytest.approx({"tokens/s": 240.0, "MFU": 0.5})  # 3 x 0.25 / 0.5 / 3
    assert found["weight sync"] == pytest.approx({"GB/s": 0.2})
    assert bench_stages.idle([RECORD]) == {"generator": 0.5, "rewarder": 0.9}
    assert bench_stages.memory([RECORD]) == {"generator_engine_host": 1.5}


def test_a_run_without_teacher_and_annotator_has_no_such_stage() -> None:
    plain = {k: v for k, v in RECORD.items() if "teacher" not in k and "annotator" not in k}
    found = bench_stages.throughput([plain], matmul_flops=3e12)
    assert set(found) == {"generation", "grading", "learner", "weight sync"}


def runs(seed: int, num_runs: int = 3, noise: float = 0.05, machine: float = 1.0, **slower: float) -> list[Any]:
    """Relative times of runs of 20 steps on a machine whose speed wanders, some stages slower than usual."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num_runs):
        speed = machine * math.exp(rng.normal(0, 0.3))  # everything at the moment
        drift = {name: math.exp(rng.normal(0, noise)) for name in ("generation", "learner", "weight_sync")}
        steps = []
        for _ in range(20):
            usual = {"generation": 1.2, "learner": 0.8, "weight_sync": 0.2}
            each = {
                name: seconds * speed * drift[name] * slower.get(name, 1.0) * math.exp(rng.normal(0, 0.1))
                for name, seconds in usual.items()
            }
            steps.append({**each, "step": sum(each.values())})
        found.append(bench_compare.relative_times(steps, yardstick_s=0.1 * speed))
    return found


def slower_stages(before: list[Any], now: list[Any]) -> set[str]:
    return {each.stage for each in bench_compare.compare(before, now) if each.is_regression}


def test_noise_of_the_machine_raises_no_alarm() -> None:
    alarms = [slower_stages(runs(2 * seed), runs(2 * seed + 1)) for seed in range(100)]
    assert sum(map(bool, alarms)) <= 3, alarms


def test_a_machine_that_is_slower_as_a_whole_raises_no_alarm() -> None:
    alarms = [slower_stages(runs(2 * seed), runs(2 * seed + 1, machine=3.0)) for seed in range(50)]
    assert sum(map(bool, alarms)) <= 2, alarms


@pytest.mark.parametrize("stage", ["generation", "learner"])
def test_a_stage_that_got_slower_by_a_third_is_told(stage: str) -> None:
    found = [slower_stages(runs(2 * s, noise=0.02), runs(2 * s + 1, noise=0.02, **{stage: 1.33})) for s in range(50)]
    assert sum(stage in each for each in found) >= 48, found
    assert all(each <= {stage, "step"} for each in found)


def test_relative_times_by_hand() -> None:
    steps = [{"a": 1.0, "b": 2.0, "c": 0.01, "step": 3.5}] * 3
    found = bench_compare.relative_times(steps, yardstick_s=0.5)
    assert found == pytest.approx({"a": 1 / 2.01, "b": 2 / 1.01, "step": 7.0})  # c takes too little of the step


def test_a_comparison_is_told() -> None:
    verdicts = bench_compare.compare([{"a": 1.0, "step": 1.0}], [{"a": 1.5, "step": 1.0}])
    assert [(each.stage, each.is_regression) for each in verdicts] == [("a", True), ("step", False)]
    text = bench_compare.to_markdown(verdicts, {"date": "2026-01-01", "code": "abc"})
    assert "| a | 1.50 | ±15% | SLOWER |" in text and "| step | 1.00 | ±15% |  |" in text


@pytest.mark.parametrize("name", list(bench.PROFILES))
def test_every_profile_is_a_configuration(name: str) -> None:
    profile = bench.PROFILES[name]
    config = load_config(profile.configs, [*bench.COMMON, *profile.settings, f"{bench.HOLD}={profile.steps}"])
    assert config.needs_teacher and config.evaluation.every == 0


def test_the_report_names_what_it_belongs_to_and_how_far_the_roof_is(tmp_path: Path) -> None:
    config = load_config(bench.PROFILES["smoke"].configs, bench.COMMON)
    learner = Stage("learner", roof_s=0.15, rounds=1, seconds=0.15, bound="products")
    possible = StepCost((learner,), seconds=0.15, bottleneck="learner")
    found = bench.summary([bench.Run([RECORD] * 4, 0.2, possible)] * 2, config, ROOFS)
    assert found["step_s"] == 2.0 and found["completions/s"] == 4.0
    assert found["relative"] == [found["relative"][0]] * 2 and found["relative"][0]["step"] == 10.0
    assert found["of_roof"]["learner"] == 0.25 == found["shares"]["learner"]
    head = {"profile": "smoke", "command": "the command", "date": "2026-01-01", "code": "abc", "seed": 7}
    report = {**head, "machine": {"cores": 2}, "steps": 8, "num_runs": 2, "link": "gloo over loopback", **found}
    text = bench.to_markdown(report)
    for part in ("`the command`, 2026-01-01, abc, seed 7, on cores 2", "3 TFLOP/s", "| 0.6 | 30% | 25.0% (products) |"):
        assert part in text
    file = tmp_path / "bench_smoke.json"
    file.write_text(json.dumps(report))
    assert measured(file).roofs == ROOFS  # trace-rl plan --roofs reads it


def test_a_baseline_of_another_kind_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    baseline = tmp_path / "bench_smoke.json"
    baseline.write_text(json.dumps({"relative": [{"step": 1.0}]}))
    with pytest.raises(typer.BadParameter, match="measure that baseline again"):
        bench.main("smoke", compare=baseline)
