"""What a route does with its tokens: the bases that every action builds on.

Two families. A `RowAction` adds a term to the loss at each of its tokens; the learner evaluates it, because it needs
the policy's logits. An `AdvantageAction` changes the advantage that the policy gradient uses at its tokens; it is
evaluated before the batch is split, on numbers alone, and the learner never hears of it. `none` does neither: it is for
methods in which only the policy-gradient weight of the routed tokens changes.

This module must not know which tokens a route selects, its schedule, or denominators.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trace_rl.batch import ScoredTokens, TeacherOutput
from trace_rl.config.base import Kind


class Action(Kind):
    """What happens to the tokens of a route."""

    reads: ClassVar[frozenset[TeacherOutput]] = frozenset()
    """What the action needs of the teacher; without anything no teacher is started for it."""

    @property
    def is_estimate(self) -> bool:
        """Whether it averages over tokens as samples of the policy, at the temperature that they were sampled with."""
        return False


class NoAction(Action):
    """Nothing: the route only changes the policy-gradient weight of its tokens (`on_routed`)."""

    type: Literal["none"] = "none"


@dataclass(frozen=True)
class RoutedRows:
    """The rows of one route in one micro-batch."""

    policy_logits: Float[Tensor, "row vocab"]
    """Before any temperature; carries the gradient."""
    teacher_logits: Float[Tensor, "row vocab"]
    """Detached, before any temperature; no rows where the action does not read states."""
    targets: Int[Tensor, " row"]
    """The tokens that were sampled."""
    temperature: float
    """Divides the logits of both sides."""
    ratio: Float[Tensor, " row"]
    """pi_theta / pi_old of the sampled token, detached; 1 where one optimizer step is taken on a batch."""

    @cached_property
    def policy_logprobs(self) -> Float[Tensor, "row vocab"]:
        """log softmax(policy_logits / temperature) in at least float32, with its gradient; computed once."""
        return _logprobs(self.policy_logits, self.temperature)

    @cached_property
    def teacher_logprobs(self) -> Float[Tensor, "row vocab"]:
        """log softmax(teacher_logits / temperature) in at least float32."""
        return _logprobs(self.teacher_logits.detach(), self.temperature)


@dataclass(frozen=True)
class RowTerms:
    """Per-row terms of the loss in nats, and what was done to them."""

    loss: Float[Tensor, " row"]
    unclipped: Float[Tensor, " row"]
    """Detached value before any clip or importance weight; what metrics report."""
    num_clipped_terms: Float[Tensor, " row"]
    """How many of its terms a clip changed: vocabulary entries, or 1 where it bounds the position as a whole."""
    clipped_teacher_mass: Float[Tensor, " row"]
    """Teacher probability of the vocabulary entries whose terms a clip silenced or scaled, in [0, 1]."""


class RowAction(Action):
    """Adds `weight * terms.loss` at each of the route's tokens."""

    @abstractmethod
    def terms(self, rows: RoutedRows) -> RowTerms:
        """The action's term at every row; differentiable in `rows.policy_logits` only."""


class AdvantageAction(Action):
    """Changes the advantage of the route's tokens."""

    @abstractmethod
    def advantages(
        self, group: Sequence[ScoredTokens], policy_weight: float, weights: Sequence[Float[np.ndarray, " row"]]
    ) -> list[Float[np.ndarray, " row"]]:
        """The advantages of the route's tokens, for all completions of one prompt that have such tokens.

        Args:
            group: the route's tokens of each completion; `advantage` is that of the whole completion.
            policy_weight: what the route leaves of the policy gradient on its tokens (`on_routed`).
            weights: schedule value times class multiplier times token weight, for every token.
        """


def _logprobs(logits: Float[Tensor, "row vocab"], temperature: float) -> Float[Tensor, "row vocab"]:
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(precise / temperature, -1)
