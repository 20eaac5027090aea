"""What a step's rollouts and routes tell about the run, as numbers by name.

Names are `area/quantity_unit`; shares end in `_frac`. Must not know what roles count themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trace_rl.batch import GradedRollout, RoutedRollout
from trace_rl.config.algorithm import Algorithm


def rollout_metrics(sampled: Sequence[GradedRollout], num_trained: int) -> dict[str, float]:
    """Rewards, groups and lengths of all completions of a step; nothing without any.

    Masked completions and prompts that dynamic sampling has replaced are counted too: without them the reward would be
    that of a selection, and truncation would vanish where truncated completions are masked.

    Args:
        num_trained: how many of them are trained on.
    """
    if not sampled:
        return {}
    ordered = sorted(sampled, key=lambda item: item.rollout.key)  # sums must not depend on the order of arrival
    groups: dict[str, list[float]] = {}
    for item in ordered:
        groups.setdefault(item.rollout.prompt.prompt_id, []).append(item.reward)
    return {
        "reward/mean": float(np.mean([item.reward for item in ordered])),
        "reward/zero_variance_groups_frac": float(np.mean([len(set(rewards)) == 1 for rewards in groups.values()])),
        "response/length_mean_tokens": float(np.mean([len(item.rollout.token_ids) for item in ordered])),
        "response/truncated_frac": float(np.mean([item.rollout.finish_reason == "length" for item in ordered])),
        "sampling/completions": float(len(ordered)),
        "sampling/trained_frac": num_trained / len(ordered),
    }


def route_metrics(routed: Sequence[RoutedRollout], algorithm: Algorithm, step: int) -> dict[str, float]:
    """What the routes took at this step, and the exposure to privileged information so far.

    `exposure/lambda_sq_sum` is sum_{j <= k} sum_routes (lambda_j mu)^2, the quantity that the bound of
    arXiv:2605.10194 asks to be finite; it counts routes that read a teacher.
    """
    total = sum(item.member.length for item in routed)
    taken = [_taken(item) for item in routed]
    metrics = {
        "route/token_frac": float(sum(mask.sum() for mask in taken) / total) if total else 0.0,
        "route/rollouts_frac": float(np.mean([mask.any() for mask in taken])) if taken else 0.0,
        "exposure/lambda_sq_sum": float(
            sum(
                (route.schedule.at(past) * route.multiplier) ** 2
                for route in algorithm.routes.values()
                if route.reads
                for past in range(step + 1)
            )
        ),
    }
    for index, (name, route) in enumerate(algorithm.routes.items()):
        tokens = sum(len(part.positions) for item in routed for part in item.routed if part.route == index)
        metrics[f"route/{name}/lambda"] = route.schedule.at(step)
        metrics[f"route/{name}/policy_weight"] = route.policy_weight(step)
        metrics[f"route/{name}/selected_frac"] = tokens / total if total else 0.0
    return metrics


def _taken(item: RoutedRollout) -> np.ndarray:
    mask = np.zeros(item.member.length, dtype=bool)
    for tokens in item.routed:
        mask[tokens.positions] = True
    return mask
