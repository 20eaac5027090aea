"""The record of a GPU check as Markdown: where it comes from, what was left out or failed, and a section's figures.

Must not know what the sections measure, but for the goals that their figures are held against.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from report import one_line

MFU_GOAL = 0.45
UNITS = (("flops_per_s", "TFLOP/s", 1e12), ("bytes_per_s", "GB/s", 1e9), ("flops", "TFLOP", 1e12), ("_mib", " MiB", 1))
"""How a name ends, how its column is headed, and what its figures are divided by."""


def to_markdown(record: Mapping[str, Any]) -> str:
    lines = ["# The GPU check", ""]
    if record["scale"] == "dry":
        lines += ["**A dry run on the CPU at tiny sizes: its figures mean nothing and are not to be published.**", ""]
    lines += [
        f"`{record['command']}`, {record['date']}, seed {record['seed']}, code {record['git'] or 'outside of git'}",
        "",
        f"On {one_line(record['machine'])}.",
        "",
        *_verdicts(record),
    ]
    for name, section in record["sections"].items():
        lines += ["", f"## {name} ({section['seconds']:.0f} s)"]
        for columns, group in groupby(section["cases"], key=_columns):
            cases = list(group)
            lines += ["", *(_table(columns, cases) if columns else map(_reason, cases))]
    return "\n".join(lines) + "\n"


def num_failed(record: Mapping[str, Any]) -> int:
    """Cases that have failed."""
    return sum(case["status"] == "failed" for case in _cases(record))


def _verdicts(record: Mapping[str, Any]) -> list[str]:
    ends = [case["status"] for case in _cases(record)]
    lines = ["Cases: " + ", ".join(f"{ends.count(end)} {end}" for end in ("done", "skipped", "failed")) + "."]
    lines += [f"- {case['section']}: {_reason(case)[2:]}" for case in _cases(record) if case["status"] == "failed"]
    if record["scale"] == "full" and (found := _mfus_of_goal(record)):
        case, mfu = max(found.items(), key=lambda item: item[1])
        verb = "reached" if mfu >= MFU_GOAL else "missed"
        lines.append(f"- the goal of {MFU_GOAL:.0%} MFU (Qwen3 1.7B, packed, 4k tokens) is {verb}: {mfu:.1%}, {case}")
    return lines


def _mfus_of_goal(record: Mapping[str, Any]) -> dict[str, float]:
    """By case: the MFU that the goal speaks of, where it was measured."""
    return {
        f"{case['case']}, {row['routed_frac']:.0%} routed": row["mfu_frac"]
        for case in _cases(record)
        if case["section"] == "learner" and case["case"].startswith("Qwen3 1.7B") and case["status"] == "done"
        for row in case["rows"]
        if row["layout"] == "packed" and "mfu_frac" in row
    }


def _cases(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"section": name, **case} for name, section in record["sections"].items() for case in section["cases"]]


def _columns(case: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the table that a case belongs to; none where it has no rows."""
    return tuple(dict.fromkeys(name for row in case.get("rows", ()) for name in row))


def _reason(case: Mapping[str, Any]) -> str:
    return f"- {case['case']}: {case['status']}, {case.get('why', 'without a figure')}"


def _table(columns: tuple[str, ...], cases: list[Mapping[str, Any]]) -> list[str]:
    """The rows of cases that have the same columns."""
    is_on_gpu = any("peak_memory_mib" in case for case in cases)
    header = ["case", *(["peak memory MiB"] if is_on_gpu else []), *map(_heading, columns)]
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for case in cases:
        first = [case["case"], *([f"{case['peak_memory_mib']:,}"] if is_on_gpu else [])]
        for row in case["rows"]:
            cells = [*first, *(_cell(name, row.get(name, "")) for name in columns)]
            lines.append(f"| {' | '.join(cells)} |")
            first = [""] * len(first)
    return lines


def _heading(name: str) -> str:
    ending, unit = next(((ending, unit) for ending, unit, _ in UNITS if name.endswith(ending)), ("", ""))
    return (name.removesuffix("_frac").removesuffix(ending) + unit).replace("_", " ")


def _cell(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if name.endswith("_frac"):
        return f"{value:.1%}"
    scale = next((size for ending, _, size in UNITS if name.endswith(ending)), 1)
    return f"{value:,}" if isinstance(value, int) and scale == 1 else f"{value / scale:.4g}"
