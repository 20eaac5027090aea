"""Where a run leaves its trace: metrics.jsonl, sampled rollouts with their spans, trackers, and the display.

The only clock of a run. Metrics of one step are one JSON object a line; every time ends in `_s`, and shares of
time stand under `idle/`, so that two runs of one seed can be compared by leaving those out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from trace_rl.batch import RoutedRollout, TokenFigures, TrainingBatch
from trace_rl.config.roles import Logging
from trace_rl.launch.display import Display
from trace_rl.launch.rollout_dump import record_of
from trace_rl.launch.run_folder import RunFolder
from trace_rl.launch.summary import Evaluation
from trace_rl.launch.trackers import Tracker
from trace_rl.protocols import Metrics

PASS_AT_1 = "heldout/pass_at_1"


class RunJournal:
    """Implements `trace_rl.protocols.Journal`."""

    def __init__(self, folder: RunFolder, settings: Logging, display: Display, trackers: Sequence[Tracker]) -> None:
        self._folder = folder
        self._settings = settings
        self._display = display
        self._trackers = trackers
        self._stages: dict[str, float] = {}
        self._step_started_s = 0.0

    @property
    def history(self) -> list[dict[str, float]]:
        """Everything recorded so far, in order; read from the file, so that a resumed run knows what came before it."""
        return list(self._records())

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Every evaluation in order; the file is read once, for in a long run that takes time and memory."""
        return [_evaluation(record) for record in self._records() if PASS_AT_1 in record]

    def score_at(self, step: int) -> float | None:
        """Held-out pass@1 after so many steps; None where it was not measured."""
        return next((each.pass_at_1 for each in reversed(self.evaluations) if each.step == step), None)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._display.stage(name)
        if not self._stages:
            self._step_started_s = time.time()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._stages[f"time/{name}_s"] = time.perf_counter() - started

    def log_step(self, step: int, metrics: Metrics) -> None:
        record = {**metrics, **self._take_stages()}
        record["clock/step_started_s"] = self._step_started_s  # since 1970, to lay logs of other machines beside it
        record["time/step_s"] = sum(value for name, value in record.items() if name.startswith("time/"))
        self._write(step, record)
        self._display.step(step, record)

    def log_evaluation(self, step: int, metrics: Metrics) -> None:
        record, evaluations = {**metrics, **self._take_stages()}, self.evaluations
        self._write(step, record)
        if PASS_AT_1 in record:
            evaluations.append(_evaluation({"step": step, **record}))
        self._display.evaluation(step, record)

    def log_rollouts(
        self,
        step: int,
        routed: Sequence[RoutedRollout],
        batch: TrainingBatch,
        figures: Sequence[TokenFigures] = (),
    ) -> None:
        num_stored = self._settings.num_rollouts_at(step)
        if not num_stored:
            return
        measured = {item.key: item for item in figures}
        self._folder.rollouts.mkdir(exist_ok=True)
        with (self._folder.rollouts / f"step-{step:06d}.jsonl").open("w", encoding="utf-8") as file:
            for item, sequence in list(zip(routed, batch.sequences, strict=True))[:num_stored]:
                record = record_of(item, sequence, measured.get(item.key))
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def _records(self) -> Iterator[dict[str, float]]:
        if self._folder.metrics.exists():
            with self._folder.metrics.open(encoding="utf-8") as file:
                yield from map(json.loads, file)

    def _take_stages(self) -> dict[str, float]:
        stages, self._stages = self._stages, {}
        return stages

    def _write(self, step: int, record: Metrics) -> None:
        with self._folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        for tracker in self._trackers:
            tracker.log(step, record)


def _evaluation(record: Metrics) -> Evaluation:
    """What a record of a held-out evaluation says."""
    return Evaluation(int(record["step"]), record[PASS_AT_1], round(record["heldout/samples"]))
