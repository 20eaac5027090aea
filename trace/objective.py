"""What is optimised, in numbers: the constants of every token, the policy-gradient part, and how sums become metrics.

    loss = sum_t pg_weight[t] * c[t] * pg[t]  +  sum_r route_weight[r] * action_{route(r)}[r]

with c the rollout correction. The weights carry schedule, ramp, token weights, aggregation and the *global*
denominators (`trace_rl.training_batch`), all fixed before the batch is split. So micro-batches, ranks and accumulation
only add up numbers, and any split into whole sequences gives the same loss. Metrics are sums too; `summarise` divides
once, at the end.

How the loss is evaluated from hidden states is `trace_rl.head_loss`; this module never sees logits.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trace_rl.actions import RowAction
from trace_rl.config.algorithm import Algorithm
from trace_rl.policy_gradients import PolicyGradient, PolicyRows, RolloutCorrection, SamplerRows, mismatch_statistics

_PER_TOKEN = ("targets", "sequence", "advantages", "rollout_logprobs", "is_stale", "pg_weight")
_PER_ROUTED = ("route_index", "route_weight", "teacher_row")
_ROUTE_MEANS = ("value", "clipped", "clipped_terms", "mass", "teacher_entropy", "teacher_advantage")
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
    is_stale: Bool[Tensor, " row"]
    """Whether older weights than those of the step wrote the token."""
    pg_weight: Float[Tensor, " row"]
    route_row: Int[Tensor, " routed"]
    """Index into `row` of each routed token."""
    route_index: Int[Tensor, " routed"]
    route_weight: Float[Tensor, " routed"]
    teacher_row: Int[Tensor, " routed"]
    """Index into the teacher's rows; -1 where the action reads none."""

    def tokens(self, start: int, end: int) -> LossRows:
        """The constants of the tokens [start, end), without any route."""
        per_token = {name: getattr(self, name)[start:end] for name in _PER_TOKEN}
        per_route = {name: getattr(self, name)[:0] for name in ("route_row", *_PER_ROUTED)}
        return LossRows(num_sequences=self.num_sequences, **per_token, **per_route)

    def where(self, is_kept: Bool[Tensor, " row"]) -> LossRows:
        """The kept tokens with their routes; sequences keep their numbers."""
        is_routed = is_kept[self.route_row]
        renumbered = is_kept.cumsum(0) - 1
        return replace(
            self,
            route_row=renumbered[self.route_row[is_routed]],
            **{name: getattr(self, name)[is_kept] for name in _PER_TOKEN},
            **{name: getattr(self, name)[is_routed] for name in _PER_ROUTED},
        )

    def to(self, target: torch.device | torch.dtype) -> LossRows:
        """Copy to a device, or the real numbers to a precision."""
        is_device = isinstance(target, torch.device)
        moved: dict[str, Any] = {
            name: value.to(target)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and (is_device or value.is_floating_point())
        }
        return replace(self, **moved)


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


