"""The charts and tables of a report, as data: traces for Plotly, and rows of text.

Decides what is worth showing of a run, and in which order. Must not know files, markup or colours; the page gives each
group its colour by `group`, the same in all charts.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trace_rl.launch.pages.recorded_runs import ABSENT, EVALUATED, Curve, Group, differing_settings, mean_interval

Chart = Mapping[str, Any]
Table = Mapping[str, Any]
Section = Mapping[str, Any]

_LEARNING = {
    "heldout/pass_at_1": ("Held-out pass@1", "share"),
    "reward/mean": ("Reward of training rollouts", "mean reward"),
}
_HEALTH = {
    "policy/entropy_nats": ("Entropy of the policy", "nats"),
    "response/length_mean_tokens": ("Length of responses", "tokens"),
    "response/truncated_frac": ("Truncated responses", "share"),
    "reward/zero_variance_groups_frac": ("Groups without a difference in reward", "share"),
    "learner/grad_norm": ("Norm of the gradient", "before clipping"),
    "policy/clip_frac": ("Clipped tokens of the policy gradient", "share"),
    "mismatch/logprob_gap_mean_nats": ("Mismatch of learner and sampler", "nats, mean"),
    "mismatch/kl_nats": ("KL of sampler and learner", "nats"),
    "sync/canary_gap_max_nats": ("Canary gap after weight sync", "nats, largest"),
    "staleness/mean_versions": ("Age of tokens", "versions"),
    "exposure/lambda_sq_sum": ("Exposure to the teacher", "sum of λ²"),
    "exposure/routed_grad_norm_sum": ("Exposure, by gradient norm", "sum"),
}
_ROUTE_METRICS = {
    "value_nats": ("divergence", "nats, before any clip"),
    "lambda": ("weight λ", "schedule"),
    "token_frac": ("routed tokens", "share"),
}
_STAGE = re.compile(r"time/(?!step_s$)(\w+)_s$")
_TYPE = "annotation/types/"
_COVERAGE = "annotation/coverage_frac"
_SMOOTH_PARTS = 40
"""A smoothed curve keeps about so many independent points."""


def sections(groups: Sequence[Group]) -> list[Section]:
    """Everything that a report shows of some groups, without what none of them has recorded."""
    recorded = set().union(*(group.metrics() for group in groups))
    window = smoothing_window(groups)
    found = [
        _section(
            "Learning",
            _note(groups, window),
            _curves(groups, _LEARNING | _further_sets(recorded), recorded, window),
            summary_table(groups),
        ),
        _section("Health", "", _curves(groups, _HEALTH | _route_metrics(recorded), recorded, window)),
        _section("Time of a step by stage", "Mean over the runs of a group; a step is the sum.", _stages(groups)),
        _section("Annotation", "", [*_coverage(groups), *_types(groups)]),
        _section("Settings that differ", "Seed, name and folder of a run are left out.", (), diff_table(groups)),
    ]
    return [section for section in found if section["charts"] or section["table"]["rows"]]


def smoothing_window(groups: Sequence[Group]) -> int:
    """Steps of the running mean over training metrics."""
    longest = max((len(run.steps) for group in groups for run in group.runs), default=0)
    return max(1, round(longest / _SMOOTH_PARTS))


def summary_table(groups: Sequence[Group]) -> Table:
    """One row a group: how many runs, and where they began and ended, with the 95 % interval over runs."""
    rows = []
    for group in groups:
        first, last = (_ends(group, "heldout/pass_at_1", end) for end in (0, -1))
        steps = max((len(run.steps) for run in group.runs), default=0)
        rows.append(
            [
                group.name,
                str(len(group.runs)),
                _seeds(group),
                str(steps),
                _interval(first, percent=True),
                _interval(last, percent=True),
                _interval(last - first if len(last) == len(first) else last[:0], percent=True),
                _interval(_ends(group, "response/length_mean_tokens", -1)),
                _interval(_ends(group, "policy/entropy_nats", -1)),
                _interval(np.array([np.mean(list(s.values())) for s in _series(group, "time/step_s")])),
            ]
        )
    head = [
        "group", "runs", "seeds", "steps", "pass@1 % first", "pass@1 % last", "gain, points",
        "length last", "entropy last", "s a step",
    ]  # fmt: skip
    return {"head": head, "rows": rows}


def diff_table(groups: Sequence[Group]) -> Table:
    """Settings in which groups differ."""
    rows = [[key, *values] for key, values in differing_settings(groups)] if len(groups) > 1 else []
    return {"head": ["setting", *(group.name for group in groups)], "rows": rows}


def _section(title: str, note: str, charts: Iterable[Chart], table: Table | None = None) -> Section:
    return {"title": title, "note": note, "charts": list(charts), "table": table or {"head": [], "rows": []}}


def _note(groups: Sequence[Group], window: int) -> str:
    several = any(len(group.runs) > 1 for group in groups)
    parts = ["Lines are means over the runs of a group, bands their 95 % t intervals."] if several else []
    if window > 1:
        parts.append(f"Training metrics are running means over {window} steps; held-out ones are not smoothed.")
    return " ".join(parts)


def _curves(
    groups: Sequence[Group], metrics: Mapping[str, tuple[str, str]], recorded: set[str], window: int
) -> list[Chart]:
    charts = []
    for metric, (title, unit) in metrics.items():
        if metric not in recorded:
            continue
        smooth = 1 if metric.startswith((*EVALUATED, "exposure/")) else window
        curves = [group.curve(metric, smooth) for group in groups]
        traces = [
            trace
            for number, (group, curve) in enumerate(zip(groups, curves, strict=True))
            if curve.steps
            for trace in _curve_traces(group, number, curve)
        ]
        table = _curve_table(groups, curves)
        charts.append(_chart(title, traces, unit, table, metric=metric, is_share=unit == "share"))
    return charts


def _curve_traces(group: Group, number: int, curve: Curve) -> list[dict[str, Any]]:
    steps, name = list(curve.steps), plotly_text(group.name)
    line = {
        "type": "scatter",
        "mode": "lines+markers" if len(steps) <= 12 else "lines",
        "x": steps,
        "y": numbers(curve.mean),
        "name": name,
        "legendgroup": name,
        "group": number,
    }
    if curve.num_runs < 2:
        return [line]
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": steps + steps[::-1],
        "y": numbers(np.concatenate([curve.high, curve.low[::-1]])),
        "fill": "toself",
        "name": f"{name}, 95 % interval",
        "legendgroup": name,
        "showlegend": False,
        "hoverinfo": "skip",
        "group": number,
        "isBand": True,
    }
    return [band, line]


def _curve_table(groups: Sequence[Group], curves: Sequence[Curve]) -> Table:
    rows = []
    for group, curve in zip(groups, curves, strict=True):
        if curve.steps:
            shown = [_bounded(curve, index) for index in (0, len(curve.steps) // 2, -1)]
            rows.append([group.name, str(curve.num_runs), *shown])
    return {"head": ["group", "runs", "first", "middle", "last"], "rows": rows}


def _bounded(curve: Curve, index: int) -> str:
    interval = f" [{curve.low[index]:.4g}, {curve.high[index]:.4g}]" if curve.num_runs > 1 else ""
    return f"{curve.mean[index]:.4g}{interval} at step {curve.steps[index]}"


def _further_sets(recorded: set[str]) -> dict[str, tuple[str, str]]:
    names = [(name, match[1]) for name in sorted(recorded) if (match := re.fullmatch(r"eval/(.+)/pass_at_1", name))]
    return {name: (f"pass@1 on {label}", "share") for name, label in names}


def _route_metrics(recorded: set[str]) -> dict[str, tuple[str, str]]:
    found = {}
    for name in sorted(recorded):
        match = re.fullmatch(r"route/(.+)/(\w+)", name)
        if match and match[2] in _ROUTE_METRICS:
            title, unit = _ROUTE_METRICS[match[2]]
            found[name] = (f"Route {match[1]}: {title}", unit)
    return found


def _stages(groups: Sequence[Group]) -> list[Chart]:
    names = {match[1] for group in groups for name in group.metrics() if (match := _STAGE.match(name))}
    order = [name for name in ("rollout", "teacher", "learner", "sync") if name in names]
    order += sorted(names - set(order) - {"evaluation"})
    charts = []
    for group in groups:
        curves = {name: group.curve(f"time/{name}_s", smoothing_window([group])) for name in order}
        traces = [
            {
                "type": "scatter",
                "mode": "lines",
                "x": list(curve.steps),
                "y": numbers(curve.mean),
                "name": plotly_text(name),
                "stackgroup": "time",
                "group": number,
            }
            for number, (name, curve) in enumerate(curves.items())
            if curve.steps
        ]
        total = sum(float(curve.mean.mean()) for curve in curves.values() if curve.steps) or 1.0
        rows = [
            [name, f"{curve.mean.mean():.3g}", f"{curve.mean.mean() / total:.0%}"]
            for name, curve in curves.items()
            if curve.steps
        ]
        if traces:
            table = {"head": ["stage", "mean s", "share"], "rows": rows}
            charts.append(_chart(plotly_text(group.name), traces, "seconds", table))
    return charts


def _coverage(groups: Sequence[Group]) -> list[Chart]:
    traces, rows = [], []
    for number, group in enumerate(groups):
        values = [value for series in _series(group, _COVERAGE) for value in series.values()]
        if values:
            shown = plotly_text(group.name)
            traces.append({"type": "histogram", "x": numbers(values), "name": shown, "group": number, "nbinsx": 30})
            quartiles = np.percentile(values, [0, 25, 50, 75, 100])
            rows.append([group.name, str(len(values)), *(f"{value:.1%}" for value in quartiles)])
    table = {"head": ["group", "steps", "least", "25 %", "median", "75 %", "most"], "rows": rows}
    title = "Share of a response's tokens that spans cover"
    return [_chart(title, traces, "steps", table, x="share", is_steps=False)] if traces else []


def _types(groups: Sequence[Group]) -> list[Chart]:
    names = sorted({name for group in groups for name in group.metrics() if name.startswith(_TYPE)})
    labels = [plotly_text(name.removeprefix(_TYPE)) for name in names]
    traces, rows = [], []
    for number, group in enumerate(groups):
        counts = [sum(sum(series.values()) for series in _series(group, name)) for name in names]
        total = sum(counts)
        if total:
            shares = [count / total for count in counts]
            shown = plotly_text(group.name)
            traces.append({"type": "bar", "x": labels, "y": numbers(shares), "name": shown, "group": number})
            shown_shares = (f"{count:.0f} ({share:.0%})" for count, share in zip(counts, shares, strict=True))
            rows.append([group.name, *shown_shares])
    table = {"head": ["group", *(name.removeprefix(_TYPE) for name in names)], "rows": rows}
    return [_chart("Spans by type", traces, "share", table, x="", is_steps=False, is_share=True)] if traces else []


def _chart(
    title: str,
    traces: Sequence[Mapping[str, Any]],
    unit: str,
    table: Table,
    metric: str = "",
    x: str = "step",
    is_steps: bool = True,
    is_share: bool = False,
) -> Chart:
    return {
        "title": title,
        "metric": metric,
        "traces": list(traces),
        "y": unit,
        "x": x,
        "isShare": is_share,
        "isSteps": is_steps,
        "table": table,
    }


def _series(group: Group, metric: str) -> list[dict[int, float]]:
    return [series for run in group.runs if (series := run.series(metric))]


def _ends(group: Group, metric: str, index: int) -> np.ndarray:
    """The first or last value of each run."""
    return np.array([list(series.values())[index] for series in _series(group, metric)])


def _interval(values: np.ndarray, percent: bool = False) -> str:
    if not len(values):
        return ABSENT
    low, high = (each.item() for each in mean_interval(np.asarray(values, dtype=float)[:, None]))
    scale, form = (100.0, ".1f") if percent else (1.0, ".3g")
    shown = f"{scale * values.mean():{form}}"
    return f"{shown} [{scale * low:{form}}, {scale * high:{form}}]" if len(values) > 1 else shown


def _seeds(group: Group) -> str:
    return ", ".join(str(run.settings.get("run.seed", ABSENT)) for run in group.runs)


def plotly_text(text: str) -> str:
    """Text that Plotly, which reads a little HTML, shows as it is."""
    return html.escape(text, quote=False)


def numbers(values: Iterable[float]) -> list[float | None]:
    """With five digits, as JSON knows them."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]
