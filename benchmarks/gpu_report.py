"""The record of a GPU check as Markdown: where it comes from, what was left out or failed, and a table for each case.

Must not know what the sections measure, but for the goals that their figures are held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from report import one_line

MFU_GOAL = 0.45


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
        for case in section["cases"]:
            lines += ["", *_case_lines(case)]
    return "\n".join(lines) + "\n"


def num_failed(record: Mapping[str, Any]) -> int:
    """Cases that have failed."""
    return sum(case["status"] == "failed" for case in _cases(record))


def _verdicts(record: Mapping[str, Any]) -> list[str]:
    cases = _cases(record)
    ends = {status: sum(case["status"] == status for case in cases) for status in ("done", "skipped", "failed")}
    lines = ["Cases: " + ", ".join(f"{count} {status}" for status, count in ends.items()) + "."]
    lines += [
        f"- failed: {case['section']}, {case['case']}: {case['why']}" for case in cases if "failed" in case["status"]
    ]
    if record["scale"] == "full" and (reached := _mfu_of_goal(record)):
        verb = "reached" if reached >= MFU_GOAL else "missed"
        lines.append(
            f"- goal of {MFU_GOAL:.0%} MFU (Qwen3 1.7B, packed, about 4,096 tokens): {verb} with {reached:.1%}"
        )
    return lines


def _mfu_of_goal(record: Mapping[str, Any]) -> float:
    """The MFU that the goal speaks of; 0 where it was not measured."""
    found = [
        row["mfu_frac"]
        for case in _cases(record)
        if case["section"] == "learner" and case["case"] == "Qwen3 1.7B" and case["status"] == "done"
        for row in case["rows"]
        if row["layout"] == "packed"
    ]
    return max(found, default=0.0)


def _cases(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"section": name, **case} for name, section in record["sections"].items() for case in section["cases"]]


def _case_lines(case: Mapping[str, Any]) -> list[str]:
    if case["status"] != "done":
        return [f"{case['case']}: {case['status']}, {case['why']}"]
    memory = f", peak memory {case['peak_memory_mib']} MiB" if "peak_memory_mib" in case else ""
    rows: Sequence[Mapping[str, Any]] = case["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    header = [name.removesuffix("_frac").removesuffix("_ratio").replace("_", " ") for name in names]
    return [
        f"{case['case']} ({case['seconds']:.1f} s{memory}):",
        "",
        f"| {' | '.join(header)} |",
        "| --- " * len(names) + "|",
        *(f"| {' | '.join(_cell(name, row.get(name, '')) for name in names)} |" for row in rows),
    ]


def _cell(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if name.endswith("_frac"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
