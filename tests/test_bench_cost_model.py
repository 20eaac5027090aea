"""The benchmark of the cost model without its runs: what is read of one, the fit, and the error of what it left out."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trace_rl.launch.plan.hardware import Roofs, measured
from trace_rl.launch.plan.workload import Expected, workload
from trace_rl.overlays import load_config

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
cost_model = pytest.importorskip("cost_model")
counted_run = pytest.importorskip("counted")
roofs = pytest.importorskip("roofs")

STAGES = ("generation", "teacher", "learner", "sync")


def counted(size: int, noise: float = 1.0, has_teacher: bool = True) -> Any:
    """A point whose stages take twice the roof and 10 ms a round."""
    rounds = {"generation": 10.0 + size, "teacher": float(has_teacher), "learner": 2.0, "sync": 1.0}
    roof_s = {"generation": 0.1 * size, "teacher": 0.02 * size * has_teacher, "learner": 0.3 * size, "sync": 0.001}
    seconds = {name: noise * (2 * roof_s[name] + 0.01 * rounds[name]) for name in STAGES}
    # all responses end together: the teacher has nothing to do before that
    config = load_config([cost_model.DEMO], cost_model.Point(size, 8, 64, 0.25).settings(4))
    given = SimpleNamespace(config=config, work=workload(config, Expected()))
    return cost_model.Counted(
        cost_model.Point(size, 8, 64, 0.25), given, roof_s, rounds, seconds, sum(seconds.values())
    )


def test_a_fit_finds_the_share_and_the_round_that_times_were_made_of() -> None:
    fits = cost_model.fit([counted(size) for size in (1, 2, 4, 8)])
    for name in ("generation", "teacher", "learner"):
        assert fits[name].slowdown == pytest.approx(2) and fits[name].round_s == pytest.approx(0.01), name
    # the work of a sync is always the same, so that only its sum can be told
    assert fits["sync"].seconds(0.001, 1) == pytest.approx(0.012)


def test_a_point_is_predicted_by_the_others() -> None:
    points = [counted(size) for size in (1, 2, 4)] + [counted(3, noise=1.5)]
    told = cost_model.errors(points, cost_model.left_out(points))
    # the others are exact, and the odd one took half as long again
    assert told["learner"][3] == pytest.approx(1 / 1.5 - 1)
    assert told["step"][3] == pytest.approx(1 / 1.5 - 1)
    assert all(error > 0 for error in told["learner"][:3])


def test_a_point_without_a_teacher_says_nothing_of_it() -> None:
    points = [counted(size) for size in (1, 2, 4)] + [counted(3, has_teacher=False)]
    predicted = cost_model.left_out(points)
    assert "teacher" not in predicted[3] and "teacher" in predicted[0]
    assert cost_model.fit(points)["teacher"].slowdown == pytest.approx(2)
    told = cost_model.summarise(points)
    assert told["points"][3]["error"] == pytest.approx(0, abs=1e-9)
    assert told["stages"]["step"]["median_error"] == pytest.approx(0, abs=1e-9)


def test_what_a_step_held_is_read_from_its_rollouts() -> None:
    def rollout(length: int, *positions: int) -> dict[str, Any]:
        return {"token_ids": [0] * length, "routes": [{"positions": list(positions)}] if positions else []}

    steps = [[rollout(10, 1, 4), rollout(20)], [rollout(30, 29), rollout(20)]]
    config = load_config([cost_model.DEMO], cost_model.Point(1, 2, 64, 0.25).settings(4))
    work = counted_run.workload_of(config, 40.0, steps, teacher_tokens=70.0)
    # longest of the steps: 20 and 30
    assert (work.responses.mean, work.responses.longest, work.num_rollouts) == (20, 25, 2)
    # half of the rollouts, 3 of 80 tokens, up to 5 of 10 and 30 of 30
    assert (work.routed_rollouts_frac, work.routed_tokens_frac, work.routed_reach_frac) == (0.5, 3 / 80, 0.75)
    # one request a step: 70 tokens less the prompt and (5 + 30) / 2 of the response
    assert work.context_tokens == 12.5
    assert counted_run.workload_of(config, 40.0, steps).context_tokens == 0


def test_a_run_is_counted_without_its_warm_up(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for step in range(4):
        length = 30 if step >= 2 else 5
        rollouts = [{"token_ids": [0] * length, "routes": [{"positions": [length - 1]}]}] * 16
        (tmp_path / f"rollouts/step-{step:06d}.jsonl").write_text("\n".join(map(json.dumps, rollouts)) + "\n")
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, learner_s in enumerate((9, 9, 1, 3)):
            times = {"time/rollout_s": 0.5, "time/teacher_s": 0.1, "time/learner_s": learner_s, "time/sync_s": 0.2}
            times |= {"time/step_s": 3.0, "busy/teacher_s": 0.2}
            file.write(json.dumps({"step": step, **times}) + "\n")
    given = Roofs(matmul_flops=1e11, copy_bytes_per_s=1e10, link_bytes_per_s=5e9)
    found = cost_model.count(cost_model.Point(4, 4, 32, 0.25), 4, tmp_path, given)
    assert found.seconds == pytest.approx({"generation": 0.5, "teacher": 0.2, "learner": 2, "sync": 0.2})
    assert found.step_s == pytest.approx(0.5 + 0.1 + 2 + 0.2)
    # 16 sequences at once, 30 token steps; two ranks have 8 of them in one micro-batch of 2,048 tokens
    assert found.rounds == {"generation": 30, "teacher": 1, "learner": 1, "sync": 1}
    assert found.roof_s["sync"] == 4 * 514_048 / 5e9  # the demo's weights
    # 512 K parameters, 16 x about 100 tokens, 6 operations each, two ranks
    assert found.roof_s["learner"] == pytest.approx(6 * 5e5 * 1600 / 2 / 1e11, rel=0.3)


@pytest.mark.parametrize("point", [cost_model.GRID[0], cost_model.GRID[-1], cost_model.Point(8, 8, 64, 0.0)])
def test_points_of_the_grid_are_configurations(point: Any) -> None:
    config = load_config([cost_model.DEMO], point.settings(4))
    assert not config.needs_annotator
    assert config.needs_teacher == (point.routed > 0)
    assert config.sampling.max_response_tokens == point.budget
    assert config.logging.num_rollouts_at(3) >= point.prompts * point.samples


def test_the_grid_varies_each_size_with_the_others_held() -> None:
    grid = set(cost_model.GRID)
    assert len(grid) == len(cost_model.GRID) == 22
    for name, values in {"prompts": {4, 8, 16}, "samples": {4, 8}, "budget": {32, 64, 128}}.items():
        assert {getattr(point, name) for point in grid} == values
    assert {point.routed for point in grid if (point.prompts, point.samples, point.budget) == (8, 8, 64)} == {
        0.0, 0.05, 0.25, 0.5, 1.0,
    }  # fmt: skip


def test_a_fit_is_written_as_roofs_that_a_plan_reads(tmp_path: Path) -> None:
    given = Roofs(matmul_flops=1e11, copy_bytes_per_s=1e10, link_bytes_per_s=5e9)
    fits = cost_model.fit([counted(size) for size in (1, 2, 4)])
    file = tmp_path / "cost_model_roofs.json"
    file.write_text(cost_model.hardware_of(fits, given).model_dump_json())
    found = measured(file)
    assert found.roofs == given
    assert (found.shares.learner, found.fixed.learner_pass_s) == (pytest.approx(0.5), pytest.approx(0.01))


def test_roofs_are_measured_and_of_this_world() -> None:
    assert 1e8 < roofs.matmul_flops("cpu", torch.float32, size=256) < 1e13
    assert 1e8 < roofs.copy_bytes_per_s("cpu") < 1e12


def test_the_report_tells_every_point_and_stage() -> None:
    told = cost_model.summarise([counted(size) for size in (1, 2, 4)])
    report = {"command": "c", "date": "d", "code": "c0de", "machine": {"cores": 2}, "steps": 8, **told}
    text = cost_model.to_markdown(report)
    assert text.count("| 8 | 64 | 25% |") == 3
    assert "| learner | 0.5 | 0.01 | 0% | 0% |" in text.replace("-0%", "0%")
