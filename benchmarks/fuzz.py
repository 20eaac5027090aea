"""Reads many thousand malformed inputs with each loader and counts what came of them; one unhandled exception fails.

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0] [--target config,data] [--out benchmarks/results]

Inputs are drawn by hypothesis from `fuzz_targets`, in rounds with a seed each, so that a round can be repeated alone.
Targets are read in parts, side by side, one process per core. In --out, rows of targets that are not read stay.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from fuzz_targets import ACCEPTED, TARGETS, Target, outcome
from hypothesis import HealthCheck, Phase, given, seed, settings
from report import describe_machine, git_state, one_line, publish

from trace_rl.errors import first_line

ROUND = 5000
"""Inputs of one round; hypothesis draws fewer of a small strategy, so that there are as many rounds as it takes."""
PARTS, SEEDS_OF_A_PART = 4, 1000
"""A target is read by up to so many processes at a time, each with seeds of its own."""
PACKAGES = ("hypothesis", "pydantic", "PyYAML")


@dataclass
class Tally:
    """What came of the inputs of one target."""

    outcomes: Counter[str] = field(default_factory=Counter)
    unhandled: dict[str, str] = field(default_factory=dict)
    """The first input of each bug, by error, place and the beginning of its message."""

    @property
    def num_inputs(self) -> int:
        return self.outcomes.total()


def fuzz(target: Target, num_inputs: int, first_seed: int) -> Tally:
    """Read at least so many inputs."""
    tally, number = Tally(), first_seed
    with tempfile.TemporaryDirectory() as folder:
        while tally.num_inputs < num_inputs:
            _read_round(target, min(ROUND, num_inputs - tally.num_inputs), number, Path(folder), tally)
            number += 1
    return tally


def _read_round(target: Target, num_inputs: int, number: int, folder: Path, tally: Tally) -> None:
    @seed(number)
    @settings(
        max_examples=num_inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def read(given_input: Any) -> None:
        try:
            tally.outcomes[outcome(target, given_input, folder)] += 1
        except Exception as error:
            tally.outcomes["unhandled"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {first_line(error)[:60]}"
            tally.unhandled.setdefault(place, repr(given_input)[:500])

    read()


def _be_quiet() -> None:
    logging.disable(logging.WARNING)  # a recording that is cut short is told of each time


def _fuzzed(name: str, num_inputs: int, first_seed: int) -> tuple[Tally, float]:
    started = time.monotonic()
    tally = fuzz(TARGETS[name], num_inputs, first_seed)
    typer.echo(f"{name}: {tally.num_inputs} inputs, {tally.outcomes['unhandled']} unhandled", err=True)
    return tally, time.monotonic() - started


def _together(parts: list[tuple[Tally, float]]) -> tuple[Tally, float]:
    """All parts of a target, and their seconds."""
    whole = Tally()
    for tally, _ in parts:
        whole.outcomes += tally.outcomes
        whole.unhandled = tally.unhandled | whole.unhandled
    return whole, sum(seconds for _, seconds in parts)


def to_row(name: str, tally: Tally, seconds: float) -> dict[str, Any]:
    refused = {kind: count for kind, count in sorted(tally.outcomes.items()) if kind not in (ACCEPTED, "unhandled")}
    return {
        "target": name,
        "date": time.strftime("%Y-%m-%d"),
        "code": git_state(),
        "inputs": tally.num_inputs,
        "accepted": tally.outcomes[ACCEPTED],
        "refused": refused,
        "unhandled": tally.outcomes["unhandled"],
        "first_of_each": tally.unhandled,
        "seconds": seconds,
    }


def with_older(rows: list[dict[str, Any]], file: Path | None) -> list[dict[str, Any]]:
    """And those that a report has of other targets."""
    older = json.loads(file.read_text(encoding="utf-8"))["results"] if file and file.exists() else []
    found = {row["target"]: row for row in [*older, *rows]}
    return [found[name] for name in TARGETS if name in found]


def to_markdown(report: dict[str, Any]) -> str:
    rows = [
        f"| {row['target']} | {row['date']} | {row['code']} | {row['inputs']:,} | {row['accepted']:,} | "
        f"{', '.join(f'{kind} {count:,}' for kind, count in row['refused'].items())} | {row['unhandled']:,} | "
        f"{row['seconds']:.0f} |"
        for row in report["results"]
    ]
    return "\n".join(
        [
            "# Fuzzing of the loaders",
            "",
            f"`{report['command']}` on {one_line(report['machine'])}",
            "",
            "Each input is read, or refused by an error of ours whose message is short. Inputs are drawn from "
            "strategies near to real files (`benchmarks/fuzz_configs.py`, `benchmarks/fuzz_records.py`).",
            "",
            "| target | date | code | inputs | accepted | refused | unhandled | seconds |",
            "| --- | --- | --- | ---: | ---: | --- | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main(
    inputs: Annotated[int, typer.Option(min=1, help="Inputs of each target.")] = 100_000,
    first_seed: Annotated[int, typer.Option("--seed", help="Of the first round of the first part.")] = 0,
    target: Annotated[str, typer.Option(help="Targets, joined by commas.")] = ",".join(TARGETS),
    out: Annotated[Path | None, typer.Option(help="Folder for fuzz.json and .md.")] = None,
) -> None:
    """Fuzz, print, and write where --out says."""
    with ProcessPoolExecutor(initializer=_be_quiet) as workers:
        parts = {
            name: [
                workers.submit(_fuzzed, name, -(-inputs // PARTS), first_seed + part * SEEDS_OF_A_PART)
                for part in range(PARTS)
            ]
            for name in target.split(",")
        }
        results = [to_row(name, *_together([part.result() for part in each])) for name, each in parts.items()]
    report = {
        "command": f"python benchmarks/fuzz.py --inputs {inputs} --seed {first_seed} --target {target}",
        "machine": describe_machine(PACKAGES),
        "results": with_older(results, out / "fuzz.json" if out else None),
    }
    publish("fuzz", report, to_markdown(report), out)
    if any(row["unhandled"] for row in results):
        raise SystemExit("; ".join(place for row in results for place in row["first_of_each"]))


if __name__ == "__main__":
    typer.run(main)
