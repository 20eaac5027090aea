"""How the time of a step reads: a table of its stages, the bottleneck, and what the figures stand on.

Must not decide anything, and shows no figures where no roofs are given.
"""

from __future__ import annotations

from collections.abc import Iterator

from trace_rl.launch.plan import stages
from trace_rl.launch.plan.cost import LONGEST, RunCost, StepCost
from trace_rl.launch.plan.stages import Given, Stage
from trace_rl.launch.plan.workload import Workload

NO_ROOFS = "no measured roofs: give --roofs FILE (`make bench` writes one), or --gpu NAME for a GPU by its data sheet"
MIXTURE = "not worked out for a mixture of experts, whose work does not follow from the number of its weights"
_COLUMNS = "{:<12} {:>13} {:>11} {:>10}  {}"
_ROLES = {"engines": stages.GENERATION, "teacher": stages.TEACHER, "learner": stages.LEARNER}
_BOUNDS = {"memory": "memory bandwidth", "products": "products", "link": "the link", "overhead": "fixed times"}


def time_lines(cost: RunCost, given: Given, source: str) -> Iterator[str]:
    """The section of a plan.

    Args:
        source: where the roofs come from.
    """
    roofs, shares = given.hardware.roofs, given.hardware.shares
    yield (
        f"{source}: {rate(roofs.matmul_flops, 'FLOP/s')}, memory {rate(roofs.copy_bytes_per_s, 'B/s')}, link "
        f"{rate(roofs.link_bytes_per_s, 'B/s')} a device; expected to reach {shares.generation:.0%} in generation, "
        f"{shares.teacher:.0%} in the teacher, {shares.learner:.0%} in the learner, {shares.sync:.0%} in a sync"
    )
    yield from _workload_lines(given.work)
    step = cost.with_routes or cost.without_routes
    yield _COLUMNS.format("stage", "at the roofs", "expected", "of a step", "bound by")
    yield from (_row(step, stage) for stage in step.stages)
    yield _COLUMNS.format("a step", "", seconds(step.seconds), "", f"bottleneck: {bottleneck(step)}")
    idle = [f"{role} {1 - step.busy_frac(name):.0%}" for role, name in _ROLES.items() if step.of(name).seconds]
    yield f"idle: {', '.join(idle)} of a step"
    if others := cost.num_steps - cost.num_with_routes if cost.with_routes else 0:
        yield (
            f"that is a step in which routes read the teacher, {cost.num_with_routes:,} of {cost.num_steps:,}; the "
            f"other {others:,} take {seconds(cost.without_routes.seconds)} each"
        )
    yield f"{cost.num_steps:,} steps: {seconds(cost.seconds)}, without start, evaluations and checkpoints"
    if unknown := list(_taken_as_nothing(given)):
        yield f"taken to cost no time, because it is not known: {', '.join(unknown)}"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    units = ((7200, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (0, 1e-3, "ms"))
    scale, unit = next((scale, unit) for least, scale, unit in units if value >= least)
    return f"{_short(value / scale)} {unit}"


def rate(value: float, unit: str) -> str:
    """Something a second, by thousands."""
    scale, prefix = next(
        ((scale, prefix) for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= scale), (1, "")
    )
    return f"{_short(value / scale)} {prefix}{unit}"


def _short(value: float) -> str:
    """Three digits, or all of a larger number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def bottleneck(step: StepCost) -> str:
    """What a step waits for longest, and what that is bound by."""
    if step.bottleneck == LONGEST:
        return f"{LONGEST}, within scheduling.max_staleness"
    return f"{step.bottleneck}, by {_BOUNDS[step.of(step.bottleneck).bound]}"


def _taken_as_nothing(given: Given) -> Iterator[str]:
    if not given.hardware.fixed.grading_s:
        yield "grading (fixed.grading_s of --roofs)"
    if given.config.needs_annotator and given.config.annotator.backend.model and not given.work.annotation_s:
        yield "the annotator's replies (--expect annotation_s=SECONDS)"


def _row(step: StepCost, stage: Stage) -> str:
    at_roofs = seconds(stage.roof_s) if stage.roof_s else ""
    share = f"{step.busy_frac(stage.name):.0%}"
    return _COLUMNS.format(stage.name, at_roofs, seconds(stage.seconds), share, _BOUNDS[stage.bound])


def _workload_lines(work: Workload) -> Iterator[str]:
    lengths = f"prompts of {work.prompt_tokens:,.0f} tokens and responses of {work.responses.mean:,.0f}"
    if work.is_at_full_length:
        yield f"for {lengths}, all as long as they may be (--expect response_tokens=MEAN says how long they will be)"
    else:
        yield f"for {lengths} on average, the longest {work.responses.longest:,.0f}"
