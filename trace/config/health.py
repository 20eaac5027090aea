"""Settings of how a role that hangs is told from one that works.

This module must not know how signs of life travel.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from trace_rl.config.base import Section


class Health(Section):
    """Every role's process gives a sign of life from a thread of its own, whatever else it does."""

    heartbeat_every_s: float = Field(10.0, gt=0)
    """Between two signs, and between two looks at them."""
    suspect_after_s: float = Field(60.0, gt=0)
    """Without a sign for so long, a role is named in a warning."""
    dead_after_s: float = Field(300.0, gt=0)
    """Without a sign for so long, a role is killed and treated as one that died. Loading a very large model in one
    native call, or a machine that swaps, can silence a process that is well."""

    @model_validator(mode="after")
    def _order(self) -> Health:
        if not self.heartbeat_every_s < self.suspect_after_s < self.dead_after_s:
            raise ValueError(
                f"health.heartbeat_every_s, suspect_after_s and dead_after_s are {self.heartbeat_every_s:g}, "
                f"{self.suspect_after_s:g} and {self.dead_after_s:g}; each must be longer than the one before"
            )
        return self
