"""The loss of a packed set of response tokens: a weighted sum of policy-gradient and divergence terms.

    loss = sum_t pg_weight[t] * pg[t]  +  sum_r kl_weight[r] * kl_{route(r)}[r]

The weights carry schedule, ramp, aggregation and the *global* denominators (`trace_rl.routing`), all fixed before the
batch is split. So micro-batches, ranks and accumulation only add up numbers, and any split gives the same loss.
Metrics are sums too; `summarise` divides once, at the end. An empty set of rows gives a differentiable zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trace_rl.batch import Action
from trace_rl.config.algorithm import Algorithm, KlClip, PolicyGradient
from trace_rl.divergences import divergence
from trace_rl.policy_loss import clipped_policy_loss

ACTIONS = {"fkl": Action.FKL, "rkl": Action.RKL}


@dataclass(frozen=True)
class RouteLoss:
    """What the loss needs to know of a route."""

    name: str
    action: Action
    clip: KlClip
    temperature: float


@dataclass(frozen=True)
class LossRows:
    """Per-token constants; `row` runs over all response tokens, `routed` over the routed ones."""

    targets: Int[Tensor, " row"]
    advantages: Float[Tensor, " row"]
    rollout_logprobs: Float[Tensor, " row"]
    pg_weight: Float[Tensor, " row"]
    kl_row: Int[Tensor, " routed"]
    """Index into `row` of each routed token."""
    kl_route: Int[Tensor, " routed"]
    kl_weight: Float[Tensor, " routed"]


def route_losses(algorithm: Algorithm) -> tuple[RouteLoss, ...]:
    """The routes of a run in the order of their indices."""
    return tuple(
        RouteLoss(name, ACTIONS[route.action], route.clip, route.temperature)
        for name, route in algorithm.routes.items()
    )


def target_logprobs(
    logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"], temperature: float
) -> Float[Tensor, " row"]:
    """log softmax(logits / temperature)[target] in float32: comparable with the sampler's log-probs."""
    return torch.log_softmax(logits.float() / temperature, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def token_loss(
    logits: Float[Tensor, "row vocab"],
    rows: LossRows,
    policy_gradient: PolicyGradient,
    routes: Sequence[RouteLoss],
    teacher_logits: Float[Tensor, "routed vocab"],
    sampling_temperature: float = 1.0,
    old_logprobs: Float[Tensor, " row"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return the loss and its metric sums (detached; names ending in `_max` combine by maximum, others by addition).

    Args:
        logits: policy logits that predict `rows.targets`, before any temperature.
        teacher_logits: the teacher's logits at the routed tokens, in the order of `rows.kl_row`.
        old_logprobs: log-probs of the policy before the first optimizer step of this batch; None when the policy being
            differentiated *is* that policy (one optimizer step a batch), where the ratio is 1.
    """
    policy_logprobs = target_logprobs(logits, rows.targets, sampling_temperature)
    old = policy_logprobs.detach() if old_logprobs is None else old_logprobs
    terms, is_clipped = clipped_policy_loss(policy_logprobs, old, rows.advantages, policy_gradient)
    pg_loss = (terms * rows.pg_weight).sum()
    loss = pg_loss
    mismatch = (policy_logprobs.detach() - rows.rollout_logprobs).abs()
    sums = {
        "tokens": _count(rows.targets),
        "loss/policy_gradient": pg_loss.detach(),
        "pg_clipped": is_clipped.sum().float(),
        "entropy": _entropy(logits.detach() / sampling_temperature),
        "mismatch": mismatch.sum(),
        "mismatch_max": mismatch.max() if mismatch.numel() else mismatch.sum(),
    }
    for index, route in enumerate(routes):
        kl_loss, kl_sums = _route_loss(logits, rows, route, rows.kl_route == index, teacher_logits)
        if kl_loss is not None:
            loss = loss + kl_loss
        sums |= {f"{route.name}/{key}": value for key, value in kl_sums.items()}
    return loss, sums


def _route_loss(
    logits: Float[Tensor, "row vocab"],
    rows: LossRows,
    route: RouteLoss,
    mine: Tensor,
    teacher_logits: Float[Tensor, "routed vocab"],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Weighted divergence of one route; None without rows, so that a run whose lambda is 0 is bit-identical to GRPO."""
    if not bool(mine.any()):
        zero = logits.new_zeros((), dtype=torch.float32)
        return None, dict.fromkeys(("loss", "rows", "kl", "kl_max", "clipped", "mass", "teacher_entropy", "lift"), zero)
    policy = torch.log_softmax(logits[rows.kl_row[mine]].float() / route.temperature, -1)
    teacher = torch.log_softmax(teacher_logits[mine].detach().float() / route.temperature, -1)
    result = divergence(route.action, policy, teacher, route.clip)
    loss = (result.loss * rows.kl_weight[mine]).sum()
    probabilities = teacher.exp()
    targets = rows.targets[rows.kl_row[mine]].unsqueeze(-1)
    return loss, {
        "loss": loss.detach(),
        "rows": _count(targets),
        "kl": result.unclipped.sum(),
        "kl_max": result.unclipped.max(),
        "clipped": result.is_clipped.any(-1).sum().float(),
        "mass": (probabilities * result.is_clipped).sum(),
        "teacher_entropy": _entropy(teacher),
        "lift": (teacher - policy.detach()).gather(-1, targets).sum(),
    }


def summarise(sums: Mapping[str, float], routes: Sequence[RouteLoss]) -> dict[str, float]:
    """Turn the sums of a global batch into metrics, each a mean over the tokens or routed rows that it speaks of."""
    tokens = max(sums["tokens"], 1.0)
    loss_pg = sums["loss/policy_gradient"]
    metrics = {
        "loss/policy_gradient": loss_pg,
        "loss/kl": sum(sums[f"{route.name}/loss"] for route in routes),
        "policy/entropy_nats": sums["entropy"] / tokens,
        "policy/clip_frac": sums["pg_clipped"] / tokens,
        "mismatch/logprob_gap_mean_nats": sums["mismatch"] / tokens,
        "mismatch/logprob_gap_max_nats": sums["mismatch_max"],
    }
    metrics["loss/total"] = loss_pg + metrics["loss/kl"]
    for route in routes:
        rows = sums[f"{route.name}/rows"]
        mean = {
            key: sums[f"{route.name}/{key}"] / max(rows, 1.0)
            for key in ("kl", "clipped", "mass", "teacher_entropy", "lift")
        }
        metrics |= {
            f"route/{route.name}/rows": rows,
            f"route/{route.name}/token_frac": rows / tokens,
            f"route/{route.name}/kl_nats": mean["kl"],
            f"route/{route.name}/kl_max_nats": sums[f"{route.name}/kl_max"],
            f"route/{route.name}/clipped_rows_frac": mean["clipped"],
            f"route/{route.name}/clipped_teacher_mass_frac": mean["mass"],
            f"route/{route.name}/teacher_entropy_nats": mean["teacher_entropy"],
            f"route/{route.name}/teacher_advantage_nats": mean["lift"],
        }
    return metrics


def _entropy(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, ""]:
    logprobs = torch.log_softmax(logits.float(), -1)
    return -(logprobs.exp() * logprobs).sum()


def _count(values: Tensor) -> Float[Tensor, ""]:
    return torch.tensor(float(values.shape[0]), device=values.device)
