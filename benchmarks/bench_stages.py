"""What a run's own figures say of each stage: its seconds, its throughput, and its share of what the hardware gives.

Must not know how the run was started. A stage's time is that in which its role was busy, whatever it overlapped with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

Record = Mapping[str, float]

ROLES = {"generation": "generator", "grading": "rewarder", "annotation": "annotator", "teacher": "teacher"}
"""Stages that work beside each other -> the role whose time at work is counted."""
SPANS = {"learner": "time/learner_s", "weight sync": "time/sync_s"}
"""Stages that the step waits for -> their time."""
STEP = "step"
_ROUNDING = 1e-9  # of seconds that are differences of sums
FORWARD_PASSES = 3
"""Of a step of the learner: the backward pass is about two of them."""


def stage_seconds(record: Record) -> dict[str, float]:
    """Seconds of each stage in one step that has any, and of the step."""
    busy = {stage: record.get(f"busy/{role}_s", 0.0) for stage, role in ROLES.items()}
    found = {stage: seconds for stage, seconds in busy.items() if seconds > _ROUNDING}
    found |= {stage: record[name] for stage, name in SPANS.items() if record.get(name)}
    return {**found, STEP: record["time/step_s"]}


def throughput(records: Sequence[Record], matmul_flops: float) -> dict[str, dict[str, float]]:
    """Stage -> figures by name, medians over the steps.

    Args:
        matmul_flops: of all ranks of the learner together.
    """

    def median(figure: Callable[[Record], float], of: Sequence[Record] = records) -> float:
        return statistics.median(map(figure, of))

    def taken(stage: str) -> Callable[[Record], float]:
        return lambda record: stage_seconds(record)[stage]

    found = {
        "generation": {
            "tokens/s": median(
                lambda r: r["sampling/completions"] * r["response/length_mean_tokens"] / taken("generation")(r)
            )
        },
        "learner": {
            "tokens/s": median(lambda r: r["learner/tokens"] / r["learner/duration_s"]),
            "MFU": median(
                lambda r: FORWARD_PASSES * r["learner/forward_tflop"] * 1e12 / r["learner/duration_s"] / matmul_flops
            ),
        },
        "weight sync": {"GB/s": median(lambda r: r["sync/weight_bytes"] / r["sync/transfer_s"] / 1e9)},
    }
    for stage in ("grading", "annotation"):
        if worked := [record for record in records if stage_seconds(record).get(stage)]:
            found[stage] = {"completions/s": median(lambda r, s=stage: r["sampling/completions"] / taken(s)(r), worked)}
    if asked := [record for record in records if record.get("teacher/forward_tokens")]:
        found["teacher"] = {
            "tokens/s": median(lambda r: r["teacher/forward_tokens"] / taken("teacher")(r), asked),
            "FLOPs of a full pass": median(lambda r: 1 - r["teacher/flops_saved_frac"], asked),
        }
    return found


def medians(records: Sequence[Record]) -> dict[str, float]:
    """Figure -> median over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: statistics.median(record[name] for record in records if name in record) for name in names}


def idle(records: Sequence[Record]) -> dict[str, float]:
    """Role -> share of the step in which it had nothing to do."""
    return {
        name.removeprefix("idle/").removesuffix("_frac"): share
        for name, share in medians(records).items()
        if name.startswith("idle/")
    }


def memory(records: Sequence[Record]) -> dict[str, float]:
    """Role, host or device -> peak in GiB, of the largest process of its kind."""
    last = records[-1]
    return {
        name.removeprefix("memory/").removesuffix("_peak_gib"): value
        for name, value in last.items()
        if name.startswith("memory/")
    }
