"""What an evaluation found, as tables for a terminal and for Markdown, and as JSON.

Decides which metrics are shown, always with n, k and interval. Every figure comes from `trace_rl.evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from trace_rl.evaluation import SetScore
from trace_rl.statistics import Interval, bootstrap_mean_of_sets, compare, holm, powers_of_two

Scores = Mapping[str, Sequence[SetScore]]
"""Of every checkpoint by its label: of each set, in one order."""

_INTERVALS = (
    "n problems, k samples of each; [low, high]: 95 % BCa bootstrap interval over problems, with the samples averaged "
    "first. Without an interval all problems had the same value, which says nothing of others."
)
_MEAN = "The mean of sets weighs every set the same; its interval draws problems anew within each set."
_DIFFERENCES = (
    "avg@k minus that of {first} on the same problems; [low, high]: 95 % paired bootstrap interval; p: paired "
    "permutation test over problems, two-sided; Holm: corrected for all rows. One checkpoint stands for one seed here: "
    "what another training run would give is not part of these intervals."
)


@dataclass(frozen=True)
class TextTable:
    """Cells as text, for any medium."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str

    def rich(self) -> Table:
        table = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index < 2 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rules = ["---"] * 2 + ["---:"] * (len(self.header) - 2)
        lines = [f"| {' | '.join(row)} |" for row in (self.header, rules, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, "", self.note, ""])


def result_tables(scores: Scores, seed: int) -> list[TextTable]:
    """All that is worth showing: metrics, pass@k where k > 1, and differences where there are several checkpoints."""
    tables = [_metrics_table(scores, seed)]
    most = max(score.k for of_sets in scores.values() for score in of_sets)
    if most > 1:
        tables.append(_pass_table(scores, powers_of_two(most)))
    if len(scores) > 1:
        tables.append(_difference_table(scores, seed))
    return tables


def _metrics_table(scores: Scores, seed: int) -> TextTable:
    header = ("checkpoint", "set", "n", "k", "avg@k %", "maj@k %", "tokens", "truncated %", "not graded")
    rows = []
    for label, of_sets in scores.items():
        for score in of_sets:
            metrics, k = score.metrics, score.k
            rows.append(
                (
                    label,
                    score.name,
                    str(score.num_problems),
                    str(k),
                    _percent(metrics[f"avg@{k}"]),
                    _percent(metrics[f"maj@{k}"]),
                    _number(metrics["length_mean_tokens"]),
                    _percent(metrics["truncated_frac"]),
                    str(score.num_failures),
                )
            )
        if len(of_sets) > 1:
            mean = _percent(bootstrap_mean_of_sets([score.rewards for score in of_sets], seed))
            rows.append((label, "mean of sets", str(sum(s.num_problems for s in of_sets)), "", mean, "", "", "", ""))
    has_mean = any(len(of_sets) > 1 for of_sets in scores.values())
    return TextTable("Evaluation", header, rows, f"{_INTERVALS} {_MEAN}" if has_mean else _INTERVALS)


def _pass_table(scores: Scores, powers: Sequence[int]) -> TextTable:
    rows = [
        (label, score.name, str(score.num_problems), str(score.k), *(_cell(score, f"pass@{power}") for power in powers))
        for label, of_sets in scores.items()
        for score in of_sets
    ]
    header = ("checkpoint", "set", "n", "k", *(f"pass@{power} %" for power in powers))
    return TextTable("pass@k, unbiased (arXiv:2107.03374)", header, rows, _INTERVALS)


def _cell(score: SetScore, metric: str) -> str:
    return _percent(score.metrics[metric]) if metric in score.metrics else ""


def _difference_table(scores: Scores, seed: int) -> TextTable:
    """Every checkpoint against the first."""
    (first, reference), *others = scores.items()
    found = {
        f"{label}/{ours.name}": (label, ours, compare(ours.rewards, theirs.rewards, seed))
        for label, of_sets in others
        for ours, theirs in zip(of_sets, reference, strict=True)
    }
    corrected = holm({name: item.p_value for name, (_, _, item) in found.items()})
    rows = [
        (
            label,
            score.name,
            str(score.num_problems),
            str(score.k),
            _percent(item.difference, "+.1f"),
            f"{item.p_value:.4f}",
            f"{corrected[name]:.4f}",
        )
        for name, (label, score, item) in found.items()
    ]
    header = ("checkpoint", "set", "n", "k", "difference in points", "p", "p (Holm)")
    return TextTable(f"Against {first}", header, rows, _DIFFERENCES.format(first=first))


def to_json(of_sets: Sequence[SetScore]) -> dict[str, Any]:
    """One checkpoint's metrics by set; ends that are unknown are null."""
    return {
        score.name: {
            "num_problems": score.num_problems,
            "samples_per_problem": score.k,
            "grading_failures": score.num_failures,
            "metrics": {name: _known(interval) for name, interval in score.metrics.items()},
        }
        for score in of_sets
    }


def _known(interval: Interval) -> dict[str, float | None]:
    tree = asdict(interval)
    return tree if interval.is_known else {**tree, "low": None, "high": None}


def _percent(interval: Interval, form: str = ".1f") -> str:
    return _shown(interval, 100.0, form)


def _number(interval: Interval) -> str:
    return _shown(interval, 1.0, ".0f")


def _shown(interval: Interval, scale: float, form: str) -> str:
    mean = format(scale * interval.mean, form)
    if not interval.is_known:
        return mean
    return f"{mean} [{scale * interval.low:{form}}, {scale * interval.high:{form}}]"
