"""What a run's own figures say of each stage: its seconds, its throughput, and its share of what the hardware gives.

Must not know how the run was started. A stage's time is that in which its role was busy, whatever it overlapped with.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, float]

IDLE = {"generation": "generator", "grading": "rewarder", "annotation": "annotator"}
"""Stages that work beside each other -> the role whose idle time is counted."""
SPANS = {"teacher": "time/teacher_s", "learner": "time/learner_s", "weight sync": "time/sync_s"}
"""Stages that the step waits for -> their time."""
STEP = "step"
FORWARD_PASSES = 3
"""Of a step of the learner: the backward pass is about two of them."""


@dataclass(frozen=True)
class Engine:
    """What the cost of decoding depends on."""

    weight_bytes: int
    kv_bytes_per_token: int
    count: int
    """Engines among which a step's completions are divided."""


def stage_seconds(record: Record) -> dict[str, float]:
    """Seconds of each stage in one step, and of the step."""
    whole = record["time/step_s"]
    found = {
        stage: (1 - record[f"idle/{role}_frac"]) * whole
        for stage, role in IDLE.items()
        if f"idle/{role}_frac" in record
    }
    found |= {stage: record[name] for stage, name in SPANS.items() if record.get(name)}
    return {**found, STEP: whole}


def decoding_bytes(record: Record, engine: Engine) -> float:
    """Bytes that an engine has to read for its share of a step's completions, at least.

    Every token step reads all weights, and the keys and values of what has been written: with N completions of mean
    length L behind prompts of P tokens on E engines, and the longest one of M tokens,

        M weights + N / E (P L + L^2 / 2) bytes a token.

    As if all of them ran from the beginning, and were equally long where keys and values are counted: less is not
    possible. Own arithmetic.
    """
    count, length = record["sampling/completions"], record["response/length_mean_tokens"]
    prompt = record["learner/tokens"] / count - length
    cached = count / engine.count * (prompt * length + length**2 / 2)
    return record["response/length_max_tokens"] * engine.weight_bytes + cached * engine.kv_bytes_per_token


def throughput(records: Sequence[Record], engine: Engine, roofs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Stage -> figures by name, medians over the steps."""
    found: dict[str, dict[str, float]] = {}

    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    seconds = [stage_seconds(record) for record in records]
    tokens = [record["sampling/completions"] * record["response/length_mean_tokens"] for record in records]
    generation = [each["generation"] for each in seconds]
    found["generation"] = {
        "tokens/s": median([count / taken for count, taken in zip(tokens, generation, strict=True)]),
        "share of memory bandwidth": median(
            [
                decoding_bytes(record, engine) / taken / roofs["copy_bytes_per_s"]
                for record, taken in zip(records, generation, strict=True)
            ]
        ),
    }
    for stage in ("grading", "annotation"):
        pairs = [
            (record["sampling/completions"], each[stage])
            for record, each in zip(records, seconds, strict=True)
            if each.get(stage)
        ]
        if pairs:
            found[stage] = {"completions/s": median([count / taken for count, taken in pairs])}
    asked = [record for record in records if record.get("teacher/forward_tokens") and record.get("time/teacher_s")]
    if asked:
        found["teacher"] = {
            "tokens/s": median([record["teacher/forward_tokens"] / record["time/teacher_s"] for record in asked]),
            "FLOPs of a full pass": median([1 - record["teacher/flops_saved_frac"] for record in asked]),
        }
    found["learner"] = {
        "tokens/s": median([record["learner/tokens"] / record["learner/duration_s"] for record in records]),
        "MFU": median(
            [
                FORWARD_PASSES
                * record["learner/forward_tflop"]
                * 1e12
                / record["learner/duration_s"]
                / roofs["matmul_flops"]
                for record in records
            ]
        ),
    }
    rates = [record["sync/weight_bytes"] / record["sync/transfer_s"] for record in records]
    found["weight sync"] = {
        "GB/s": median(rates) / 1e9,
        "share of a plain broadcast": median(rates) / roofs["link_bytes_per_s"],
    }
    return found


def idle(records: Sequence[Record]) -> dict[str, float]:
    """Role -> share of the step in which it had nothing to do."""
    return _medians(records, "idle/", "_frac")


def memory(records: Sequence[Record]) -> dict[str, float]:
    """Role, host or device -> peak in GiB, of the largest process of its kind."""
    last = records[-1]
    return {
        name.removeprefix("memory/").removesuffix("_peak_gib"): value
        for name, value in last.items()
        if name.startswith("memory/")
    }


def _medians(records: Sequence[Record], prefix: str, suffix: str) -> dict[str, float]:
    names = [name for name in records[0] if name.startswith(prefix) and name.endswith(suffix)]
    return {
        name.removeprefix(prefix).removesuffix(suffix): statistics.median(record[name] for record in records)
        for name in names
        if all(name in record for record in records)
    }
