"""The last words of a run: base and final held-out accuracy, what it took, and where to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from trace_rl.config.run import RunConfig
from trace_rl.launch.run_folder import RunFolder


class Evaluation(NamedTuple):
    """One measurement on held-out prompts."""

    step: int
    pass_at_1: float
    num_samples: int
    """May be fewer than configured: there may be fewer held-out rows."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run has measured."""

    evaluations: list[Evaluation]
    """In the order of their steps."""
    duration_s: float
    peak_memory_gib: float


def describe_method(config: RunConfig) -> str:
    """The method in one line: its name where the preset gives one, its policy gradient, and its routes."""
    algorithm = config.algorithm
    parts = [f"policy gradient {algorithm.policy_gradient.type}"] if algorithm.has_policy_gradient else []
    parts += [f"{route.action.type} on {name}" for name, route in algorithm.routes.items()]
    parts_text = " + ".join(parts)
    return f"{config.method.name} ({parts_text})" if config.method.name else parts_text


def summarise_run(config: RunConfig, folder: RunFolder, outcome: Outcome) -> str:
    """Markdown text of the summary; also what is printed."""
    lines = [f"# {config.run.name}: {config.run.steps} steps of {describe_method(config)}", ""]
    if outcome.evaluations:
        first, last = outcome.evaluations[0], outcome.evaluations[-1]
        gain = 100 * (last.pass_at_1 - first.pass_at_1)
        lines += [
            f"- held-out pass@1 after {first.step} steps: {first.pass_at_1:.1%}",
            f"- held-out pass@1 after {last.step} steps: {last.pass_at_1:.1%} ({gain:+.1f} points, "
            f"{last.num_samples} samples at temperature {config.evaluation.temperature:g})",
        ]
    checkpoints = folder.complete_checkpoints()
    lines += [
        f"- {outcome.duration_s:.0f} s from first worker to last, peak memory {outcome.peak_memory_gib:.1f} GiB",
        "",
        f"- metrics of every step: {folder.metrics}",
        f"- sampled rollouts with their spans: {folder.rollouts}",
    ]
    if checkpoints:
        lines.append(f"- the trained model (transformers and vLLM load it as it is): {checkpoints[-1][1] / 'hf'}")
    return "\n".join(lines) + "\n"
