"""What became of a run, by the evidence of its folder: its state, the first cause, its progress, and what comes next.

Decides what a run's state is. What is done about it is decided by `trace_rl.launch.doctor.advice`. Must not know files
other than by what was read of them, or how a diagnosis is shown.

Invariants: a driver that holds the lock runs; without the lock's word nobody is called dead; what is said to be lost is
what the ledger and the checkpoints say, and nothing is guessed where they are silent.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from trace_rl.launch import restarts
from trace_rl.launch.doctor import advice
from trace_rl.launch.doctor.evidence import Evidence, Soundness
from trace_rl.launch.doctor.signals import Finding, findings
from trace_rl.launch.folder_lock import Holder
from trace_rl.launch.run_log import EarlyEnd, Entry, early_end, since_beginning
from trace_rl.ledger import Account, audit
from trace_rl.workers.last_words import last_words

State = Literal["not_started", "running", "finished", "preempted", "interrupted", "failed", "died", "unknown"]

_NEWEST_STEPS = 20
_MOST_TOLD = 5
_STARTED = "clock/step_started_s"
_LONGEST_S = 1e9
_MOST_STEPS = 2**53
_SUSPECT = re.compile(
    r"learner rank \d+(?:, \d+)*|generator engine \d+|engine \d+ of the annotator|"
    r"the (?:learner|teacher|rewarder|annotator)\b"
)
_PLACE = re.compile(r"node (?P<node>[\w.:]+), log (?P<log>\S+?)(?=[\s)\];,]|$)")
_LOST = re.compile(rf"{re.escape(restarts.LOST)}(?P<cause>.*)\. It starts again after step (?P<step>\d+) \(", re.DOTALL)


@dataclass(frozen=True)
class Cause:
    """What ended the run first."""

    sentence: str
    error: str
    """Name of its class; empty where it is not known."""
    suspect: str
    """The role or rank that it names; empty where it names none."""
    node: str
    log: str
    """The log of the worker, in the run folder where it is there."""
    log_says: str
    """Its telling line; empty where it has none."""


@dataclass(frozen=True)
class Restart:
    """A start that the run made by itself."""

    time: str
    after_step: int
    cause: str


@dataclass(frozen=True)
class Progress:
    """How far it has come."""

    steps_done: int
    steps_wanted: int | None
    resumes_at: int | None
    """Steps of the newest checkpoint that can be read; None where there is none."""
    steps_to_repeat: int
    """Done, but after that checkpoint: they are done again."""
    last_sign_s: float
    """Since the driver last wrote to the folder."""
    step_s: float | None
    """From the beginning of a step to that of the next, the median of the last driver's last ones."""
    remaining_s: float | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and whether it can be gone on from."""

    name: str
    step: int
    soundness: Soundness
    detail: str


@dataclass(frozen=True)
class Prompts:
    """The account of prompts."""

    ledger: Literal["whole", "end", "missing"]
    """How much of it was read; figures are those of the part that was."""
    issued: int
    trained: int
    dropped: int
    open: int
    lost: int
    trained_twice: int
    damaged_lines: int
    resumptions: int


@dataclass(frozen=True)
class Diagnosis:
    """All that is to be said."""

    run: str
    state: State
    is_well: bool
    """Whether nobody has to do anything: it runs or is finished, and no finding asks for somebody."""
    what_happened: str
    first_cause: Cause | None
    restarts: tuple[Restart, ...]
    driver: Holder | None
    progress: Progress
    checkpoints: tuple[Checkpoint, ...]
    set_aside: tuple[str, ...]
    prompts: Prompts
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    """The last ones of run.log."""
    mend_first: tuple[str, ...]
    command: str
    """To go on; empty where nothing is to be done."""


def diagnose(evidence: Evidence, now_s: float, working_folder: Path) -> Diagnosis:
    """Read the evidence.

    Args:
        working_folder: where the command to go on will be entered.
    """
    account = audit(evidence.ledger.records)
    entries = since_beginning(evidence.entries)
    ends = [early_end(entry) for entry in entries if entry.is_early_end]
    end = ends[-1] if ends else None
    has_begun = bool(evidence.ledger.records or evidence.records)
    progress = _progress(evidence, account, now_s)
    state = _state(evidence, entries, end, progress)
    cause = _cause(evidence, end) if end and state == "failed" else None
    found = [*_silence(evidence, progress, state), *_damage(evidence), *findings(evidence, account)]
    needs_nothing = state in ("running", "finished")
    if needs_nothing:
        progress = replace(progress, steps_to_repeat=0)
    is_well = needs_nothing and all(finding.urgency == "look" for finding in found)
    return Diagnosis(
        run=str(evidence.folder.path),
        state=state,
        is_well=is_well,
        what_happened=_told(evidence, state, end, has_begun, progress),
        first_cause=cause,
        restarts=tuple(_restarts(entries)),
        driver=evidence.holder,
        progress=progress,
        checkpoints=tuple(
            Checkpoint(each.path.name, each.step, each.soundness, each.detail) for each in evidence.checkpoints
        ),
        set_aside=tuple(evidence.set_aside),
        prompts=_prompts(evidence, account),
        findings=tuple(found),
        warnings=tuple(_warnings(entries)),
        mend_first=() if needs_nothing else tuple(advice.mend_first(evidence, end)),
        command="" if needs_nothing else advice.command(evidence, working_folder),
    )


def _state(evidence: Evidence, entries: Sequence[Entry], end: EarlyEnd | None, progress: Progress) -> State:
    was_told_to_end = any(entry.logger == "trace_rl.launch.preemption" for entry in entries)
    if evidence.lock == "held":
        return "running"
    if end is not None:
        if end.error == "PreemptedError" or (end.error == "KeyboardInterrupt" and was_told_to_end):
            return "preempted"
        return "interrupted" if end.error == "KeyboardInterrupt" else "failed"
    if _has_ended(evidence, progress.steps_wanted, progress.steps_done):
        return "finished"
    if was_told_to_end:
        return "preempted"
    if evidence.lock == "unknown":
        return "unknown"
    return "died" if evidence.ledger.records or evidence.records else "not_started"


def _has_ended(evidence: Evidence, wanted: int | None, done: int) -> bool:
    ended = [record.step for record in evidence.ledger.records if record.event == "ended"]
    if wanted is None:
        return bool(ended) and evidence.ledger.records[-1].event == "ended"
    if not evidence.ledger.records or not wanted:  # an evaluation takes no step, and older runs kept no ledger
        return evidence.has_summary and done >= wanted
    return done >= wanted and any(step >= wanted for step in ended)


def _told(evidence: Evidence, state: State, end: EarlyEnd | None, has_begun: bool, progress: Progress) -> str:
    holder = evidence.holder
    where = f" ({holder})" if holder else ""
    when = "" if has_begun else " before the first step"
    host = holder.host if holder else "its host"
    if state == "failed" and end:
        return f"it ended with an error at {end.time}{when}"
    if state == "interrupted" and end:
        return f"it was interrupted (Ctrl-C) at {end.time}{when}"
    if state == "preempted":
        if end and end.error == "PreemptedError":
            return f"it left its place (SIGTERM) at {end.time}: {end.sentence}"
        return "it was told to leave its place (SIGTERM) and did not come to a checkpoint within its grace"
    told: dict[str, str] = {
        "running": f"it is being written{where}" if has_begun else f"it is starting{where}",
        "finished": f"all {progress.steps_done} steps are done",
        "died": f"its driver ended without a word{where}: it was killed (kill -9, or the kernel for want of memory: "
        f"see dmesg on {host}), or {host} went down; logs of its workers may be left there, below trace-rl-* in the "
        "folder for temporary files",
        "not_started": f"its driver ended without a word before it had started to train{where}",
        "unknown": "it has not said that it ended, and whether it still runs cannot be told, because driver.lock is "
        "missing or cannot be asked; make sure that no process writes this folder before going on",
    }
    return told[state]


def _cause(evidence: Evidence, end: EarlyEnd) -> Cause:
    suspect, place = _SUSPECT.search(end.sentence), _PLACE.search(end.sentence)
    log = place["log"] if place else ""
    log, says = _log_of(evidence, log) if log else ("", "")
    return Cause(
        sentence=end.sentence or end.error or "run.log is cut off before it says which",
        error=end.error,
        suspect=suspect[0] if suspect else "",
        node=place["node"] if place else "",
        log=log,
        log_says="" if says in end.sentence else says,
    )


def _log_of(evidence: Evidence, named: str) -> tuple[str, str]:
    """(where a worker's log is, what it says), in the run folder where it was kept."""
    kept = evidence.folder.worker_logs / Path(named).name
    try:
        here = [file for file in (kept, kept.with_suffix(".out")) if file.is_file()]
        return str(kept) if kept in here else named, last_words(here)
    except (OSError, ValueError):
        return named, ""


def _restarts(entries: Sequence[Entry]) -> list[Restart]:
    found = [(entry.time, _LOST.match(entry.text)) for entry in entries if entry.level == "WARNING"]
    return [Restart(time, int(lost["step"]), lost["cause"]) for time, lost in found if lost][-_NEWEST_STEPS:]


def _warnings(entries: Sequence[Entry]) -> list[str]:
    told = [entry for entry in entries if entry.level in ("WARNING", "ERROR") and not _LOST.match(entry.text)]
    return [f"{entry.time} {entry.text}" for entry in told[-_MOST_TOLD:]]


def _progress(evidence: Evidence, account: Account, now_s: float) -> Progress:
    wanted = evidence.setting("run.steps", int)
    steps = [record for record in evidence.records if "time/step_s" in record]
    done = account.steps if evidence.ledger.records else max((int(record["step"]) + 1 for record in steps), default=0)
    done = min(max(0, done), _MOST_STEPS)
    resumes_at = next((each.step for each in evidence.checkpoints if each.is_usable), None)
    since_s = evidence.holder.since_s if evidence.holder else 0.0
    of_last_driver = [record for record in steps if record.get(_STARTED, 0.0) >= since_s] or steps
    step_s = _step_s(of_last_driver[-_NEWEST_STEPS:])
    at = done if evidence.lock == "held" or _has_ended(evidence, wanted, done) else resumes_at or 0
    left = None if wanted is None else max(0, wanted - at)
    return Progress(
        steps_done=done,
        steps_wanted=wanted,
        resumes_at=resumes_at,
        steps_to_repeat=max(0, done - (resumes_at or 0)),
        last_sign_s=max(0.0, now_s - evidence.last_sign_s),
        step_s=step_s,
        remaining_s=None if step_s is None or left is None else step_s * left,
    )


def _step_s(steps: Sequence[Mapping[str, float]]) -> float | None:
    """Seconds from step to step; None where they are not known."""
    gaps = [
        later.get(_STARTED, math.nan) - earlier.get(_STARTED, math.nan)
        for earlier, later in itertools.pairwise(steps)
        if later["step"] == earlier["step"] + 1
    ]
    known = [gap for gap in gaps if 0 <= gap < _LONGEST_S] or [steps[-1]["time/step_s"]] if steps else []
    found = statistics.median(known) if known else math.nan
    return found if 0 <= found < _LONGEST_S else None


def _silence(evidence: Evidence, progress: Progress, state: State) -> list[Finding]:
    patience_s = evidence.setting("placement.step_timeout_s", float)
    if state != "running" or not patience_s or progress.last_sign_s < patience_s:
        return []
    return [
        Finding(
            "act",
            f"it has written nothing for {progress.last_sign_s:.0f} s, and a stage may take {patience_s:g} s "
            "(placement.step_timeout_s): it should have named a suspect by now; see what its driver does (py-spy dump "
            "--pid), then end it and go on from its checkpoint",
        )
    ]


def _damage(evidence: Evidence) -> list[Finding]:
    usable = [each for each in evidence.checkpoints if each.is_usable]
    return [
        Finding(
            "look" if usable else "act",
            f"checkpoints/{each.path.name} cannot be used: {each.detail}"
            + (f"; the run goes on from {usable[0].path.name}" if usable else ""),
        )
        for each in evidence.checkpoints
        if not each.is_usable
    ]


def _prompts(evidence: Evidence, account: Account) -> Prompts:
    return Prompts(
        ledger="missing" if not evidence.ledger.records else "whole" if evidence.is_ledger_whole else "end",
        issued=account.trained + account.dropped + len(account.open),
        trained=account.trained,
        dropped=account.dropped,
        open=len(account.open),
        lost=len(account.lost),
        trained_twice=len(account.trained_twice),
        damaged_lines=len(evidence.ledger.damage),
        resumptions=account.resumptions,
    )
