"""What the driver costs: CPU time of its process for each rollout, from 1 to 64 engines that only sleep.

    python benchmarks/driver_overhead.py [--engines 1,8,64] [--steps 3] [--out benchmarks/results]

10,000 rollouts a step go through the real loop: requests with a real tokenizer, `VllmGenerator`, `RayGrader`,
`RayAnnotator`, routing, prompts of the teacher, the training batch and the journal of TRACE. Engines, rewarder and
annotator are actors that answer at once; teacher and learner do nothing. What is counted is the CPU time of all threads
of the driver's process, which other work on the machine disturbs less than it does the wall clock.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import own_ray  # before Ray
import typer
from fake_roles import Crew, crew, quick_actors, start_engines
from report import describe_machine, one_line, publish
from sleeping_engine import Pace

from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.launch.model_files import load_tokenizer, resolve_model
from trace_rl.loop import train
from trace_rl.prompts import ChatTokenizer

BOUND_MS = 1.0
"""Of CPU time for a rollout."""
WARM_UP_STEPS = 1
MAX_TOKENS = 4096
PACKAGES = ("ray", "numpy", "transformers", "torch")
ROUTES = {
    "key_spans": {
        "selector": {"rollouts": "correct", "tokens": "key_spans"},
        "action": {"type": "fkl", "clip": {"mode": "token_rescale", "threshold": 0.05}},
        "schedule": {"type": "constant", "value": 0.5},
        "on_routed": "ramp",
    }
}
# threads by what they do; each is the producer of the stage that it is named after
THREADS = {
    "feed the rewarder": "receiving from engines",
    "feed the annotator": "grading",
    "rollouts": "annotation",
}
STAGES = {
    "rollout": "requests, groups and routes",
    "teacher": "prompts of the teacher",
    "learner": "training batch",
    "sync": "sync",
}
REST = "metrics and journal"
NATIVE = "Ray's own threads"
PARTS = (*STAGES.values(), REST, *THREADS.values(), NATIVE)
_LOOK_S = 0.05


@dataclass
class Meter:
    """CPU time of the driver by part, and its memory."""

    main_s: Counter[str] = field(default_factory=Counter)
    """Of the main thread, by stage."""
    threads_s: dict[threading.Thread, float] = field(default_factory=dict)
    """Of each Python thread beside it, as it was last seen."""
    peak_bytes: int = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at all threads from time to time: what one has used is known while it lives only."""
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(_LOOK_S):
                self._look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            is_over.set()
            watcher.join(10)

    def _look(self) -> None:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        self.peak_bytes = max(self.peak_bytes, resident * page_bytes)
        for thread in threading.enumerate():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                used = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text(encoding="ascii")
                self.threads_s[thread] = int(used.split()[0]) / 1e9

    def staged(self, journal: Any) -> None:
        """Have a journal's stages add up here."""
        stage = journal.stage

        @contextlib.contextmanager
        def measured(name: str) -> Iterator[None]:
            started = time.thread_time()
            with stage(name):
                yield
            self.main_s[STAGES[name]] += time.thread_time() - started

        journal.stage = measured

    def parts(self, main_s: float, total_s: float) -> dict[str, float]:
        """Seconds of each part.

        Args:
            main_s: CPU time of the main thread.
            total_s: of the process.
        """
        parts = {part: self.main_s[part] for part in STAGES.values()}
        parts[REST] = main_s - sum(parts.values())
        for prefix, part in THREADS.items():
            parts[part] = sum(used for thread, used in self.threads_s.items() if thread.name.startswith(prefix))
        return {**parts, NATIVE: total_s - sum(parts.values())}


def configured(prompts: int, samples: int, steps: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "task:arithmetic"},
            "data": {"path": "task:arithmetic"},
            "sampling": {
                "prompts_per_step": prompts,
                "samples_per_prompt": samples,
                "max_response_tokens": MAX_TOKENS,
            },
            "algorithm": {"routes": ROUTES},
            "teacher": {"context": "type_label"},
            "evaluation": {"every": 0},
            "run": {"steps": steps},
        }
    )


def measure(
    config: RunConfig, engines: Sequence[Any], actors: tuple[Any, Any], tokenizer: ChatTokenizer
) -> dict[str, Any]:
    """Figures of the steps after the warm-up."""
    rollouts = config.sampling.prompts_per_step * config.sampling.samples_per_prompt
    meter = Meter()
    marks: list[tuple[float, float]] = []
    with crew(config, engines, actors, learner_s=0.0, sync_s=0.0, tokenizer=tokenizer) as run, meter.watching():
        _mark_steps(run, marks)
        meter.staged(run.roles.journal)
        main_s, total_s = time.thread_time(), time.process_time()
        train(config, run.roles)
        main_s, total_s = time.thread_time() - main_s, time.process_time() - total_s
    steps = [
        ((after[0] - before[0]) / rollouts * 1e3, after[1] - before[1])
        for before, after in zip(marks[WARM_UP_STEPS:], marks[WARM_UP_STEPS + 1 :], strict=False)
    ]
    parts = meter.parts(main_s, total_s)
    return {
        "engines": len(engines),
        "cpu_ms_per_rollout": statistics.median(cpu for cpu, _ in steps),
        "cpu_ms_per_rollout_of_steps": [cpu for cpu, _ in steps],
        "wall_s_per_step": statistics.median(wall for _, wall in steps),
        "parts_ms_per_rollout": {part: used / (rollouts * config.run.steps) * 1e3 for part, used in parts.items()},
        "peak_memory_mib": meter.peak_bytes / 2**20,
        "trained": len(run.learner.lengths),
        "length_mean_tokens": statistics.mean(run.learner.lengths),
    }


