"""What the head loss costs, beside plain torch and the parts that peers offer: errors, seconds and peak memory.

    python benchmarks/head_loss.py [--preset cpu] [--out benchmarks/results]

First every implementation is compared with float64, and the script stops if ours is off. Then, for shares of routed
tokens from 0 to 100 %, half of them with forward and half with reverse KL, all implementations take turns, so that
noise hits all alike. A ratio is the median over turns of an implementation's seconds divided by those of our loss
without any route in the same turn: compare these, absolute times belong to the machine. Extra memory is the peak during
one evaluation with its backward pass, above inputs and without the two gradients, of what torch allocates.

Peers are optional; a row says where one is missing. To have them all in the same environment:

    pip install --no-deps trl==1.16.0 accelerate liger-kernel verl

Without a GPU the sizes of real models are left out, which the report says.
"""

from __future__ import annotations

import datetime
import json
import operator
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers import Contender, Problem, Shape, contenders, make_problem, reference
from report import describe_machine, one_line, publish, version_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

SHARES = (0.0, 0.05, 0.1, 0.25, 1.0)
KINDS = {"fkl": ("fkl",), "rkl": ("rkl",), "jsd": ("jsd",), "mixed": ("fkl", "rkl", "jsd")}
TIMED = ("fkl", "rkl")
CHECKED_SHARE = 0.25
BASE, OURS = "ours, GRPO only", "ours"
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest error that ours may have; bfloat16 rounds at 4e-3."""
PACKAGES = ("torch", "triton", "trl", "accelerate", "liger-kernel", "verl")
MIB = 2**20


@dataclass(frozen=True)
class Preset:
    """One size."""

    shape: Shape
    dtype: str = "bfloat16"
    device: str = "cuda"
    tile_mib: int = 512


PRESETS = {
    "toy": Preset(Shape(256, 64, 1024, 32), "float32", "cpu", tile_mib=1),
    "cpu": Preset(Shape(4096, 512, 32768, 256), "float32", "cpu", tile_mib=128),
    "gpu-0.6b": Preset(Shape(8192, 1024, 151936, 1024)),
    "gpu-1.7b": Preset(Shape(8192, 2048, 151936, 1024)),
    "gpu-8b": Preset(Shape(8192, 4096, 151936, 1024)),
    "gpu-8b-32k": Preset(Shape(32768, 4096, 151936, 4096)),
}
"""The GPU sizes are the heads of Qwen3 0.6B, 1.7B and 8B."""


def build(preset: Preset, directions: tuple[str, ...], share: float, seed: int) -> Problem:
    return make_problem(preset.shape, directions, share, getattr(torch, preset.dtype), preset.device, seed)


def evaluate(problem: Problem, loss: Callable[[], Tensor]) -> Tensor:
    """The loss, with fresh gradients of hidden states and head."""
    problem.hidden.grad = problem.head.grad = None
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


def errors_of(problem: Problem, loss: Callable[[], Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of loss and gradients, each relative to the largest exact entry."""
    value = evaluate(problem, loss)
    assert problem.hidden.grad is not None and problem.head.grad is not None
    found = {"loss": value, "hidden": problem.hidden.grad, "head": problem.head.grad}
    return {name: float((found[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact}


def reason_of(error: Exception, contender: Contender) -> str:
    """Why an implementation cannot run at a size; a peer's failure must not end the benchmark.

    Raises:
        Exception: it is ours or plain torch, and there was memory enough.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if contender.package == "torch":
        raise error
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a message'}"


def check(preset: Preset, present: list[Contender], seed: int) -> list[dict[str, Any]]:
    """Errors of every implementation, by kind of rows.

    Raises:
        SystemExit: ours is off by more than its bound.
    """
    bound, results = BOUNDS[preset.dtype], []
    for kind, directions in KINDS.items():
        problem = build(preset, directions, CHECKED_SHARE, seed)
        exact = reference(problem)
        for contender in present:
            if contender.name == BASE:
                continue
            try:
                errors = errors_of(problem, contender.prepare(problem), exact)
            except Exception as error:
                results.append({"kind": kind, "contender": contender.name, "why_not": reason_of(error, contender)})
                continue
            if contender.name == OURS and not max(errors.values()) <= bound:
                raise SystemExit(f"head_loss is wrong for {kind} rows: relative errors {errors}, allowed {bound}")
            results.append({"kind": kind, "contender": contender.name, **errors})
    return results


def measure(preset: Preset, present: list[Contender], share: float, repeats: int, seed: int) -> list[dict[str, Any]]:
    """Seconds, ratios and memory of every implementation at one share of routed tokens."""
    problem = build(preset, TIMED, share, seed)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in present}
    failed: dict[str, str] = {}
    losses = {contender.name: contender.prepare(problem) for contender in present}
    for turn in range(repeats + 1):
        for contender in present:
            if contender.name in failed:
                continue
            try:
                elapsed = _seconds(problem, losses[contender.name])
            except Exception as error:
                failed[contender.name] = reason_of(error, contender)
                continue
            if turn:  # the first one compiles and warms caches
                seconds[contender.name].append(elapsed)
    row = {"share": share, "routed_tokens": sum(map(len, problem.routed.values()))}
    return [
        {
            **row,
            "contender": contender.name,
            "seconds": statistics.median(seconds[contender.name]),
            "ratio": statistics.median(map(operator.truediv, seconds[contender.name], seconds[BASE])),
            "extra_mib": extra_memory(problem, losses[contender.name]),
        }
        if contender.name not in failed
        else {**row, "contender": contender.name, "why_not": failed[contender.name]}
        for contender in present
    ]


def _seconds(problem: Problem, loss: Callable[[], Tensor]) -> float:
    _synchronise(problem)
    start = time.perf_counter()
    evaluate(problem, loss)
    _synchronise(problem)
    return time.perf_counter() - start


def _synchronise(problem: Problem) -> None:
    if problem.hidden.is_cuda:
        torch.cuda.synchronize()


def extra_memory(problem: Problem, loss: Callable[[], Tensor]) -> float:
    """Peak MiB that torch allocates during an evaluation, without the two gradients."""
    problem.hidden.grad = problem.head.grad = None
    peak = _peak_on_gpu if problem.hidden.is_cuda else _peak_on_cpu
    return (peak(lambda: evaluate(problem, loss)) - problem.hidden.nbytes - problem.head.nbytes) / MIB


def _peak_on_gpu(work: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(work: Callable[[], Any]) -> int:
    """From the profiler's record of every allocation: the resident size depends on what else the system does."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((each for each in events if each.get("name") == "[memory]"), key=lambda each: each["ts"])
    return max(accumulate((each["args"]["Bytes"] for each in changes), initial=0))


def run_preset(preset: Preset, repeats: int, seed: int) -> dict[str, Any]:
    """Everything that the report says of one size."""
    everyone = contenders(preset.tile_mib * MIB)
    absent = {each.name: reason for each in everyone if (reason := each.why_not())}
    present = [each for each in everyone if each.name not in absent]
    errors = check(preset, present, seed)
    results = [row for share in SHARES for row in measure(preset, present, share, repeats, seed)]
    versions = {each.name: f"{each.package} {version_of(each.package)}" for each in present}
    return {**asdict(preset), "contenders": versions, "absent": absent, "errors": errors, "results": results}


def to_markdown(report: dict[str, Any]) -> str:
    lines = ["# The head loss", "", f"`{report['command']}`, {report['date']}, seed {report['seed']}"]
    lines += ["", f"On {one_line(report['machine'])}.", ""]
    for name, found in report["presets"].items():
        lines += _preset_lines(name, found)
    lines += [f"- not yet measured: {name} ({reason})" for name, reason in report["left_out"].items()]
    return "\n".join(lines) + "\n"


def _preset_lines(name: str, found: dict[str, Any]) -> list[str]:
    shape = found["shape"]
    lines = [
        f"## {name}: {shape['tokens']} tokens, hidden {shape['hidden']}, vocabulary {shape['vocab']}, {found['dtype']}",
        "",
        f"Our tile of logits is {found['tile_mib']} MiB. "
        + ", ".join(f"{k}: {v}" for k, v in found["contenders"].items()),
        "",
        "Errors against float64 with a quarter of the tokens routed, relative to the largest exact entry:",
        "",
        "| rows | implementation | loss | hidden gradient | head gradient |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["errors"]:
        cells = (
            [row["why_not"], "", ""] if "why_not" in row else [f"{row[key]:.1e}" for key in ("loss", "hidden", "head")]
        )
        lines.append(f"| {row['kind']} | {row['contender']} | " + " | ".join(cells) + " |")
    for title, cell in (
        ("Median seconds of loss and gradients, and the ratio to our loss without routes", _time_cell),
        ("Peak extra memory in MiB", _memory_cell),
    ):
        lines += ["", f"{title}, by share of routed tokens (half forward, half reverse KL):", ""]
        lines += _share_table(found, cell)
    return [*lines, ""]


def _share_table(found: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    lines = [
        "| implementation | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |",
        "| --- " * (len(SHARES) + 1) + "|",
    ]
    for name in found["contenders"]:
        cells = [row.get("why_not") or cell(row) for row in found["results"] if row["contender"] == name]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines + [f"| {name} | {reason}" + " |" * len(SHARES) for name, reason in found["absent"].items()]


def _time_cell(row: dict[str, Any]) -> str:
    return f"{row['seconds']:.3g} s, {row['ratio']:.2f}"


def _memory_cell(row: dict[str, Any]) -> str:
    return f"{row['extra_mib']:.0f}"


def choose(named: list[str]) -> tuple[list[str], dict[str, str]]:
    """Presets to run, and those left out with the reason."""
    has_gpu = torch.cuda.is_available()
    wanted = named or [name for name in PRESETS if name.startswith("gpu" if has_gpu else "cpu")]
    chosen = [name for name in wanted if has_gpu or PRESETS[name].device == "cpu"]
    return chosen, {name: "no GPU" for name, each in PRESETS.items() if each.device == "cuda" and not has_gpu}


def main(
    preset: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PRESETS)}; all that fit if none.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that are timed.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the two files.")] = "head_loss",
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON and the Markdown.")] = None,
) -> None:
    """Check, measure, print, and write where --out says."""
    unknown = set(preset or []) - PRESETS.keys()
    if unknown:
        raise typer.BadParameter(f"no preset {', '.join(sorted(unknown))}; there are {', '.join(PRESETS)}")
    chosen, left_out = choose(preset or [])
    options = "".join(f" --preset {each}" for each in preset or [])
    report = {
        "command": f"python benchmarks/head_loss.py{options} --repeats {repeats} --seed {seed} --name {name}",
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "machine": describe_machine(PACKAGES) | {"threads": torch.get_num_threads()} | _gpu(),
        "presets": {each: run_preset(PRESETS[each], repeats, seed) for each in chosen},
        "left_out": left_out,
    }
    publish(name, report, to_markdown(report), out)


def _gpu() -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


if __name__ == "__main__":
    typer.run(main)
