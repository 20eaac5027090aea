"""When a run counts as collapsing under its teacher, and what is done about it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trace_rl.config.base import Section


class CollapseWatch(Section):
    """The watch on the three-symptom pattern of all-token self-distillation (arXiv:2605.10194).

    Student entropy rises, responses become shorter and held-out accuracy falls. Only the three together count: policy
    gradients alone lower the entropy, and lengths or single evaluations move in sound runs too. The thresholds are
    ours; arXiv:2605.10194 reports lengths that fell by 49 % and 59 % in collapsing runs.
    """

    action: Literal["off", "warn", "stop"] = "warn"
    """`off`: do not watch; `warn`: say so at the evaluation that shows the pattern; `stop`: end the run there.
    Without evaluations (evaluation.every = 0) nothing is ever said, so `stop` is refused then."""
    window: int = Field(10, ge=1)
    """Steps that are averaged: the first so many are the reference, the last so many the present; nothing is said
    before there are twice as many."""
    entropy_rise_frac: float = Field(0.5, gt=0)
    """Rise of the mean student entropy, relative to the reference, above which it is a symptom."""
    length_drop_frac: float = Field(0.3, gt=0, lt=1)
    """Drop of the mean response length, relative to the reference, above which it is a symptom."""
    heldout_drop: float = Field(0.05, gt=0, lt=1)
    """Drop of held-out pass@1 below the best evaluation so far above which it is a symptom: 0.05 is 5 points. Keep it
    above the noise of one evaluation, 2 points for 512 samples at 50 %."""