def _mark_steps(run: Crew, marks: list[tuple[float, float]]) -> None:
    """Note CPU time and clock whenever new weights are asked for: once a step, at the same place of it."""
    sync = run.sync.sync

    def marked(version: int) -> dict[str, float]:
        marks.append((time.process_time(), time.perf_counter()))
        return sync(version)

    run.sync.sync = marked  # type: ignore[method-assign]


def to_markdown(report: dict[str, Any]) -> str:
    results = report["results"]
    last = results[-1]
    verdict = "within" if last["cpu_ms_per_rollout"] <= BOUND_MS else "ABOVE"
    rows = [
        f"| {each['engines']} | {each['cpu_ms_per_rollout']:.2f} | "
        f"{min(each['cpu_ms_per_rollout_of_steps']):.2f} to {max(each['cpu_ms_per_rollout_of_steps']):.2f} | "
        f"{each['wall_s_per_step']:.1f} | {each['peak_memory_mib']:.0f} |"
        for each in results
    ]
    shares = [
        f"| {part} | " + " | ".join(f"{each['parts_ms_per_rollout'][part]:.3f}" for each in results) + " |"
        for part in PARTS
    ]
    return "\n".join(
        [
            "# CPU time of the driver",
            "",
            f"`{report['command']}` on {one_line(report['machine'])}, {report['date']}",
            "",
            f"{report['rollouts_per_step']} rollouts a step of {last['length_mean_tokens']:.0f} tokens on average, "
            f"{report['num_steps']} steps after a warm-up. With {last['engines']} engines a rollout costs "
            f"**{last['cpu_ms_per_rollout']:.2f} ms** of the driver's CPU time, {verdict} the bound of {BOUND_MS:g} "
            f"ms. Before the first step the driver takes {report['idle_memory_mib']:.0f} MiB.",
            "",
            "All engines share the cores with the driver here, so the wall clock tells little; CPU time is what the "
            f"driver would take on a machine of its own, but for caches and cores that others disturb (load "
            f"{report['load']:.0f} on {report['machine']['cores']} cores at the end).",
            "",
            "| engines | CPU ms a rollout | of single steps | wall s a step | peak memory, MiB |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "Where it goes, in CPU ms a rollout, by the thread that does it (warm-up included):",
            "",
            "| engines | " + " | ".join(str(each["engines"]) for each in results) + " |",
            "| --- |" + " --- |" * len(results),
            *shares,
            "",
        ]
    )


def main(
    engines: Annotated[str, typer.Option(help="Numbers of engines, joined by commas.")] = "1,2,4,8,16,32,64",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts a step.")] = 1250,
    samples: Annotated[int, typer.Option(min=2, help="Completions a prompt.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Median length of a completion.")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured.")] = 3,
    token_s: Annotated[float, typer.Option(min=0, help="Seconds that an engine takes for a token.")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="Folder for driver_overhead.json and .md.")] = None,
) -> None:
    """Measure, print, and write where --out says."""
    numbers = [int(number) for number in engines.split(",")]
    config = configured(prompts, samples, WARM_UP_STEPS + steps)
    tokenizer = load_tokenizer(resolve_model(Model(path=config.model.path)))
    pace = Pace(tokens, sigma=0.3, max_concurrent=prompts * samples, seconds_per_token=token_s)
    with own_ray.private_ray():
        actors, started = quick_actors(), start_engines(max(numbers), pace)
        meter = Meter()
        with meter.watching():
            time.sleep(3 * _LOOK_S)
        results = [measure(config, started[:number], actors, tokenizer) for number in numbers]
    report = {
        "command": f"python benchmarks/driver_overhead.py --engines {engines} --prompts {prompts} --samples {samples} "
        f"--tokens {tokens} --steps {steps} --token-s {token_s:g}",
        "machine": describe_machine(PACKAGES),
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
        "rollouts_per_step": prompts * samples,
        "num_steps": steps,
        "idle_memory_mib": meter.peak_bytes / 2**20,
        "results": results,
    }
    publish("driver_overhead", report, to_markdown(report), out)


if __name__ == "__main__":
    typer.run(main)