def policy_loss(
    policy_logprobs: Float[Tensor, " row"],
    old_logprobs: Float[Tensor, " row"] | None,
    rows: LossRows,
    objective: Objective,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The policy-gradient part of the loss, and its metric sums.

    Args:
        policy_logprobs: of the sampled tokens at the sampling temperature; carries the gradient.
        old_logprobs: those of the policy before the first optimizer step of this batch; None when the policy being
            differentiated *is* that policy (one optimizer step a batch), where the ratio is 1.
    """
    old = policy_logprobs.detach() if old_logprobs is None else old_logprobs
    terms = objective.policy_gradient.terms(
        PolicyRows(policy_logprobs, old, rows.advantages, rows.sequence, rows.num_sequences)
    )
    # Completions of another sampler have no log-probs to compare with: they count as matched.
    is_sampled = torch.isfinite(rows.rollout_logprobs)
    sampler = torch.where(is_sampled, rows.rollout_logprobs, old)
    compared = SamplerRows(old, sampler, rows.is_stale, rows.sequence, rows.num_sequences)
    correction, is_capped = objective.correction.weights(compared)
    loss = (terms.loss * correction * rows.pg_weight).sum()
    return loss, {
        "tokens": loss.new_tensor(float(len(rows.targets))),
        "sampled_tokens": is_sampled.sum().to(loss.dtype),
        "loss/policy_gradient": loss.detach(),
        "pg_clipped": terms.is_clipped.sum().to(loss.dtype),
        **mismatch_statistics(compared, correction, is_capped),
    }


def couples_tokens(objective: Objective, is_one_step: bool) -> bool:
    """Whether the policy-gradient weight of a token depends on other tokens' log-probs under the policy.

    Args:
        is_one_step: one optimizer step is taken on a batch, so the policy is the old one.
    """
    return objective.correction.level == "sequence" or objective.policy_gradient.couples_tokens(is_one_step)


def route_sums(
    value: Float[Tensor, " row"],
    num_clipped_terms: Float[Tensor, " row"],
    clipped_teacher_mass: Float[Tensor, " row"],
    loss: Float[Tensor, " row"],
    teacher_entropy: Float[Tensor, " row"],
    teacher_advantage: Float[Tensor, " row"],
) -> dict[str, Tensor]:
    """Metric sums of rows of one route; no rows give zeros. The last two have no rows where no teacher is read."""
    return {
        "loss": loss.sum(),
        "rows": value.new_tensor(float(len(value))),
        "value": value.sum(),
        "value_max": value.max() if len(value) else value.sum(),
        "clipped": (num_clipped_terms > 0).sum().to(value.dtype),
        "clipped_terms": num_clipped_terms.sum(),
        "mass": clipped_teacher_mass.sum(),
        "teacher_entropy": teacher_entropy.sum(),
        "teacher_advantage": teacher_advantage.sum(),
    }


def merge_sums(total: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Add metric sums, numbers or tensors, in place; names ending in `_max` combine by maximum."""
    for name, value in other.items():
        combine = max if name.endswith("_max") else operator.add
        total[name] = combine(total[name], value) if name in total else value


def summarise(sums: Mapping[str, float], objective: Objective) -> dict[str, float]:
    """Turn the sums of a global batch into metrics, each a mean over the tokens or routed rows that it speaks of.

    Where a batch has tokens of older weights, mismatch and correction are also told of these and of the others apart
    (`mismatch/stale_*`, `mismatch/fresh_*`): the former grows with what is learnt, the latter comes of kernels alone.
    """
    tokens, sampled = max(sums["tokens"], 1.0), max(sums["sampled_tokens"], 1.0)
    loss_pg = sums["loss/policy_gradient"]
    metrics = {
        "loss/policy_gradient": loss_pg,
        "loss/routed": sum(sums[f"{route.name}/loss"] for route in objective.routes),
        "policy/entropy_nats": sums["entropy"] / tokens,
        "policy/clip_frac": sums["pg_clipped"] / tokens,
        **_mismatch(sums, "", sampled, tokens),
    }
    if stale := sums["stale_tokens"]:
        metrics |= _mismatch(sums, "fresh_", max(sampled - stale, 1.0), max(tokens - stale, 1.0))
        metrics |= _mismatch(sums, "stale_", stale, stale)
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
            f"route/{route.name}/clipped_terms_mean": mean["clipped_terms"],
            f"route/{route.name}/clipped_teacher_mass_frac": mean["mass"],
            f"route/{route.name}/teacher_entropy_nats": mean["teacher_entropy"],
            f"route/{route.name}/teacher_advantage_nats": mean["teacher_advantage"],
        }
    return metrics


def _mismatch(sums: Mapping[str, float], part: str, sampled: float, tokens: float) -> dict[str, float]:
    """How far sampler and learner are apart at a part of the tokens, of which `sampled` are the policy's own."""
    return {
        f"mismatch/{part}logprob_gap_mean_nats": sums[f"{part}mismatch"] / sampled,
        f"mismatch/{part}logprob_gap_max_nats": sums[f"{part}mismatch_max"],
        f"mismatch/{part}kl_nats": sums[f"{part}mismatch_k3"] / sampled,
        f"mismatch/{part}correction_mean": sums[f"{part}correction"] / tokens,
        f"mismatch/{part}correction_capped_frac": sums[f"{part}correction_capped"] / tokens,
    }
