"""Whether a bench is slower than an earlier one, beyond what its runs differ among themselves.

A stage is compared by its time over that of all other stages of the same step, so that a machine on which everything is
slower at the moment raises no alarm; only the whole step is compared by seconds, over the time of a piece of work that
was measured just before and after it. Must not know what was run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench_stages import STEP
from scipy.stats import trim_mean

LEAST = 0.15
"""Smaller differences are never told."""
STANDARD_ERRORS = 3.0
STATISTIC = "geometric means without a sixth of the steps at either end"
"""What `relative_times` are; those of another kind cannot be compared."""
TRIMMED = 1 / 6
"""Share of the steps of a run at either end that is left out."""
MIN_SHARE = 0.02
"""Stages that take less of a step are not compared: their time is that of a few messages."""


@dataclass(frozen=True)
class Verdict:
    """One stage, now and in the baseline."""

    stage: str
    ratio: float
    """Of relative times, now over then: 1.3 is 30 % slower."""
    noise: float
    """What a ratio must differ from 1 by to be more than noise."""

    @property
    def is_regression(self) -> bool:
        return self.ratio > 1 + self.noise


def relative_times(seconds: Sequence[Mapping[str, float]], yardstick_s: float) -> dict[str, float]:
    """Of one run: stage -> its time over that of the other stages of a step; the step's in yardsticks.

    Geometric means over the steps, without a sixth of them (rounded down) at either end: a step in which the machine
    was busy with something else does not count, and they differ less from run to run than medians do (in seven runs of
    the demo by 5.5 and 7.5 % for twelve steps).
    """
    stages = [name for name in seconds[0] if name != STEP]
    found = {}
    for stage in stages:
        rest = [sum(step.get(name, 0.0) for name in stages if name != stage) for step in seconds]
        pairs = [(step[stage], other) for step, other in zip(seconds, rest, strict=True) if stage in step and other]
        share = statistics.median([own / (own + other) for own, other in pairs]) if pairs else 0.0
        if share >= MIN_SHARE:
            found[stage] = _typical([own / other for own, other in pairs])
    return {**found, STEP: _typical([step[STEP] for step in seconds]) / yardstick_s}


def _typical(values: Sequence[float]) -> float:
    return math.exp(trim_mean([math.log(value) for value in values], TRIMMED))


def compare(baseline: Sequence[Mapping[str, float]], present: Sequence[Mapping[str, float]]) -> list[Verdict]:
    """By stage, those first that got slowest.

    Args:
        baseline, present: of each run its `relative_times`.
    """
    found = []
    for stage in baseline[0]:
        if not all(stage in run for run in [*baseline, *present]):
            continue
        before, now = ([math.log(run[stage]) for run in runs] for runs in (baseline, present))
        error = _spread([before, now]) * math.sqrt(1 / len(before) + 1 / len(now))
        ratio = math.exp(statistics.mean(now) - statistics.mean(before))
        found.append(Verdict(stage, ratio, max(LEAST, math.expm1(STANDARD_ERRORS * error))))
    return sorted(found, key=lambda verdict: -verdict.ratio)


def _spread(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation within the groups, pooled; 0 where each has one member."""
    squares = sum(statistics.variance(group) * (len(group) - 1) for group in groups if len(group) > 1)
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom) if freedom else 0.0


def to_markdown(verdicts: Sequence[Verdict], baseline: Mapping[str, Any]) -> str:
    rows = [
        f"| {each.stage} | {each.ratio:.2f} | ±{each.noise:.0%} | {'SLOWER' if each.is_regression else ''} |"
        for each in verdicts
    ]
    return "\n".join(
        [
            f"Compared with the baseline of {baseline['date']} ({baseline['code']}):",
            "",
            "| stage | now / then | noise | |",
            "| --- | ---: | ---: | --- |",
            *rows,
            "",
            "A stage's time is taken over that of the other stages of its step; the step's over a piece of work that "
            "was timed before and after each run.",
            "",
        ]
    )
