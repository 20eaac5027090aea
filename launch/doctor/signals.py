"""What in a run's figures is worth a person's look, although no error says so.

Decides thresholds. Each finding is one sentence with the figure, what it is compared with, and what to do. Must not
know files other than by what was read of them, or why a run ended.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from trace_rl.launch.doctor.evidence import Evidence
from trace_rl.launch.run_folder import FREE_PER_SIZE
from trace_rl.ledger import Account

_WINDOW = 20
"""Steps that are looked at, the last ones."""
_FEWEST = 5
"""Steps below which nothing is said of a course."""
_JUMP = 10.0
_SMALLEST_KL = 1e-3
_FAILED_FRAC = 0.2
_SHARE_OF_TOLERANCE = 0.5
_DROPPED_FRAC = 0.2
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed."""

    urgency: Literal["look", "act"]
    """`act`: somebody has to do something before the run is as it should be."""
    sentence: str


def findings(evidence: Evidence, account: Account) -> list[Finding]:
    """All that was noticed, in a fixed order."""
    checks: Sequence[Callable[[Evidence], Iterator[Finding]]] = (
        _not_finite,
        _reward,
        _annotation,
        _mismatch,
        _canary,
        _staleness,
        _dropped,
        _collapse,
        _disk,
        _dumps,
    )
    found = [finding for check in checks for finding in check(evidence)]
    unread = [Finding("look", sentence) for sentence in evidence.problems]
    return [*unread, *_account(evidence, account), *found]


def _account(evidence: Evidence, account: Account) -> Iterator[Finding]:
    for what, prompts in (("lost", account.lost), ("trained twice", account.trained_twice)):
        if prompts and evidence.is_ledger_whole:
            named = ", ".join(sorted(map(str, prompts.values()))[:3])
            told = f"{_were(len(prompts), 'prompt')} {what} (the first: {named})"
            yield Finding("act", f"{told}; report this with ledger.jsonl")
    if damage := evidence.ledger.damage:
        yield Finding(
            "look",
            f"{_are(len(damage), 'place')} damaged in ledger.jsonl (the first: {damage[0]}); the account of prompts "
            "has a gap, the run itself has not",
        )


def _not_finite(evidence: Evidence) -> Iterator[Finding]:
    first = {
        name: int(record["step"])
        for record in reversed(evidence.records)
        for name, value in record.items()
        if not math.isfinite(value)
    }
    if first:
        named = ", ".join(f"{name} since step {step}" for name, step in sorted(first.items(), key=lambda i: i[1])[:3])
        yield Finding(
            "act", f"{_are(len(first), 'metric')} not finite ({named}); do not use checkpoints after that step"
        )


def _reward(evidence: Evidence) -> Iterator[Finding]:
    steps = _last(evidence, "reward/mean")
    if len(steps) < _FEWEST:
        return
    names = ("reward/graded", "reward/truncated", "reward/timeouts", "reward/errors")
    graded, truncated, timeouts, errors = (sum(record.get(name, 0.0) for record in steps) for name in names)
    total = graded + truncated + timeouts + errors
    failed = timeouts + errors
    is_flat = all(record["reward/mean"] == 0 for record in steps)
    if total and failed > _FAILED_FRAC * total:
        yield Finding(
            "act" if is_flat else "look",
            f"grading failed for {failed:.0f} of the last {total:.0f} completions ({timeouts:.0f} timeouts, "
            f"{errors:.0f} errors), which counts as reward 0; raise rewarder.timeout_s or rewarder.num_processes, and "
            "see the rewarder's log",
        )
    elif is_flat and truncated == total > 0:
        yield Finding(
            "act",
            f"the reward is 0 in the last {len(steps)} steps, because every completion was truncated; raise "
            "sampling.max_response_tokens",
        )
    elif is_flat:
        yield Finding(
            "act" if len(steps) == _WINDOW else "look",
            f"the reward is 0 in the last {len(steps)} steps; look at rollouts/ whether answers are right but not "
            "found (data.question_suffix can ask for a box), or the questions are too hard for this model",
        )
    elif all(record.get("reward/zero_variance_groups_frac") == 1 for record in steps):
        yield Finding(
            "look",
            f"in the last {len(steps)} steps all completions of a prompt earned the same, so the policy gradient had "
            "nothing to compare; take harder or easier prompts, or more samples of each (sampling.samples_per_prompt)",
        )


def _annotation(evidence: Evidence) -> Iterator[Finding]:
    steps = _last(evidence, "annotation/failed_frac")
    if len(steps) < _FEWEST:
        return
    share = statistics.fmean(record["annotation/failed_frac"] for record in steps)
    if share > _FAILED_FRAC:
        yield Finding(
            "look",
            f"{share:.0%} of the annotations failed in the last {len(steps)} steps; metrics annotation/* count the "
            "causes, run.log has the first of each",
        )


