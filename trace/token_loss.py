"""The loss of a packed set of response tokens: a weighted sum of policy-gradient terms and the terms of routes.

    loss = sum_t pg_weight[t] * c[t] * pg[t]  +  sum_r route_weight[r] * action_{route(r)}[r]

with c the rollout correction. The weights carry schedule, ramp, token weights, aggregation and the *global*
denominators (`trace_rl.training_batch`), all fixed before the batch is split. So micro-batches, ranks and accumulation
only add up numbers, and any split into whole sequences gives the same loss. Metrics are sums too; `summarise` divides
once, at the end. An empty set of rows gives a differentiable zero.

Numbers are float32, or float64 where the logits are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trace_rl.actions import RoutedRows, RowAction
from trace_rl.config.algorithm import Algorithm
from trace_rl.policy_gradients import PolicyGradient, PolicyRows, RolloutCorrection, mismatch_statistics

_ROUTE_MEANS = ("value", "clipped", "mass", "teacher_entropy", "teacher_advantage")
"""Sums of a route that `summarise` divides by its rows."""


@dataclass(frozen=True)
class RouteLoss:
    """What the loss needs to know of a route whose action adds a term."""

    name: str
    index: int
    """Among all routes of the run."""
    action: RowAction
    temperature: float
    ranking: RowAction
    """The divergence that the route's token score reads; the action itself where nothing is ranked."""


@dataclass(frozen=True)
class Objective:
    """The loss of a run."""

    policy_gradient: PolicyGradient
    correction: RolloutCorrection
    routes: tuple[RouteLoss, ...]
    sampling_temperature: float


