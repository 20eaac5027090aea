"""A diagnosis as text for people, and as JSON for programs.

Must not decide anything. Everything that comes out of a folder is foreign: what is no printable character is shown by
its code, so that no log can write to the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from trace_rl.launch.doctor.diagnosis import Cause, Diagnosis, Progress, Prompts

_HEADLINES = {
    "not_started": "never started training",
    "running": "running",
    "finished": "finished",
    "preempted": "preempted",
    "interrupted": "interrupted",
    "failed": "ended with an error",
    "died": "died",
    "unknown": "not known",
}
_LONGEST = 2000


def as_json(diagnosis: Diagnosis) -> str:
    """One object in ASCII, its keys those of `Diagnosis`."""
    return json.dumps(asdict(diagnosis), indent=1, allow_nan=False)


def as_text(diagnosis: Diagnosis) -> str:
    """One fact a line, the state first and the command last."""
    return "".join(f"{printable(line)}\n" for line in _lines(diagnosis))


def printable(text: str) -> str:
    """The text in one line, of bounded length, with every character that is not printable as its code."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:_LONGEST])
    return shown + (" ..." if len(text) > _LONGEST else "")


def duration(seconds: float) -> str:
    """Two units at most: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    yield f"{diagnosis.run}: {_HEADLINES[diagnosis.state]}"
    for label, told in _facts(diagnosis):
        yield f"  {label:<16}{told}"


def _facts(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    yield "what happened", diagnosis.what_happened
    if diagnosis.first_cause:
        yield from _of_cause(diagnosis.first_cause)
    for restart in diagnosis.restarts:
        yield "started again", f"{restart.time} after step {restart.after_step}: {restart.cause}"
    yield "progress", _progress_line(diagnosis.progress)
    yield "checkpoints", _checkpoint_line(diagnosis)
    yield "prompts", _prompts_line(diagnosis.prompts)
    for warning in diagnosis.warnings:
        yield "warned", warning
    for finding in diagnosis.findings:
        yield "act on" if finding.urgency == "act" else "look at", finding.sentence
    for sentence in diagnosis.mend_first:
        yield "mend first", sentence
    is_over = diagnosis.state in ("running", "finished")
    yield "to go on", diagnosis.command or ("nothing to do" if is_over else "see what to mend first")


def _of_cause(cause: Cause) -> Iterator[tuple[str, str]]:
    yield "first cause", f"{cause.error and f'{cause.error}: '}{cause.sentence}"
    if cause.suspect:
        place = f"{cause.node and f' on node {cause.node}'}{cause.log and f', log {cause.log}'}"
        yield "suspect", f"{cause.suspect}{place}"
    if cause.log_says:
        yield "its log says", cause.log_says


def _progress_line(progress: Progress) -> str:
    wanted = "" if progress.steps_wanted is None else f" of {progress.steps_wanted}"
    parts = [f"{progress.steps_done}{wanted} steps"]
    if progress.steps_to_repeat:
        since = "without a checkpoint" if progress.resumes_at is None else "after the checkpoint"
        parts.append(f"{progress.steps_to_repeat} of them {since}, to be done again")
    parts.append(f"last sign {duration(progress.last_sign_s)} ago")
    if progress.step_s is not None:
        parts.append(f"{progress.step_s:.3g} s a step")
    if progress.remaining_s:
        parts.append(f"about {duration(progress.remaining_s)} to go")
    return ", ".join(parts)


def _checkpoint_line(diagnosis: Diagnosis) -> str:
    found = [f"{each.name} {each.soundness}" for each in diagnosis.checkpoints[:4]]
    found += [f"{len(diagnosis.checkpoints) - 4} more"] if len(diagnosis.checkpoints) > 4 else []
    found += [f"{name} set aside" for name in diagnosis.set_aside[:2]]
    return ", ".join(found) or "none"


def _prompts_line(prompts: Prompts) -> str:
    if prompts.ledger != "whole":
        return "none in ledger.jsonl" if prompts.ledger == "missing" else "ledger.jsonl is long; --full adds it up"
    return (
        f"{prompts.issued} issued = {prompts.trained} trained + {prompts.dropped} dropped + {prompts.open} open; "
        f"{prompts.lost} lost, {prompts.trained_twice} trained twice, {prompts.resumptions} resumptions"
    )
