"""What scheduling gains where a few completions take long: every mode over the same trace of lengths.

    python benchmarks/straggler_trace.py [--steps 10] [--out benchmarks/results]

The real loop and the real `VllmGenerator` over engines that sleep (`sleeping_engine`), with a learner that sleeps for a
step and a sync that holds the engines up. Lengths are log-normal and those of prompt and sample, so that all modes meet
the same ones. Time is scaled: what takes a token half a millisecond here takes 20 to 50 ms on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import own_ray  # before Ray
import typer
from fake_roles import crew, quick_actors, start_engines
from report import describe_machine, one_line, publish
from sleeping_engine import Pace, length_of

from trace_rl.batch import RolloutKey
from trace_rl.config.run import RunConfig
from trace_rl.loop import train
from trace_rl.workers.waiting import wait_for

TARGET = 1.4
"""Throughput of asynchronous training relative to synchronous training."""
SYNC = "synchronous"
MODES: Mapping[str, Mapping[str, Any]] = {
    SYNC: {},
    "synchronous, 25 % more and cut": {"late": "drop", "oversampling_frac": 0.25},
    "one step off, finish": {"max_staleness": 1, "partial": "finish"},
    "one step off": {"max_staleness": 1},
    "staleness 2": {"max_staleness": 2},
    "staleness 2, drop": {"max_staleness": 2, "late": "drop"},
    "staleness 4": {"max_staleness": 4},
}
OVER_RATIOS = (SYNC, "one step off, finish", "one step off", "staleness 2")
PACKAGES = ("ray", "numpy")
_CALL_S = 60.0


@dataclass(frozen=True)
class Setting:
    """A cluster in miniature: 128 completions a step for 64 places, of which a full batch is twice as slow as one."""

    prompts: int = 16
    samples: int = 8
    num_engines: int = 4
    max_concurrent: int = 16
    median_tokens: float = 128
    sigma: float = 1.0
    """p99 / p50 = exp(2.33 sigma): 10."""
    max_tokens: int = 2048
    seconds_per_token: float = 0.5e-3
    crowding: float = 1.0
    reread_seconds_per_token: float = 1e-5
    """Reading is fifty times as fast as writing."""
    learner_s: float = 0.45
    sync_s: float = 0.03

    def pace(self, runs_through_syncs: bool) -> Pace:
        return Pace(
            self.median_tokens,
            self.sigma,
            self.max_concurrent,
            self.seconds_per_token,
            self.crowding,
            self.reread_seconds_per_token if runs_through_syncs else 0.0,
            runs_through_syncs,
        )


@dataclass(frozen=True)
class Cluster:
    """Engines by whether they may get weights while they write, and the actors that grade and annotate."""

    setting: Setting
    engines: Mapping[bool, Sequence[Any]]
    actors: tuple[Any, Any]


def start_cluster(setting: Setting) -> Cluster:
    engines = {through: start_engines(setting.num_engines, setting.pace(through)) for through in (False, True)}
    return Cluster(setting, engines, quick_actors())


def configured(setting: Setting, scheduling: Mapping[str, Any], steps: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "none"},
            "data": {"path": "none"},
            "sampling": {
                "prompts_per_step": setting.prompts,
                "samples_per_prompt": setting.samples,
                "max_response_tokens": setting.max_tokens,
            },
            "scheduling": scheduling,
            "evaluation": {"every": 0},
            "logging": {"rollouts_every": 0},
            "run": {"steps": steps},
        }
    )


def measure(mode: str, cluster: Cluster, learner_s: float, steps: int) -> dict[str, Any]:
    """Figures of one whole run: filling the engines at its start and running dry at its end count too, or modes would
    be compared over other prompts."""
    setting, scheduling = cluster.setting, MODES[mode]
    staleness = scheduling.get("max_staleness", 0)
    config = configured(setting, scheduling, steps)
    engines = cluster.engines[config.scheduling.runs_through_syncs]
    _busy_frac(engines)
    with crew(config, engines, cluster.actors, learner_s, setting.sync_s) as run:
        train(config, run.roles)
    busy = _busy_frac(engines)
    oldest = max(record["staleness/max"] for record in run.history)
    if oldest > staleness:
        raise SystemExit(f"{mode}: a token {oldest:g} versions old was trained on, but the bound is {staleness}")
    took_s = run.sync.synced_at[-1] - run.sync.synced_at[0]
    asked = [length_of(key, setting.pace(True), setting.max_tokens) for key in run.asked.keys]

    def mean(name: str) -> float:
        return statistics.mean(record[name] for record in run.history)

    def share_of_time(name: str) -> float:
        times_s = [record["time/step_s"] for record in run.history]
        return statistics.fmean([record[name] for record in run.history], times_s)

    return {
        "mode": mode,
        "rollouts_per_s": steps * setting.prompts * setting.samples / took_s,
        "rollout_s": mean("time/rollout_s"),
        "learner_s": mean("time/learner_s"),
        "engines_idle_frac": share_of_time("idle/generator_frac"),
        "places_taken_frac": busy,
        "learner_idle_frac": share_of_time("idle/learner_frac"),
        "staleness_frac": [mean(f"staleness/{age}_frac") for age in range(staleness + 1)],
        "staleness_max": oldest,
        "dropped_frac": 1 - len(run.learner.lengths) / len(asked),
        "sampled_length_tokens": statistics.mean(asked),
        "trained_length_tokens": statistics.mean(run.learner.lengths),
    }


def _busy_frac(engines: Sequence[Any]) -> float:
    """Share of the places of all batches that were taken since the last look."""
    shares = [engine.busy_frac.remote() for engine in engines]
    return statistics.mean(wait_for(share, _CALL_S, "a sleeping engine", "telling its load") for share in shares)


def over_ratios(cluster: Cluster, learners_s: Sequence[float], steps: int) -> list[dict[str, Any]]:
    """Throughput of some modes relative to the synchronous one, for learners of different speed."""
    rows = []
    for learner_s in learners_s:
        found = {mode: measure(mode, cluster, learner_s, steps) for mode in OVER_RATIOS}
        rows.append(ratio_row(found))
    return rows


def ratio_row(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of figures by mode: how synchronous time is shared, what overlap alone could give at best, and the gains."""
    base = found[SYNC]
    rollout_s, learner_s = base["rollout_s"], base["learner_s"]
    return {
        "rollout_s": rollout_s,
        "learner_s": learner_s,
        "best_of_overlap": (rollout_s + learner_s) / max(rollout_s, learner_s),
        "gains": {mode: found[mode]["rollouts_per_s"] / base["rollouts_per_s"] for mode in OVER_RATIOS},
    }


