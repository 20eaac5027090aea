"""What annotators are worth, as tables: each by itself, two against each other, and what a run of one would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from trace_rl.agreement import agreement, agreement_metrics
from trace_rl.annotation import span_class_of
from trace_rl.batch import AnnotatedRollout, SpanClass
from trace_rl.config.run import RunConfig
from trace_rl.launch.annotation_cost import Cost

_AUDIT = (
    ("annotated", "annotation/annotated", "{:.0f}"),
    ("not annotated", "annotation/failed", "{:.0f}"),
)
_FIGURES = (
    ("annotated without a span", "annotation/empty_frac", "{:.1%}"),
    ("spans", "annotation/spans", "{:.0f}"),
    ("share of tokens marked, before the cap", "annotation/coverage_before_cap_frac", "{:.1%}"),
    ("share of tokens marked", "annotation/coverage_frac", "{:.1%}"),
    ("spans located", "annotation/spans_located_frac", "{:.1%}"),
    ("spans out of range", "annotation/out_of_range_frac", "{:.1%}"),
    ("spans of unknown type", "annotation/unknown_types_frac", "{:.1%}"),
    ("overlaps merged", "annotation/overlaps", "{:.0f}"),
    ("replies repaired", "annotation/repairs", "{:.0f}"),
    ("round-trip errors", "annotation/round_trip_errors", "{:.0f}"),
    ("against the rule: precision", "annotation/rule_precision", "{:.1%}"),
    ("against the rule: recall", "annotation/rule_recall", "{:.1%}"),
    ("against the rule: first error hit", "annotation/first_error_hit_frac", "{:.1%}"),
    ("requests sent", "annotation/requests", "{:.0f}"),
    ("answers from the cache", "annotation/cache_hits", "{:.0f}"),
    ("prompt tokens", "annotation/prompt_tokens", "{:.0f}"),
    ("completion tokens", "annotation/completion_tokens", "{:.0f}"),
)
"""Rows of the audit's table: label, metric, format; rows that no annotator has are left out."""
_AGREEMENT = (
    ("responses compared", "compared", "{:.0f}"),
    ("left out: both without a span", "both_empty", "{:.0f}"),
    ("left out: not annotated by one", "not_annotated", "{:.0f}"),
    ("precision", "precision", "{:.1%}"),
    ("recall", "recall", "{:.1%}"),
    ("F1", "f1", "{:.1%}"),
    ("same type, of shared tokens", "type_agreement_frac", "{:.1%}"),
    ("reference's first span, hit first", "first_error_hit_frac", "{:.1%}"),
    ("reference's first span, hit at all", "first_error_touched_frac", "{:.1%}"),
)
_CLASSES: Mapping[SpanClass, str] = {"key": "key spans", "error": "error spans"}


@dataclass(frozen=True)
class Outcome:
    """What one annotator made of recorded rollouts."""

    name: str
    annotated: Sequence[AnnotatedRollout]
    """In the order of the record."""
    metrics: Mapping[str, float]
    duration_s: float
    """Without the start of actors and engines."""


def audit_table(outcomes: Sequence[Outcome]) -> Table:
    """Every annotator's audit, one column each."""
    title = f"What annotators make of {len(outcomes[0].annotated)} recorded rollouts"
    table = _table(title, [outcome.name for outcome in outcomes])
    columns = [outcome.metrics for outcome in outcomes]
    rows = [
        *_AUDIT,
        *_counted(columns, "annotation/failed/", "  {}"),
        *_FIGURES,
        *_counted(columns, "annotation/types/", "spans of type {}"),
    ]
    _add_rows(table, rows, columns)
    table.add_row("seconds", *(f"{outcome.duration_s:.1f}" for outcome in outcomes))
    return table


def agreement_table(one: Outcome, other: Outcome) -> Table:
    """How far the first annotator agrees with the second, which is the reference, by class of spans.

    Responses that either of them failed on are left out, and counted.
    """
    columns = []
    for span_class in _CLASSES:
        pairs = [
            (first, second)
            for first, second in zip(one.annotated, other.annotated, strict=True)
            if span_class_of(first.graded) == span_class
        ]
        both = [pair for pair in pairs if all(item.cause == "annotated" for item in pair)]
        compared = agreement_metrics(
            agreement(first.spans, second.spans, len(first.graded.rollout.token_ids)) for first, second in both
        )
        columns.append(compared | {"not_annotated": float(len(pairs) - len(both))})
    table = _table(f"{one.name}, measured against {other.name}", list(_CLASSES.values()))
    _add_rows(table, _AGREEMENT, columns)
    return table


def num_answers(metrics: Mapping[str, float]) -> float:
    """Requests of a model that were answered; those that failed cost no completion tokens."""
    failed = sum(value for name, value in metrics.items() if name.startswith("annotation/faults/"))
    return metrics.get("annotation/requests", 0.0) - failed


def cost_lines(config: RunConfig, cost: Cost, num_rollouts: int) -> list[str]:
    """What a run of this configuration would ask of its annotator, in words."""
    if not cost.steps:
        return [
            f"A run of {config.run.steps} steps asks its annotator nothing: no route reads spans while its schedule is "
            "above 0."
        ]
    counted = "by the answers above" if cost.is_measured else "at most, by annotator.backend.max_reply_tokens"
    lines = [
        f"A run of {config.run.steps} steps asks its annotator at {cost.steps} of them. With rollouts like the "
        f"{num_rollouts} recorded ones, and without repeated requests, that is",
        f"  {cost.requests:,.0f} requests, {cost.requests / cost.steps:,.0f} a step",
        f"  {cost.prompt_tokens:,.0f} prompt tokens, by the policy's tokenizer",
        f"  {cost.completion_tokens:,.0f} completion tokens, {counted}",
    ]
    if cost.money:
        lines.append(f"  {cost.money:,.2f} at the prices of annotator.backend.budget")
    if cost.minutes_at_rate:
        lines.append(f"  {cost.minutes_at_rate:,.0f} minutes at annotator.backend.limits.requests_per_minute")
    return lines


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _counted(columns: Sequence[Mapping[str, float]], prefix: str, label: str) -> list[tuple[str, str, str]]:
    """A row for every metric of that prefix."""
    names = sorted({name for column in columns for name in column if name.startswith(prefix)})
    return [(label.format(name.removeprefix(prefix)), name, "{:.0f}") for name in names]


def _add_rows(table: Table, rows: Sequence[tuple[str, str, str]], columns: Sequence[Mapping[str, float]]) -> None:
    for label, name, form in rows:
        if any(name in column for column in columns):
            table.add_row(label, *(form.format(column[name]) if name in column else "-" for column in columns))
