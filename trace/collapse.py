"""Whether a run shows the three-symptom pattern of a student that collapses under its teacher.

Student entropy up, responses shorter, held-out accuracy down: what distilling every token toward a privileged teacher
does to long runs (arXiv:2605.10194). Entropy and length are means over the last steps against means over the first;
held-out pass@1 is the newest evaluation against the best.

The verdict is a pure function of the metrics seen, so a resumed run feeds what was recorded and goes on as if it had
never stopped. A step or evaluation that is seen twice counts once, as it was seen last. Metrics that are missing or
not finite are ignored.

This module must not know where metrics are recorded, what a clock says, or what is done about a collapse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from trace_rl.config.watch import CollapseWatch
from trace_rl.protocols import is_evaluation

ENTROPY = "policy/entropy_nats"
LENGTH = "response/length_mean_tokens"
PASS_AT_1 = "heldout/pass_at_1"

_ADVICE = "lower the KL weight, narrow the selector or end the schedule earlier; metrics.jsonl has the curves"
_ROUNDING = 1e-9
"""0.65 - 0.60 is 0.05000000000000004; changes of exactly the threshold are no symptom."""


@dataclass(frozen=True)
class Verdict:
    """What one evaluation shows."""

    symptoms: tuple[str, ...]
    """Those present of entropy_rise, length_drop, heldout_drop, in this order."""
    is_collapse: bool
    """Whether all three are present."""
    sentence: str
    """The figures before and after; for a collapse also what to do."""


class _Change(NamedTuple):
    before: float
    now: float

    @property
    def rise_frac(self) -> float:
        """(now - before) / before; infinite above a reference of 0."""
        if self.before > 0:
            return self.now / self.before - 1
        return math.inf if self.now > self.before else 0.0


class CollapseDetector:
    """Follows one run and gives a verdict at each evaluation."""

    def __init__(self, settings: CollapseWatch) -> None:
        self._settings = settings
        self._entropy: dict[int, float] = {}
        self._length: dict[int, float] = {}
        self._pass_at_1: dict[int, float] = {}

    def observe_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of a training step; steps come in ascending order.

        Args:
            metrics: read are `policy/entropy_nats` (mean over tokens) and `response/length_mean_tokens`.
        """
        _keep(self._entropy, step, metrics, ENTROPY)
        _keep(self._length, step, metrics, LENGTH)

    def observe_evaluation(self, step: int, metrics: Mapping[str, float]) -> Verdict:
        """Take in an evaluation and judge the run as it stands.

        Args:
            step: number of training steps before the evaluation.
            metrics: read is `heldout/pass_at_1`, in [0, 1].
        """
        _keep(self._pass_at_1, step, metrics, PASS_AT_1)
        present = {
            "entropy_rise": self._has_entropy_rise(),
            "length_drop": self._has_length_drop(),
            "heldout_drop": self._has_heldout_drop(),
        }
        symptoms = tuple(name for name, is_present in present.items() if is_present)
        is_collapse = len(symptoms) == len(present)
        return Verdict(symptoms, is_collapse, self._sentence(step, symptoms, is_collapse))

    def feed(self, records: Iterable[Mapping[str, float]]) -> None:
        """Take in recorded metrics in their order; a record with a `heldout/` metric is an evaluation.

        Args:
            records: each with "step" beside its metrics; what else is in them is ignored.
        """
        for record in records:
            observe = self.observe_evaluation if is_evaluation(record) else self.observe_step
            observe(int(record["step"]), record)

    def metrics(self) -> dict[str, float]:
        """Entropy and length relative to the first steps, and how far pass@1 is below its best; absent until known."""
        metrics = {}
        for name, series in (("entropy", self._entropy), ("length", self._length)):
            change = self._change(series)
            if change is not None and change.before > 0:
                metrics[f"collapse/{name}_ratio"] = change.now / change.before
        if self._pass_at_1:
            metrics["collapse/heldout_drop"] = self._heldout().before - self._heldout().now
        return metrics

    def _has_entropy_rise(self) -> bool:
        change = self._change(self._entropy)
        return change is not None and change.rise_frac > self._settings.entropy_rise_frac + _ROUNDING

    def _has_length_drop(self) -> bool:
        change = self._change(self._length)
        return change is not None and -change.rise_frac > self._settings.length_drop_frac + _ROUNDING

    def _has_heldout_drop(self) -> bool:
        if not self._pass_at_1:
            return False
        change = self._heldout()
        return change.before - change.now > self._settings.heldout_drop + _ROUNDING

    def _change(self, series: dict[int, float]) -> _Change | None:
        """Mean over the first and over the last `window` steps; None before the two are apart."""
        window = self._settings.window
        if len(series) < 2 * window:
            return None
        first, last = islice(series.values(), window), islice(reversed(series.values()), window)
        return _Change(math.fsum(first) / window, math.fsum(last) / window)

    def _heldout(self) -> _Change:
        return _Change(max(self._pass_at_1.values()), next(reversed(self._pass_at_1.values())))

    def _sentence(self, step: int, symptoms: tuple[str, ...], is_collapse: bool) -> str:
        entropy, length = self._change(self._entropy), self._change(self._length)
        figures = []
        if entropy is not None:
            figures.append(f"student entropy {entropy.before:.3f} -> {entropy.now:.3f} nats")
        if length is not None:
            figures.append(f"response length {length.before:.1f} -> {length.now:.1f} tokens")
        if self._pass_at_1:
            figures.append(f"held-out pass@1 {self._heldout().before:.1%} (best) -> {self._heldout().now:.1%}")
        found = (
            "all three symptoms of a collapse under the teacher (arXiv:2605.10194)"
            if is_collapse
            else f"{len(symptoms)} of 3 symptoms of a collapse"
        )
        known = f": {', '.join(figures)}" if figures else ""
        window = self._settings.window
        basis = "" if entropy is None and length is None else f" (means over the first and the last {window} steps)"
        return f"After {step} steps the run shows {found}{known}{basis}" + (f"; {_ADVICE}." if is_collapse else ".")


def _keep(series: dict[int, float], step: int, metrics: Mapping[str, float], name: str) -> None:
    value = metrics.get(name, math.nan)
    if math.isfinite(value):
        series[step] = value
