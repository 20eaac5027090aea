"""Has the roles that compute record chosen steps, by `trace_rl.workers.profiling`, into the run folder.

A step is recorded from the end of the one before, its own stages and what runs beside them. Recording takes time: the
figures of such a step are not those of others.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from trace_rl.batch import RoutedRollout, TokenFigures, TrainingBatch
from trace_rl.protocols import Journal, Metrics
from trace_rl.workers import profiling

logger = logging.getLogger(__name__)

_START_S, _WRITE_S = 60.0, 600.0


class ProfiledJournal:
    """Implements `trace_rl.protocols.Journal` by another one, and records the steps that are wanted.

    Args:
        actors: by role; those that compute.
        steps: which to record.
        next_step: the first one that is to come.
    """

    def __init__(
        self, journal: Journal, actors: Mapping[str, Any], folder: Path, steps: Collection[int], next_step: int
    ) -> None:
        self._journal = journal
        self._actors = dict(actors)
        self._folder = folder
        self._steps = frozenset(steps)
        self._start(next_step)

    def stage(self, name: str) -> AbstractContextManager[None]:
        return self._journal.stage(name)

    def log_step(self, step: int, metrics: Metrics) -> None:
        self._journal.log_step(step, metrics)
        self._stop(step)
        self._start(step + 1)

    def log_evaluation(self, step: int, metrics: Metrics) -> None:
        self._journal.log_evaluation(step, metrics)

    def log_rollouts(
        self, step: int, routed: Sequence[RoutedRollout], batch: TrainingBatch, figures: Sequence[TokenFigures] = ()
    ) -> None:
        self._journal.log_rollouts(step, routed, batch, figures)

    def _start(self, step: int) -> None:
        if step in self._steps:
            calls = {role: actor.__ray_call__.remote(profiling.start) for role, actor in self._actors.items()}
            self._wait(calls, _START_S, "start")

    def _stop(self, step: int) -> None:
        if step not in self._steps:
            return
        folder = self._folder / f"step-{step:06d}"
        calls = {
            role: actor.__ray_call__.remote(profiling.stop, str(folder / (role.replace(" ", "-") + profiling.SUFFIX)))
            for role, actor in self._actors.items()
        }
        self._wait(calls, _WRITE_S, "write")
        logger.info("Step %d was recorded: %s holds a trace of each role, for ui.perfetto.dev", step, folder)

    def _wait(self, calls: Mapping[str, Any], patience_s: float, doing: str) -> None:
        """A role that cannot be recorded costs its trace and nothing else."""
        for role, call in calls.items():
            try:
                ray.get(call, timeout=patience_s)
            except (RayError, GetTimeoutError) as error:
                logger.warning("%s could not %s its recording: %s", role, doing, str(error).splitlines()[0])
