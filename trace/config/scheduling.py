"""Settings of how far sampling may run ahead of learning, and of what happens to completions that take long.

This module must not know how anything is scheduled.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trace_rl.config.base import Section


class Scheduling(Section):
    """With max_staleness 0 every step samples, learns and syncs in turn, and all that follows is on-policy."""

    max_staleness: int = Field(0, ge=0)
    """Versions that the oldest token of a completion may be behind the policy that is trained with it. 0: synchronous;
    1: the next step is sampled while this one is learnt (one step off)."""
    late: Literal["wait", "drop"] = "wait"
    """What becomes of a prompt whose completions would be too old at the next step: `wait`: this step waits for them;
    `drop`: they are given up, and another prompt takes their place."""
    partial: Literal["resume", "keep", "finish"] = "resume"
    """What a sync does to completions that are being written. `resume`: the new weights read what is written anew and
    go on; `keep`: they go on from the key-value cache of the old ones, which is faster and less exact; `finish`: the
    sync waits until they are complete."""
    oversampling_frac: float = Field(0.0, ge=0, le=4)
    """Prompts sampled beyond what the steps need, relative to sampling.prompts_per_step; a step takes those that are
    complete first, oldest first. Above 0 only with late=drop, because something has to give way."""

    @property
    def is_synchronous(self) -> bool:
        """Whether nothing is sampled while the learner works."""
        return self.max_staleness == 0

    @property
    def runs_through_syncs(self) -> bool:
        """Whether engines get new weights while they write."""
        return not self.is_synchronous and self.partial != "finish"

    @model_validator(mode="after")
    def _surplus_is_dropped(self) -> Scheduling:
        if self.oversampling_frac and self.late == "wait":
            raise ValueError(
                f"scheduling.oversampling_frac is {self.oversampling_frac:g}, but scheduling.late is wait, so that no "
                "prompt would ever be given up; set scheduling.late=drop"
            )
        return self
