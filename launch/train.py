"""One training run from a resolved configuration to its summary: checks, folder, Ray, roles, loop, last words."""

from __future__ import annotations

if __name__ == "__main__":  # `python -m trace_rl.launch.train CONFIG`, as jobs call it: the environment is set first
    import sys

    from trace_rl.launch.cli import app

    app(["train", *sys.argv[1:]])

import logging
import shlex
import time
from dataclasses import dataclass, replace

from rich.console import Console

from trace_rl.config.run import RunConfig
from trace_rl.errors import CheckpointError
from trace_rl.launch import preflight
from trace_rl.launch.cluster import ray_session
from trace_rl.launch.display import Display
from trace_rl.launch.folder_lock import held
from trace_rl.launch.job import own_code
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.ledger import RunLedger
from trace_rl.launch.memory import MemoryWatch
from trace_rl.launch.plan.cluster import known_gpu_memory
from trace_rl.launch.plan.run_plan import plan_run
from trace_rl.launch.plan.text import PLAN_FILE, full_text, short_text
from trace_rl.launch.preemption import Preemption
from trace_rl.launch.profiling import ProfiledJournal
from trace_rl.launch.restarts import Attempt, persist
from trace_rl.launch.roles import start_roles
from trace_rl.launch.run_checkpoints import Progress
from trace_rl.launch.run_folder import RunFolder, open_run_folder, trim_metrics, write_config
from trace_rl.launch.run_log import EARLY_END, logging_to
from trace_rl.launch.summary import Outcome, summarise_run
from trace_rl.launch.trackers import open_trackers
from trace_rl.loop import train

logger = logging.getLogger(__name__)


def run(config: RunConfig, console: Console) -> Outcome:
    """Train as configured; everything that is left behind lies in the run folder.

    Raises:
        ConfigError: another process writes to the run folder.
        TraceError: with one sentence for the user; checkpoints and metrics written so far stay.
    """
    ready = preflight.check(config)
    folder = open_run_folder(config)
    instead = "wait for it, end it, or give this run a folder of its own (run.folder)"
    with held(folder.lock, f"{folder.path} is being written", instead), logging_to(folder.log, console):
        try:
            return _run_in(folder, config, ready, console)
        except BaseException as error:
            logger.info("%s%s", EARLY_END, error, exc_info=True)
            if isinstance(error, Exception):
                hint = f"trace-rl doctor {shlex.quote(str(folder.path))} tells what happened and how to go on"
                console.print(hint, markup=False, highlight=False, soft_wrap=True)
            raise


def _run_in(folder: RunFolder, config: RunConfig, ready: preflight.Ready, console: Console) -> Outcome:
    started = time.monotonic()
    write_config(folder, config)
    code = own_code.describe()
    logger.info(code)
    console.print(code, markup=False, highlight=False, soft_wrap=True)
    plan = plan_run(ready.config, ready.prompts, known_gpu_memory(config))
    (folder.path / PLAN_FILE).write_text(full_text(plan), encoding="utf-8")
    headline = f"{short_text(plan)}\n  writing to {folder.path}; the whole plan is in {PLAN_FILE} there"
    console.print(headline, markup=False, highlight=False, soft_wrap=True)
    display = Display(console, config.run.steps)
    journal = RunJournal(folder, config.logging, display, open_trackers(config, folder.path))
    ledger = RunLedger(folder.path)
    try:
        with MemoryWatch() as memory, display:
            _persist(_Run(ready, folder, journal, ledger, display))
    finally:
        journal.close()
        ledger.close()
    outcome = Outcome(journal.evaluations, time.monotonic() - started, memory.peak_gib)
    summary = summarise_run(config, folder, outcome)
    folder.summary.write_text(summary, encoding="utf-8")
    console.print(summary, markup=False, highlight=False, soft_wrap=True)
    return outcome


@dataclass(frozen=True)
class _Run:
    """What stays through all attempts of a run."""

    ready: preflight.Ready
    folder: RunFolder
    journal: RunJournal
    ledger: RunLedger
    display: Display


def _persist(run: _Run) -> None:
    """Train through losses: each attempt has a Ray and roles of its own."""
    settings, folder = run.ready.config.run, run.folder
    start = dict(run.ready.prompts.position())

    def attempt(this: Attempt) -> None:
        run.ready.prompts.seek(start)
        with (
            ray_session(run.ready.config, folder.worker_logs),
            Preemption(settings.preemption_grace_s) as preemption,  # Ray sets a handler of its own as it starts
        ):
            _train(run, this, preemption)

    def newest_checkpoint() -> int:
        return max((step for step, _ in folder.complete_checkpoints()), default=0)

    persist(attempt, settings.max_restarts, newest_checkpoint, logger.warning)


def _train(run: _Run, attempt: Attempt, preemption: Preemption) -> None:
    """Start the roles, go on from the newest checkpoint where that is asked for, and run the loop."""
    ready, folder, display = run.ready, run.folder, run.display
    started = time.monotonic()
    display.stage("starting the roles")
    crew = start_roles(ready, folder, run.journal, run.ledger)
    roles = crew.roles
    display.note(f"all roles ready after {time.monotonic() - started:.0f} s")
    progress = Progress(0, {}, ())
    if (ready.config.run.resume == "auto" or attempt.number) and crew.checkpoints.exist():
        progress = crew.checkpoints.load_newest()
        try:
            roles.prompts.seek(progress.position)
        except KeyError as error:
            raise CheckpointError(
                f"the checkpoint after step {progress.step} holds the data position {progress.position}, which does "
                f"not belong to data.path={ready.config.data.path!r} (no {error}); resume with the data of the run, or "
                "start anew"
            ) from error
        display.resume(progress.step)
        display.note(f"resumed after {progress.step} steps from {folder.checkpoints}")
    trim_metrics(folder, progress.step)
    run.ledger.mark("resumed" if progress.step or attempt.number else "started", progress.step)
    attempt.has_begun = True
    preemption.has_begun()
    if steps := ready.config.logging.profile_steps:
        journal = ProfiledJournal(run.journal, crew.computing, folder.profile, steps, progress.step)
        roles = replace(roles, journal=journal)
    with crew.watch:
        train(ready.config, roles, progress.step, run.journal.history, progress.pending, preemption.is_asked)