def to_markdown(report: dict[str, Any]) -> str:
    results, setting = report["results"], report["setting"]
    base = results[0]
    rows = [
        f"| {each['mode']} | {each['rollouts_per_s']:.0f} | {each['rollouts_per_s'] / base['rollouts_per_s']:.2f} | "
        f"{each['engines_idle_frac']:.0%} | {each['places_taken_frac']:.0%} | {each['learner_idle_frac']:.0%} | "
        f"{' / '.join(f'{share:.0%}' for share in each['staleness_frac'])} | {each['dropped_frac']:.0%} | "
        f"{each['trained_length_tokens']:.0f} / {each['sampled_length_tokens']:.0f} |"
        for each in results
    ]
    ratios = [
        f"| {row['rollout_s'] / row['learner_s']:.1f} : 1 | {row['best_of_overlap']:.2f} | "
        + " | ".join(f"{row['gains'][mode]:.2f}" for mode in OVER_RATIOS[1:])
        + " |"
        for row in report["ratios"]
    ]
    return "\n".join(
        [
            "# Scheduling with stragglers",
            "",
            f"`{report['command']}` on {one_line(report['machine'])}, {report['date']}",
            "",
            f"Lengths: log-normal with median {setting['median_tokens']:g} tokens and sigma {setting['sigma']:g}, so "
            f"that p99 is {report['tail']:.0f} times the median, cut at {setting['max_tokens']}; "
            f"{setting['prompts']} prompts x {setting['samples']} samples a step on {setting['num_engines']} engines "
            f"of {setting['max_concurrent']} places each. A synchronous step samples for {base['rollout_s']:.2f} s and "
            f"learns for {base['learner_s']:.2f} s, about the 70 % for sampling that arXiv:2509.21009 reports; such "
            "tails are what arXiv:2509.21009 and arXiv:2510.12633 set out from. "
            f"**One step off trains on {report['one_step_off']:.2f}x, staleness 2 on {report['staleness_2']:.2f}x the "
            f"rollouts a second** (to be shown: {TARGET:g}x). {report['num_steps']} steps each, from the "
            "first prompt to the last sync: all modes that give nothing up train on the same completions.",
            "",
            "| mode | rollouts/s | to sync | engines idle | places taken | learner idle | tokens by age 0 / 1 / ... "
            "| given up | length trained / sampled |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "An engine is idle while it has no request at all; places taken are those of its batch. "
            "No token was ever older than the bound. Where prompts are given up, long completions go first: the "
            "last column shows by how much.",
            "",
            "The same for learners of other speed (sampling : learning of the synchronous run), and what overlap of "
            "both could give at best:",
            "",
            "| sampling : learning | best of overlap | " + " | ".join(OVER_RATIOS[1:]) + " |",
            "| --- | --- |" + " --- |" * (len(OVER_RATIOS) - 1),
            *ratios,
            "",
            "Overlap alone is `one step off, finish`: a sync waits for what is being written. What goes beyond the "
            "best of overlap comes from completions that run through syncs, so that the places of the slow ones' "
            "neighbours are filled again. Two of its conditions are the simulation's own: a cluster of the same size "
            "for each mode, and learners whose speed does not depend on lengths.",
            "",
        ]
    )


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = 10,
    learners: Annotated[str, typer.Option(help="Seconds of further learners' steps, joined by commas.")] = "0.15,0.7",
    out: Annotated[Path | None, typer.Option(help="Folder for straggler_trace.json and .md.")] = None,
) -> None:
    """Measure, print, and write where --out says."""
    setting = Setting()
    with own_ray.private_ray():
        cluster = start_cluster(setting)
        results = [measure(mode, cluster, setting.learner_s, steps) for mode in MODES]
        ratios = over_ratios(cluster, [float(each) for each in learners.split(",") if each], steps)
    found = {each["mode"]: each for each in results}
    own = ratio_row(found)
    keys = [RolloutKey("any", sample) for sample in range(20_000)]
    lengths = sorted(length_of(key, setting.pace(True), setting.max_tokens) for key in keys)
    report = {
        "command": f"python benchmarks/straggler_trace.py --steps {steps} --learners {learners}",
        "machine": describe_machine(PACKAGES),
        "date": time.strftime("%Y-%m-%d"),
        "setting": setting.__dict__,
        "tail": lengths[99 * len(lengths) // 100] / lengths[len(lengths) // 2],
        "num_steps": steps,
        "one_step_off": own["gains"]["one step off"],
        "staleness_2": own["gains"]["staleness 2"],
        "results": results,
        "ratios": sorted([own, *ratios], key=lambda row: -row["rollout_s"] / row["learner_s"]),
    }
    publish("straggler_trace", report, to_markdown(report), out)


if __name__ == "__main__":
    typer.run(main)
