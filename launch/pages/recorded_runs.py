"""What runs have recorded, read for a report, and which of them are the same experiment under several seeds.

Must not know charts. Numbers that a run has not recorded stay absent; nothing is filled in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float
from scipy import stats

from trace_rl.errors import DataError
from trace_rl.launch.run_folder import RunFolder, dotted_settings
from trace_rl.protocols import is_evaluation

ABSENT = "\N{EN DASH}"
"""Stands in a table for what was not recorded."""
EVALUATED = ("heldout/", "eval/")
"""What evaluations record: of held-out prompts, and of the sets of evaluation.sets."""
_OF_A_RUN = ("run.name", "run.folder", "run.seed", "run.resume")
"""Settings in which the runs of one experiment may differ."""


@dataclass(frozen=True)
class RecordedRun:
    """One run folder."""

    name: str
    settings: Mapping[str, Any]
    """Dotted key -> value, as the run has resolved them."""
    steps: tuple[Mapping[str, float], ...]
    """Records of training steps in order."""
    evaluations: tuple[Mapping[str, float], ...]

    def series(self, metric: str) -> dict[int, float]:
        """Step -> value, where it was recorded."""
        records = self.evaluations if metric.startswith(EVALUATED) else self.steps
        return {int(record["step"]): record[metric] for record in records if metric in record}


@dataclass(frozen=True)
class Curve:
    """The mean of a metric over the runs of a group, by step."""

    steps: tuple[int, ...]
    mean: Float[np.ndarray, " step"]
    low: Float[np.ndarray, " step"]
    high: Float[np.ndarray, " step"]
    """Ends of the 95 % t interval of the mean over runs; the mean itself where there is one run."""
    num_runs: int


@dataclass(frozen=True)
class Group:
    """Runs that are one experiment."""

    name: str
    runs: tuple[RecordedRun, ...] = field(repr=False)

    def metrics(self) -> set[str]:
        """Names of everything that any of the runs has recorded."""
        return {name for run in self.runs for record in (*run.steps, *run.evaluations) for name in record}

    def curve(self, metric: str, window: int = 1) -> Curve:
        """Mean over the runs at every step that all of them have recorded.

        Args:
            window: steps of the running mean that each run's values are smoothed with; 1: none.
        """
        series = [found for run in self.runs if (found := run.series(metric))]
        shared = set.intersection(*map(set, series)) if series else set()
        steps = tuple(sorted(shared))
        values = np.array([smoothed([each[step] for step in steps], window) for each in series])
        if not steps:
            nothing = np.zeros(0)
            return Curve((), nothing, nothing, nothing, 0)
        low, high = mean_interval(values)
        return Curve(steps, values.mean(0), low, high, len(series))


def mean_interval(values: Float[np.ndarray, "run step"]) -> tuple[np.ndarray, np.ndarray]:
    """95 % t interval of the mean over runs; of one run the value itself."""
    mean, count = values.mean(0), len(values)
    if count < 2:
        return mean, mean
    error = stats.sem(values, axis=0)
    half = stats.t.ppf(0.975, count - 1) * error
    return mean - half, mean + half


def smoothed(values: Sequence[float], window: int) -> Float[np.ndarray, " step"]:
    """Mean of each value and those before it, `window` together; fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((total[ends] - total[starts]) / (ends - starts))


def read_run(path: Path) -> RecordedRun:
    """One run folder; a last line that is cut off, as a killed run leaves it, is ignored.

    Raises:
        DataError: the folder holds no metrics, or a line that is none.
    """
    folder = RunFolder(path)
    if not folder.metrics.is_file():
        raise DataError(f"{path} holds no metrics.jsonl, so it is no run folder; give folders that a run has written")
    records = []
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({name: float(value) for name, value in record.items() if _is_finite(value)})
            records[-1]["step"] = record["step"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                break
            raise DataError(
                f"{folder.metrics}:{number} is not a record of a step (a JSON object with step and numbers); remove "
                "the line"
            ) from error
    settings = yaml.safe_load(folder.config.read_text(encoding="utf-8")) if folder.config.is_file() else {}
    return RecordedRun(
        name=path.resolve().name,
        settings=dotted_settings(settings),
        steps=tuple(record for record in records if not is_evaluation(record)),
        evaluations=tuple(record for record in records if is_evaluation(record)),
    )


def grouped(runs: Sequence[RecordedRun], prefixes: Sequence[str]) -> list[Group]:
    """Runs that belong together, in the order in which their first was given.

    With prefixes, runs whose name begins with one of them (the longest that fits); the others, and all without
    prefixes, by their settings: runs that differ in seed, name and folder only are one experiment.
    """
    by_key: dict[str, list[RecordedRun]] = {}
    for run in runs:
        prefix = max((each for each in prefixes if run.name.startswith(each)), key=len, default="")
        by_key.setdefault(prefix or _experiment(run), []).append(run)
    groups: list[Group] = []
    for key, members in by_key.items():
        name = key if key in prefixes else _shared_name([run.name for run in members])
        taken = sum(group.name == name or group.name.startswith(f"{name} (") for group in groups)
        groups.append(Group(f"{name} ({taken + 1})" if taken else name, tuple(members)))
    return groups


def differing_settings(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """(dotted key, value of each group) of the settings that groups differ in; several of one are joined by ` | `."""
    keys = sorted({key for group in groups for run in group.runs for key in run.settings} - set(_OF_A_RUN))
    rows = [(key, [_values_of(group, key) for group in groups]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 or any(" | " in each for each in values)]


def _values_of(group: Group, key: str) -> str:
    return " | ".join(dict.fromkeys(_shown(run.settings, key) for run in group.runs))


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False, default=str).strip('"') if key in settings else ABSENT


def _experiment(run: RecordedRun) -> str:
    settings = {key: value for key, value in run.settings.items() if key not in _OF_A_RUN}
    return json.dumps(settings, sort_keys=True, default=str) if settings else run.name


def _shared_name(names: Sequence[str]) -> str:
    """The first name without the part that counts runs, where there are several."""
    return re.sub(r"[-_.](seed|s)?[-_.]?\d+$", "", names[0]) if len(names) > 1 else names[0]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
