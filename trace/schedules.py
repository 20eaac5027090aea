"""Weights of a route by training step; pure functions of the step, so a resumed run needs no state of theirs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from pydantic import Field

from trace_rl.config.base import Kind


class Schedule(Kind):
    """The weight lambda_k of a route at the 0-based training step k."""

    @property
    @abstractmethod
    def peak(self) -> float:
        """lambda_0, the weight that a ramp is measured against."""

    @abstractmethod
    def at(self, step: int) -> float:
        """lambda_k."""


class HoldThenLinear(Schedule):
    """w0 for k < hold, w0 (1 - (k - hold) / decay) for hold <= k < hold + decay, then 0.

    arXiv:2605.10194; with w0 = 0.5, 10 and 30: sum 12.75, sum of squares 5.12639.
    """

    type: Literal["hold_then_linear"] = "hold_then_linear"
    initial: float = Field(0.5, ge=0)
    hold_steps: int = Field(10, ge=0)
    decay_steps: int = Field(30, ge=0)

    @property
    def peak(self) -> float:
        return self.initial

    def at(self, step: int) -> float:
        if step < self.hold_steps:
            return self.initial
        return self.initial * max(0.0, 1 - (step - self.hold_steps) / self.decay_steps) if self.decay_steps else 0.0


class Linear(Schedule):
    """w0 + (w1 - w0) min(1, k / steps)."""

    type: Literal["linear"] = "linear"
    initial: float = Field(0.5, ge=0)
    final: float = Field(0.0, ge=0)
    steps: int = Field(50, ge=1)

    @property
    def peak(self) -> float:
        return max(self.initial, self.final)

    def at(self, step: int) -> float:
        return self.initial + (self.final - self.initial) * min(1.0, step / self.steps)


class Constant(Schedule):
    """The same weight at every step."""

    type: Literal["constant"] = "constant"
    value: float = Field(1.0, ge=0)

    @property
    def peak(self) -> float:
        return self.value

    def at(self, step: int) -> float:
        return self.value
