"""The report of a sweep: final metrics of each group over seeds, and each group against the reference, in Markdown.

Only finished cells count; what is left out is named, because leaving out what broke or was stopped flatters a group.
Runs of one seed share prompts and sampling seeds, so groups are compared seed by seed. The statistics are those of
`trace_rl.statistics`; nothing here resamples or corrects by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from trace_rl.launch.sweep.outcome import final_value, read_records
from trace_rl.launch.sweep.record import CellState
from trace_rl.launch.sweep.tables import count_states
from trace_rl.statistics import LEVEL, Interval, compare, holm, student_mean
from trace_rl.sweeps import Sweep

BySeed = Mapping[int, float]
_FEWEST_PAIRS = 2


@dataclass(frozen=True)
class _Against:
    """A group against the reference, on the seeds that both have."""

    difference: Interval
    p_value: float
    """Of the paired t-test, two-sided."""
    p_permutation: float


def write_report(sweep: Sweep, states: Mapping[str, CellState]) -> str:
    """The Markdown text."""
    settings = sweep.settings.report
    lines = [f"# Sweep {sweep.settings.name}", "", f"{len(sweep.cells)} cells: {count_states(sweep, states)}.", ""]
    lines += _left_out(sweep, states)
    for metric in settings.metrics:
        groups = _values(sweep, states, metric)
        lines += [f"## {metric}", "", *_table(groups, settings.reference), ""]
    return "\n".join([*lines, *_how_to_read(sweep)]) + "\n"


def _values(sweep: Sweep, states: Mapping[str, CellState], metric: str) -> Mapping[str, BySeed]:
    """Final value by group and seed of the cells that are finished and have one."""
    values: dict[str, dict[int, float]] = {group: {} for group in sweep.groups}
    for cell in sweep.cells:
        if states.get(cell.name, CellState()).status == "finished":
            value = final_value(read_records(cell.folder), metric, sweep.settings.report.last_steps)
            if math.isfinite(value):
                values[cell.group][cell.seed] = value
    return values


def _table(groups: Mapping[str, BySeed], reference: str) -> list[str]:
    against = {group: _against(values, groups[reference]) for group, values in groups.items()} if reference else {}
    known = {group: found for group, found in against.items() if found and group != reference}
    corrected = holm({group: found.p_value for group, found in known.items() if math.isfinite(found.p_value)})
    level = f"{LEVEL:.0%} interval"
    if not reference:
        head, rows = f"| group | seeds | mean | {level} |", ["| --- | --- | --- | --- |"]
    else:
        head = (
            f"| group | seeds | mean | {level} | difference to {reference} | {level} | pairs | p | p (Holm) "
            "| p (permutation) |"
        )
        rows = ["| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for group, values in groups.items():
        mean = student_mean(np.array(list(values.values())))
        cells = [group, str(mean.num_units), _number(mean.mean), _ends(mean)]
        if reference:
            cells += _comparison_cells(known.get(group), corrected.get(group, math.nan))
        rows.append(f"| {' | '.join(cells)} |")
    return [head, *rows]


def _comparison_cells(found: _Against | None, corrected: float) -> list[str]:
    if found is None:
        return [""] * 6
    difference = found.difference
    p_values = [_p(each) for each in (found.p_value, corrected, found.p_permutation)]
    return [f"{difference.mean:+.4g}", _ends(difference), str(difference.num_units), *p_values]


def _against(values: BySeed, reference: BySeed) -> _Against | None:
    """The comparison on common seeds; None where there are fewer than two."""
    seeds = sorted(values.keys() & reference.keys())
    if len(seeds) < _FEWEST_PAIRS:
        return None
    ours, theirs = (np.array([each[seed] for seed in seeds]) for each in (values, reference))
    differences = ours - theirs
    if np.ptp(differences) == 0:  # a t-test divides by the spread
        p_value = math.nan if differences.any() else 1.0
    else:
        p_value = float(stats.ttest_rel(ours, theirs).pvalue)
    return _Against(student_mean(differences), p_value, compare(ours, theirs).p_value)


def _left_out(sweep: Sweep, states: Mapping[str, CellState]) -> list[str]:
    found = [(cell.name, states.get(cell.name, CellState())) for cell in sweep.cells]
    lines = [
        f"- {name}: {state.status}, {state.note}" for name, state in found if state.status in ("failed", "stopped")
    ]
    return ["Not in the tables:", "", *lines, ""] if lines else []


def _how_to_read(sweep: Sweep) -> Sequence[str]:
    settings = sweep.settings.report
    last = "at its last step" if settings.last_steps == 1 else f"over its last {settings.last_steps} steps"
    text = f"A value is the mean of the metric in a run {last}; intervals are Student's t over seeds."
    if settings.reference:
        text += (
            f" Differences are to {settings.reference}, seed by seed: p is the paired t-test's, Holm's correction is "
            "over the comparisons of one table, and the permutation test assumes no distribution but cannot fall below "
            "2^(1 - pairs), which is 0.0625 for five."
        )
    return [text]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _ends(interval: Interval) -> str:
    return f"{interval.low:.4g} to {interval.high:.4g}" if interval.is_known else "-"


def _p(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2g}"