@dataclass(frozen=True)
class LossRows:
    """Per-token constants; `row` runs over all response tokens, `routed` over the rows of routes."""

    targets: Int[Tensor, " row"]
    sequence: Int[Tensor, " row"]
    """Which of the micro-batch's sequences the token belongs to; a sequence is never split."""
    num_sequences: int
    advantages: Float[Tensor, " row"]
    rollout_logprobs: Float[Tensor, " row"]
    """NaN where the sampler was not the policy."""
    pg_weight: Float[Tensor, " row"]
    route_row: Int[Tensor, " routed"]
    """Index into `row` of each routed token."""
    route_index: Int[Tensor, " routed"]
    route_weight: Float[Tensor, " routed"]
    teacher_row: Int[Tensor, " routed"]
    """Index into the teacher's rows; -1 where the action reads none."""

    def to(self, target: torch.device | torch.dtype) -> LossRows:
        """Copy to a device, or the real numbers to a precision."""
        is_device = isinstance(target, torch.device)
        moved: dict[str, Any] = {
            name: value.to(target)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and (is_device or value.is_floating_point())
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class LossParts:
    """The two parts of the loss; their sum is what is trained."""

    policy: Float[Tensor, ""]
    routed: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        return self.policy + self.routed


def objective_of(algorithm: Algorithm, sampling_temperature: float) -> Objective:
    """What of an algorithm the learner has to know; advantages and weights come with the batch."""
    return Objective(
        algorithm.policy_gradient,
        algorithm.rollout_correction,
        tuple(
            RouteLoss(name, index, route.action, route.temperature, route.ranking or route.action)
            for index, (name, route) in enumerate(algorithm.routes.items())
            if isinstance(route.action, RowAction)
        ),
        sampling_temperature,
    )


def target_logprobs(
    logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"], temperature: float
) -> Float[Tensor, " row"]:
    """log softmax(logits / temperature)[target]: comparable with the sampler's log-probs."""
    return torch.log_softmax(_precise(logits) / temperature, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def token_loss(
    logits: Float[Tensor, "row vocab"],
    rows: LossRows,
    objective: Objective,
    teacher_logits: Float[Tensor, "state vocab"],
    old_logprobs: Float[Tensor, " row"] | None = None,
) -> tuple[LossParts, dict[str, Tensor]]:
    """Return the loss and its metric sums (detached; names ending in `_max` combine by maximum, others by addition).

    Args:
        logits: policy logits that predict `rows.targets`, before any temperature.
        teacher_logits: the teacher's logits in the order that `rows.teacher_row` refers to.
        old_logprobs: log-probs of the policy before the first optimizer step of this batch; None when the policy being
            differentiated *is* that policy (one optimizer step a batch), where the ratio is 1.
    """
    policy_logprobs = target_logprobs(logits, rows.targets, objective.sampling_temperature)
    old = policy_logprobs.detach() if old_logprobs is None else old_logprobs
    policy_loss, sums = _policy_loss(policy_logprobs, old, rows, objective)
    sums["entropy"] = entropy(logits.detach(), objective.sampling_temperature).sum()
    ratio = torch.exp(policy_logprobs.detach() - old)
    routed = policy_loss.new_zeros(())
    for route in objective.routes:
        mine = rows.route_index == route.index
        value, route_sums = _route_loss(logits, rows, route, mine, teacher_logits, ratio)
        # without rows nothing is added, so that a run whose lambda is 0 is bit-identical to its policy gradient
        routed = routed if value is None else routed + value
        sums |= {f"{route.name}/{key}": number for key, number in route_sums.items()}
    return LossParts(policy_loss, routed), sums


def routed_rows(
    logits: Float[Tensor, "row vocab"],
    rows: LossRows,
    route: RouteLoss,
    mine: Bool[Tensor, " routed"],
    teacher_logits: Float[Tensor, "state vocab"],
    ratio: Float[Tensor, " row"],
) -> RoutedRows:
    """The rows of one route as its action reads them."""
    index = rows.route_row[mine]
    reads_teacher = "states" in (route.action.reads | route.ranking.reads)
    teacher = teacher_logits[rows.teacher_row[mine]] if reads_teacher else teacher_logits[:0]
    return RoutedRows(logits[index], teacher.detach(), rows.targets[index], route.temperature, ratio[index])


def entropy(logits: Float[Tensor, "row vocab"], temperature: float) -> Float[Tensor, " row"]:
    """Entropy of softmax(logits / temperature) in nats."""
    logprobs = torch.log_softmax(_precise(logits) / temperature, -1)
    return -(logprobs.exp() * logprobs).sum(-1)


def _policy_loss(
    policy_logprobs: Float[Tensor, " row"], old: Float[Tensor, " row"], rows: LossRows, objective: Objective
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    terms = objective.policy_gradient.terms(
        PolicyRows(policy_logprobs, old, rows.advantages, rows.sequence, rows.num_sequences)
    )
    # Completions of another sampler have no log-probs to compare with: they count as matched.
    is_sampled = torch.isfinite(rows.rollout_logprobs)
    sampler = torch.where(is_sampled, rows.rollout_logprobs, old.detach())
    correction, is_capped = objective.correction.weights(old, sampler, rows.sequence, rows.num_sequences)
    loss = (terms.loss * correction * rows.pg_weight).sum()
    return loss, {
        "tokens": _count(rows.targets),
        "sampled_tokens": is_sampled.sum().float(),
        "loss/policy_gradient": loss.detach(),
        "pg_clipped": terms.is_clipped.sum().float(),
        **mismatch_statistics(old, sampler, correction, is_capped),
    }


def _route_loss(
    logits: Float[Tensor, "row vocab"],
    rows: LossRows,
    route: RouteLoss,
    mine: Bool[Tensor, " routed"],
    teacher_logits: Float[Tensor, "state vocab"],
    ratio: Float[Tensor, " row"],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Weighted terms of one route; None without rows."""
    if not bool(mine.any()):
        zero = logits.new_zeros((), dtype=torch.float32)
        return None, dict.fromkeys(("loss", "rows", "value_max", *_ROUTE_MEANS), zero)
    routed = routed_rows(logits, rows, route, mine, teacher_logits, ratio)
    terms = route.action.terms(routed)
    loss = (terms.loss * rows.route_weight[mine]).sum()
    sums = {
        "loss": loss.detach(),
        "rows": _count(routed.targets),
        "value": terms.unclipped.sum(),
        "value_max": terms.unclipped.max(),
        "clipped": terms.is_clipped.sum().float(),
        "mass": terms.clipped_teacher_mass.sum(),
        "teacher_entropy": loss.new_zeros(()),
        "teacher_advantage": loss.new_zeros(()),
    }
    if len(routed.teacher_logits):
        teacher = torch.log_softmax(_precise(routed.teacher_logits) / route.temperature, -1)
        own = target_logprobs(routed.policy_logits.detach(), routed.targets, route.temperature)
        sums["teacher_entropy"] = -(teacher.exp() * teacher).sum()
        sums["teacher_advantage"] = (teacher.gather(-1, routed.targets.unsqueeze(-1)).squeeze(-1) - own).sum()
    return loss, sums


def summarise(sums: Mapping[str, float], objective: Objective) -> dict[str, float]:
    """Turn the sums of a global batch into metrics, each a mean over the tokens or routed rows that it speaks of."""
    tokens, sampled = max(sums["tokens"], 1.0), max(sums["sampled_tokens"], 1.0)
    loss_pg = sums["loss/policy_gradient"]
    metrics = {
        "loss/policy_gradient": loss_pg,
        "loss/routed": sum(sums[f"{route.name}/loss"] for route in objective.routes),
        "policy/entropy_nats": sums["entropy"] / tokens,
        "policy/clip_frac": sums["pg_clipped"] / tokens,
        "mismatch/logprob_gap_mean_nats": sums["mismatch"] / sampled,
        "mismatch/logprob_gap_max_nats": sums["mismatch_max"],
        "mismatch/kl_nats": sums["mismatch_k3"] / sampled,
        "mismatch/correction_mean": sums["correction"] / tokens,
        "mismatch/correction_capped_frac": sums["correction_capped"] / tokens,
    }
    metrics["loss/total"] = loss_pg + metrics["loss/routed"]
    for route in objective.routes:
        rows = sums[f"{route.name}/rows"]
        mean = {key: sums[f"{route.name}/{key}"] / max(rows, 1.0) for key in _ROUTE_MEANS}
        metrics |= {
            f"route/{route.name}/rows": rows,
            f"route/{route.name}/token_frac": rows / tokens,
            f"route/{route.name}/value_nats": mean["value"],
            f"route/{route.name}/value_max_nats": sums[f"{route.name}/value_max"],
            f"route/{route.name}/clipped_rows_frac": mean["clipped"],
            f"route/{route.name}/clipped_teacher_mass_frac": mean["mass"],
            f"route/{route.name}/teacher_entropy_nats": mean["teacher_entropy"],
            f"route/{route.name}/teacher_advantage_nats": mean["teacher_advantage"],
        }
    return metrics


def _precise(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()


def _count(values: Tensor) -> Float[Tensor, ""]:
    return torch.tensor(float(len(values)))
