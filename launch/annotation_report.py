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
    ("without a span", "annotation/empty_frac", "{:.1%}"),
    ("coverage before the cap", "annotation/coverage_before_cap_frac", "{:.1%}"),
    ("coverage", "annotation/coverage_frac", "{:.1%}"),
    ("spans located", "annotation/spans_located_frac", "{:.1%}"),
    ("spans out of range", "annotation/out_of_range_frac", "{:.1%}"),
    ("spans of unknown type", "annotation/unknown_types_frac", "{:.1%}"),
    ("overlaps merged", "annotation/overlaps", "{:.0f}"),
    ("replies repaired", "annotation/repairs", "{:.0f}"),
    ("round-trip errors", "annotation/round_trip_errors", "{:.0f}"),
    ("precision against the rule", "annotation/rule_precision", "{:.1%}"),
    ("recall against the rule", "annotation/rule_recall", "{:.1%}"),
    ("first error hit", "annotation/first_error_hit_frac", "{:.1%}"),
    ("requests", "annotation/requests", "{:.0f}"),
    ("answers from the cache", "annotation/cache_hits", "{:.0f}"),
    ("prompt tokens", "annotation/prompt_tokens", "{:.0f}"),
    ("completion tokens", "annotation/completion_tokens", "{:.0f}"),
)
"""Rows of the audit's table: name, metric, format; rows that no annotator has are left out."""
_AGREEMENT = (
    ("responses compared", "compared", "{:.0f}"),
    ("both without a span", "both_empty", "{:.0f}"),
    ("precision", "precision", "{:.1%}"),
    ("recall", "recall", "{:.1%}"),
    ("F1", "f1", "{:.1%}"),
    ("same type, of shared tokens", "type_agreement_frac", "{:.1%}"),
    ("first span hit", "first_error_hit_frac", "{:.1%}"),
    ("first span touched", "first_error_touched_frac", "{:.1%}"),
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
    table = _table(f"{len(outcomes[0].annotated)} recorded rollouts", [outcome.name for outcome in outcomes])
    causes = sorted({name for each in outcomes for name in each.metrics if name.startswith("annotation/failed/")})
    types = sorted({name for each in outcomes for name in each.metrics if name.startswith("annotation/types/")})
    rows = [
        *_AUDIT,
        *((f"cause {name.rpartition('/')[2]}", name, "{:.0f}") for name in causes),
        *((f"type {name.rpartition('/')[2]}", name, "{:.0f}") for name in types),
    ]
    _add_rows(table, rows, [outcome.metrics for outcome in outcomes])
    table.add_row("seconds", *(f"{outcome.duration_s:.1f}" for outcome in outcomes))
    return table


def agreement_table(one: Outcome, other: Outcome) -> Table:
    """How far the first annotator agrees with the second, which is the reference, by class of spans.

    Responses that either of them failed on are left out.
    """
    columns = []
    for span_class in _CLASSES:
        pairs = [
            (first, second)
            for first, second in zip(one.annotated, other.annotated, strict=True)
            if first.cause == second.cause == "annotated" and span_class_of(first.graded) == span_class
        ]
        columns.append(
            agreement_metrics(
                agreement(first.spans, second.spans, len(first.graded.rollout.token_ids)) for first, second in pairs
            )
        )
    table = _table(f"{one.name} against {other.name}", list(_CLASSES.values()))
    _add_rows(table, _AGREEMENT, columns)
    return table


def cost_lines(config: RunConfig, cost: Cost, num_rollouts: int) -> list[str]:
    """What a run of this configuration would ask of its annotator, in words."""
    per_step = cost.requests / cost.steps if cost.steps else 0.0
    counted = "as measured" if cost.is_measured else "at most"
    lines = [
        f"A run of {config.run.steps} steps asks its annotator at {cost.steps} of them:",
        f"  {cost.requests:,.0f} requests, {per_step:.0f} a step (for rollouts like the {num_rollouts} recorded ones, "
        "without repeats)",
        f"  {cost.prompt_tokens:,.0f} prompt tokens by the policy's tokenizer",
        f"  {cost.completion_tokens:,.0f} completion tokens ({counted})",
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


def _add_rows(table: Table, rows: Sequence[tuple[str, str, str]], columns: Sequence[Mapping[str, float]]) -> None:
    for label, name, form in rows:
        if any(name in column for column in columns):
            table.add_row(label, *(form.format(column[name]) if name in column else "-" for column in columns))
