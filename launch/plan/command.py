"""What `trace-rl plan` does: looks at what is at hand, prints the plan, and with `--check` judges whether it fits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError
from trace_rl.launch.placement import missing
from trace_rl.launch.plan.cluster import at_hand, card_memory, known_gpu_memory
from trace_rl.launch.plan.cost import run_cost
from trace_rl.launch.plan.hardware import Hardware, measured, named
from trace_rl.launch.plan.run_plan import RunPlan, plan_checked, problems
from trace_rl.launch.plan.text import full_text, problem_lines
from trace_rl.launch.plan.time_text import MIXTURE, NO_ROOFS, time_lines
from trace_rl.launch.plan.workload import Expected, expected


@dataclass(frozen=True)
class Asked:
    """What the command was asked for."""

    is_checked: bool
    """Compare the plan with the cluster at placement.ray_address, or with this machine."""
    gpu_memory_gib: float
    """Of the GPUs that it is meant for; 0: that of `gpu`, or as found."""
    gpu: str
    """A GPU by whose data sheet times are worked out; empty: none."""
    roofs: Path | None
    """A file of measured roofs."""
    expect: Sequence[str]
    """KEY=VALUE of `Expected`."""


def show(config: RunConfig, asked: Asked, console: Console) -> int:
    """Print a plan; returns the exit code.

    Raises:
        TraceError: the cluster cannot be joined, or there is nothing to plan with.
    """
    roofs, wanted = _roofs(asked), expected(asked.expect)
    given = int(asked.gpu_memory_gib * 2**30) or card_memory(asked.gpu)
    if not asked.is_checked:
        plan = plan_checked(config, given or known_gpu_memory(config))
        _print(console, full_text(plan, _time(plan, roofs, wanted)))
        return 0
    there = at_hand(config)
    plan = plan_checked(config, given or there.gpu_bytes)
    _print(console, full_text(plan, _time(plan, roofs, wanted)))
    cpus, cores = plan.placement.total().get("CPU", 0.0), os.cpu_count() or 1
    if config.placement.ray_address == "local" and cpus > cores:
        _print(console, f"The roles ask for {cpus:g} logical CPUs and share the {cores} of this machine.")
    found = problems(plan, there.nodes)
    if found:
        _print(console, "\n".join(["It does not fit:", *problem_lines(found)]))
        return 1
    busy = missing(plan.placement, there.free)
    if busy:
        wait_s = config.placement.resources_timeout_s
        waits = f"It fits, but not now; a run waits {wait_s:g} s for this (placement.resources_timeout_s):"
        _print(console, "\n".join([waits, *problem_lines(busy)]))
        return 0
    places = f"{len(there.nodes)} node" + ("s" if len(there.nodes) > 1 else "")
    memory = "" if plan.forecast.gpu_bytes else "; the memory of GPUs is not known and was not compared"
    _print(console, f"It fits: {places}{memory if _uses_gpus(plan.placement.total()) else ''}")
    return 0


def _roofs(asked: Asked) -> tuple[Hardware, str] | None:
    """What times are worked out from, with where it comes from; None where nothing was named."""
    if asked.gpu and asked.roofs:
        raise ConfigError(
            f"--gpu {asked.gpu} and --roofs {asked.roofs} are both given; keep the one whose figures are wanted"
        )
    if asked.roofs:
        return measured(asked.roofs), f"measured roofs of {asked.roofs}"
    return (named(asked.gpu), f"{asked.gpu} by its data sheet") if asked.gpu else None


def _time(plan: RunPlan, roofs: tuple[Hardware, str] | None, wanted: Expected) -> list[str]:
    """How long a step takes, or why that is not known."""
    if roofs is None:
        return [NO_ROOFS]
    if plan.shape.is_mixture or plan.teacher_shape.is_mixture:
        return [MIXTURE]
    hardware, source = roofs
    given = plan.given(wanted, hardware)
    return list(time_lines(run_cost(given), given, source))


def _uses_gpus(total: dict[str, float]) -> bool:
    return total.get("GPU", 0.0) > 0


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
