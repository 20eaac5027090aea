"""What the cost model of `trace-rl plan` counts of steps that a run has made: lengths and routes as they were."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_rl.config.run import RunConfig
from trace_rl.launch.plan.cost import StepCost, step_cost
from trace_rl.launch.plan.hardware import Hardware, Roofs, Shares
from trace_rl.launch.plan.run_plan import plan_run
from trace_rl.launch.plan.stages import Given
from trace_rl.launch.plan.workload import Expected, Lengths, Workload, busy_steps
from trace_rl.launch.preflight import check
from trace_rl.launch.prompt_sources import peek

DUMP = "logging={diagnostics_every: 0, token_figures: known, rollouts_every: 1, rollouts_per_step: 1000000}"
"""Setting of a run that is to be counted: every rollout of every step is stored."""
_PROMPTS = 64


def at_the_roofs(given: Given) -> StepCost:
    """What a step takes where every stage is as fast as the hardware allows."""
    return step_cost(given, busy_steps(given.config))


def counted(
    config: RunConfig, folder: Path, records: Sequence[Mapping[str, float]], warm_up: int, roofs: Roofs
) -> Given:
    """What a step of a run had to do, on hardware whose roofs every stage reaches.

    Args:
        config: as the run was given it.
        folder: of the run, which was made with `DUMP`.
        records: of its steps after the warm-up.
        warm_up: steps that do not count.
    """
    ready = check(config)
    prompts = peek(ready.prompts, _PROMPTS)
    prompt_tokens = statistics.mean(len(ready.encoder.student_ids(prompt)) for prompt in prompts)
    files = sorted((folder / "rollouts").glob("step-*.jsonl"))[warm_up:]
    dumps = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    teacher_tokens = statistics.mean(record.get("teacher/forward_tokens", 0.0) for record in records)
    work = workload_of(config, prompt_tokens, dumps, teacher_tokens)
    hardware = Hardware(roofs=roofs, shares=Shares(generation=1, teacher=1, learner=1, sync=1))
    return replace(plan_run(ready.config, ready.prompts, None).given(Expected(), hardware), work=work)


def workload_of(
    config: RunConfig, prompt_tokens: float, dumps: Sequence[Sequence[Mapping[str, Any]]], teacher_tokens: float = 0.0
) -> Workload:
    """What some steps held, from their dumped rollouts.

    Args:
        teacher_tokens: that a step's requests to the teacher have together, prompts and contexts included, those that
            are computed once for several of them once.
    """
    lengths = [[len(rollout["token_ids"]) for rollout in step] for step in dumps]
    taken = [
        (len(rollout["token_ids"]), [position for route in rollout["routes"] for position in route["positions"]])
        for step in dumps
        for rollout in step
    ]
    routed = [(length, positions) for length, positions in taken if positions]
    reach = statistics.mean(max(positions) + 1 for _, positions in routed) if routed else 0.0
    asked = teacher_tokens * len(dumps) / len(routed) if routed else 0.0
    longest = statistics.mean(map(max, lengths))
    return Workload(
        prompts=config.sampling.prompts_per_step,
        samples=config.sampling.samples_per_prompt,
        prompt_tokens=prompt_tokens,
        responses=replace(Lengths.of([length for step in lengths for length in step]), longest=longest),
        context_tokens=asked - prompt_tokens - reach if asked else 0.0,
        routed_rollouts_frac=len(routed) / len(taken),
        routed_tokens_frac=sum(len(positions) for _, positions in routed) / sum(length for length, _ in taken),
        routed_reach_frac=statistics.mean((max(p) + 1) / n for n, p in routed) if routed else 1.0,
        annotation_s=0.0,
        is_at_full_length=False,
    )
