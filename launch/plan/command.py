"""What `trace-rl plan` does: looks at what is at hand, prints the plan, and with `--check` judges whether it fits."""

from __future__ import annotations

import os

from rich.console import Console

from trace_rl.config.run import RunConfig
from trace_rl.launch.placement import missing
from trace_rl.launch.plan.cluster import at_hand, known_gpu_memory
from trace_rl.launch.plan.run_plan import plan_checked, problems
from trace_rl.launch.plan.text import full_text, problem_lines


def show(config: RunConfig, is_checked: bool, gpu_memory_gib: float, console: Console) -> int:
    """Print a plan; returns the exit code.

    Args:
        is_checked: compare it with the cluster at placement.ray_address, or with this machine.
        gpu_memory_gib: of the GPUs that it is meant for; 0: as found.

    Raises:
        TraceError: the cluster cannot be joined, or there is nothing to plan with.
    """
    given = int(gpu_memory_gib * 2**30) or None
    if not is_checked:
        _print(console, full_text(plan_checked(config, given or known_gpu_memory(config))))
        return 0
    there = at_hand(config)
    plan = plan_checked(config, given or there.gpu_bytes)
    _print(console, full_text(plan))
    asked, cores = plan.placement.total().get("CPU", 0.0), os.cpu_count() or 1
    if config.placement.ray_address == "local" and asked > cores:
        _print(console, f"The roles ask for {asked:g} logical CPUs and share the {cores} of this machine.")
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


def _uses_gpus(total: dict[str, float]) -> bool:
    return total.get("GPU", 0.0) > 0


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
