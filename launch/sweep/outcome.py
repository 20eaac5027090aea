"""What a cell has measured, read from its run folder: progress, stop rules, and the values that a report compares.

A run may be writing while this reads: a line that is not complete yet is left for the next time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from trace_rl.config.sweep import StopRule
from trace_rl.launch.run_folder import RunFolder

Records = Sequence[Mapping[str, float]]
_STEP_METRIC = "time/step_s"
"""In the record of every training step, and of no evaluation."""


def read_records(folder: Path) -> Records:
    """The records of metrics.jsonl in order; none where the run has not begun."""
    file = RunFolder(folder).metrics
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # a line that a killed run left half
            continue
    return records


def steps_done(records: Records) -> int:
    """Training steps that are recorded."""
    return max((int(record["step"]) + 1 for record in records if _STEP_METRIC in record), default=0)


def broken_rule(rules: Sequence[StopRule], records: Records) -> str:
    """What is wrong by the first rule that is broken; empty where none is."""
    for rule in rules:
        deciding = (record for record in records if record["step"] >= rule.at_step and rule.metric in record)
        record = next(deciding, None)
        verdict = rule.verdict(int(record["step"]), record[rule.metric]) if record else ""
        if verdict:
            return verdict
    return ""


def final_value(records: Records, metric: str, last_steps: int) -> float:
    """Mean of a metric over the records of its `last_steps` last steps; NaN where it was never recorded."""
    recorded = [(record["step"], record[metric]) for record in records if metric in record]
    if not recorded:
        return math.nan
    end = max(step for step, _ in recorded)
    last = [value for step, value in recorded if step > end - last_steps]
    return sum(last) / len(last)