def _mismatch(evidence: Evidence) -> Iterator[Finding]:
    series = [record for record in evidence.records if math.isfinite(record.get("mismatch/kl_nats", math.nan))]
    if len(series) < 2 * _FEWEST:
        return
    values = [record["mismatch/kl_nats"] for record in series]
    now, before = statistics.median(values[-_FEWEST:]), statistics.median(values[:-_FEWEST])
    if now > _SMALLEST_KL and now > _JUMP * before:
        yield Finding(
            "act",
            f"the sampler's log-probs are off the learner's: mismatch/kl_nats is {now:.2g} over the last {_FEWEST} "
            f"steps and was {before:.2g}; see what changed at step {int(series[-_FEWEST]['step'])} (weights, dtype, "
            "sampling settings)",
        )


def _canary(evidence: Evidence) -> Iterator[Finding]:
    tolerance = evidence.setting("sync.canary_tolerance", float)
    steps = _last(evidence, "sync/canary_gap_max_nats")
    if not steps or not tolerance:
        return
    worst = max(steps, key=lambda record: record["sync/canary_gap_max_nats"])
    gap = worst["sync/canary_gap_max_nats"]
    if gap > _SHARE_OF_TOLERANCE * tolerance:
        yield Finding(
            "look",
            f"the proof of weights came within {gap / tolerance:.0%} of its limit at step {int(worst['step'])} "
            f"(sync/canary_gap_max_nats {gap:.2g}, sync.canary_tolerance {tolerance:g}); bfloat16 needs about 0.4, in "
            "float32 an engine's weights may be going wrong",
        )


def _staleness(evidence: Evidence) -> Iterator[Finding]:
    most = evidence.setting("scheduling.max_staleness", int)
    steps = _last(evidence, "staleness/max")
    if steps and most is not None and (worst := max(record["staleness/max"] for record in steps)) > most:
        yield Finding(
            "act",
            f"tokens were {worst:.0f} versions old, and scheduling.max_staleness allows {most}; report this with "
            "metrics.jsonl",
        )


def _dropped(evidence: Evidence) -> Iterator[Finding]:
    steps, prompts = _last(evidence, "queue/dropped_groups"), evidence.setting("sampling.prompts_per_step", int)
    if len(steps) < _FEWEST or not prompts:
        return
    dropped = statistics.fmean(record["queue/dropped_groups"] for record in steps)
    if dropped > _DROPPED_FRAC * prompts:
        yield Finding(
            "look",
            f"{dropped:.1f} prompts a step are dropped because their completions come too late, beside {prompts} that "
            "are trained on; lower scheduling.oversampling_frac, or raise scheduling.max_staleness",
        )


def _collapse(evidence: Evidence) -> Iterator[Finding]:
    told = [entry for entry in evidence.entries if entry.logger == "trace_rl.loop" and "of a collapse" in entry.text]
    if told:
        yield Finding("act", f"the watch on collapses has spoken at {told[-1].time}: {told[-1].text}")


def _disk(evidence: Evidence) -> Iterator[Finding]:
    size = max((each.num_bytes for each in evidence.checkpoints), default=0)
    if evidence.free_bytes < max(FREE_PER_SIZE * size, _GIB):
        needs = f"a checkpoint takes {size / _GIB:.3g} GiB" if size else "that is little for a run"
        yield Finding(
            "act",
            f"only {evidence.free_bytes / _GIB:.3g} GiB are free where the run writes, and {needs}; make room, or keep "
            "fewer (run.keep_checkpoints, run.keep_best)",
        )


def _dumps(evidence: Evidence) -> Iterator[Finding]:
    if evidence.dumps:
        file = evidence.dumps[-1]
        yield Finding(
            "look",
            f"{_are(len(evidence.dumps), 'batch of a failed step', 'batches of failed steps')} in dumps/, the newest "
            f"being {file.name}; to look at it, if "
            'the run is your own (it is a pickle): python -c "import sys, torch; d = torch.load(sys.argv[1], '
            "weights_only=False); print(d['reason'], len(d['batch'].sequences), 'sequences')\" " + str(file),
        )


def _last(evidence: Evidence, metric: str) -> list[dict[str, float]]:
    found = [dict(record) for record in evidence.records if math.isfinite(record.get(metric, math.nan))]
    return found[-_WINDOW:]


def _are(count: int, one: str, many: str = "") -> str:
    return f"1 {one} is" if count == 1 else f"{count} {many or one + 's'} are"


def _were(count: int, one: str) -> str:
    return f"1 {one} was" if count == 1 else f"{count} {one}s were"
