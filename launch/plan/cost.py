"""How long a step and a run take: who waits for whom, given how long each stage takes (`stages`).

A synchronous step is the sum of what follows each other; grading, annotation and, where it is certain what is trained
on (`RunConfig.scores_early`), the teacher run beside generation. Where sampling runs ahead (scheduling.max_staleness),
engines and learner work at the same time, and a step takes as long as the slower of both, or as the tail of the longest
responses allows. What roles wait beyond that (bursts, a last engine that is late) is left out, so an asynchronous step
is a lower bound. Must not know how a cost is printed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trace_rl.launch.plan import stages
from trace_rl.launch.plan.stages import Given, Stage
from trace_rl.launch.plan.workload import Workload, busy_steps

LONGEST = "the longest response"


@dataclass(frozen=True)
class StepCost:
    """One step."""

    stages: tuple[Stage, ...]
    """Those that take any time, in the order of a step."""
    seconds: float
    bottleneck: str
    """The stage that is worth making faster, or `LONGEST`."""

    def of(self, name: str) -> Stage:
        """A stage by its name; one without work where it takes no time."""
        return next((stage for stage in self.stages if stage.name == name), Stage(name, 0.0, 0.0, 0.0, "overhead"))

    def busy_frac(self, name: str) -> float:
        """Share of the step in which a stage is at work; those who do it idle for the rest."""
        return self.of(name).seconds / self.seconds


@dataclass(frozen=True)
class RunCost:
    """All steps of a run."""

    with_routes: StepCost | None
    """While routes read a teacher; None where none ever does."""
    without_routes: StepCost
    num_with_routes: int
    num_steps: int

    @property
    def seconds(self) -> float:
        """Without start, evaluations and checkpoints."""
        routed = self.with_routes.seconds * self.num_with_routes if self.with_routes else 0.0
        return routed + self.without_routes.seconds * (self.num_steps - self.num_with_routes)


def run_cost(given: Given) -> RunCost:
    """What the steps of a run take."""
    busy = busy_steps(given.config)
    return RunCost(
        with_routes=step_cost(given, busy) if busy else None,
        without_routes=step_cost(given, ()),
        num_with_routes=len(busy),
        num_steps=given.config.run.steps,
    )


def step_cost(given: Given, busy: Sequence[int]) -> StepCost:
    """What a step takes.

    Args:
        busy: the steps with routes, the step being one of them; none where it is not.
    """
    batch = stages.generation(given)
    grading, annotation = stages.grading(given), stages.annotation(given, bool(busy))
    # the last response is graded and annotated when nothing is written any more
    last_s = given.hardware.fixed.grading_s + (given.work.annotation_s if annotation.rounds else 0.0)
    beside, teacher = [grading, annotation], stages.teacher(given, busy)
    rest = [stages.learner(given, bool(busy)), stages.sync(given), stages.driver(given)]
    after = [teacher, *rest]
    config, scheduling = given.config, given.config.scheduling
    if config.scores_early:
        scoring_s = teacher.seconds - stages.refresh_s(given, busy)
        done_s = scored_s(_slowest([batch, *beside]).seconds, scoring_s, given.work, config.prompts_scored_together)
        return synchronous([batch, *beside, teacher], last_s, rest, done_s)
    if scheduling.is_synchronous:
        return synchronous([batch, *beside], last_s, after)
    if scheduling.partial == "finish":
        return finished_first([batch, *beside], last_s, after)
    steady = stages.generation(given, is_steady=True)
    return running_ahead([steady, *beside], batch.seconds + last_s, after, scheduling.max_staleness)


def scored_s(rollouts_s: float, scoring_s: float, work: Workload, together: int) -> float:
    """When a teacher is done that scores prompts once the longest of their responses is written: the largest of

        g r / longest + t (1 - F(r)^n)     over the lengths r of responses
        g + t m / prompts                  the last call

    with F(r) the share of responses that are shorter than r, n responses and m prompts a call, g and t the times in
    which rollouts come and are scored: what is complete at r or later is scored after it. All responses are taken to be
    begun at once; where engines hold fewer, prompts are complete earlier.

    Args:
        together: prompts of a call.
    """
    return max(rollouts_s * come + scoring_s * left for come, left in left_to_score(work, together))


def left_to_score(work: Workload, together: int) -> Iterator[tuple[float, float]]:
    """Moments, as shares of the time in which rollouts come, and the share of the scoring that follows each."""
    lengths, longest = work.responses.quantiles, work.responses.longest
    for length in lengths:
        shorter = bisect_left(lengths, length) / len(lengths)
        yield length / longest, 1 - shorter ** (together * work.samples)
    yield 1.0, min(1.0, together / work.prompts)


def synchronous(ahead: Sequence[Stage], last_s: float, after: Sequence[Stage], supplied_s: float = 0.0) -> StepCost:
    """max(those ahead) + the last response's grading and annotation + all that follows.

    Args:
        ahead: stages that give the step its rollouts, at the same time: generation, grading, annotation, and a teacher
            that scores meanwhile.
        last_s: what the last response takes from its last token to being annotated.
        after: stages that follow each other.
        supplied_s: when those ahead are done, where that is later than the slowest of them takes.
    """
    seconds = max(_slowest(ahead).seconds, supplied_s) + last_s + sum(stage.seconds for stage in after)
    return _step(ahead, after, seconds, _slowest([*ahead, *after]).name)


def finished_first(ahead: Sequence[Stage], last_s: float, after: Sequence[Stage]) -> StepCost:
    """max(generation of the next step, learning) + sync, which waits for all that is being written."""
    slowest = _slowest(ahead)
    rest = [stage for stage in after if stage.name != stages.SYNC]
    supply_s, rest_s = slowest.seconds + last_s, sum(stage.seconds for stage in rest)
    sync_s = sum(stage.seconds for stage in after) - rest_s
    bottleneck = slowest if supply_s > rest_s else _slowest(rest)
    return _step(ahead, after, max(supply_s, rest_s) + sync_s, bottleneck.name)


def running_ahead(ahead: Sequence[Stage], tail_s: float, after: Sequence[Stage], max_staleness: int) -> StepCost:
    """max(generation, grading, annotation; what follows; tail / max_staleness).

    A prompt that is admitted at one step has to be trained on `max_staleness` steps later, and its longest response
    takes as long as the whole batch of a synchronous step.

    Args:
        tail_s: from a prompt's admission until its longest response is annotated.
    """
    slowest, rest_s = _slowest(ahead), sum(stage.seconds for stage in after)
    limits = {slowest.name: slowest.seconds, _slowest(after).name: rest_s, LONGEST: tail_s / max_staleness}
    bottleneck = max(limits, key=lambda name: limits[name])
    return _step(ahead, after, limits[bottleneck], bottleneck)


def _slowest(parts: Sequence[Stage]) -> Stage:
    return max(parts, key=lambda stage: stage.seconds)


def _step(ahead: Sequence[Stage], after: Sequence[Stage], seconds: float, bottleneck: str) -> StepCost:
    return StepCost(tuple(stage for stage in (*ahead, *after) if stage.seconds), seconds, bottleneck)
