"""From annotated rollouts to token weights: advantages, routes, and the global denominators.

Decides for every response token whether it is trained with the policy gradient, a divergence, or both, and with which
weight. Everything here is a constant of the loss; no tensor of a model is touched.

Invariants: with no active route the weights are those of the plain policy gradient, bit for bit; key spans exist on
correct rollouts only, error spans on wrong ones; weights sum over the *global* batch, so any later split is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Float

from trace_rl.advantages import group_advantages
from trace_rl.batch import (
    AnnotatedRollout,
    RolloutKey,
    RoutedRollout,
    SpanClass,
    TeacherRows,
    TrainingBatch,
    TrainingSequence,
)
from trace_rl.config.algorithm import Algorithm, Route
from trace_rl.errors import WeightSyncError
from trace_rl.schedules import is_active, routed_policy_weight, schedule_value

_SPAN_CLASS: Mapping[str, SpanClass] = {"key_spans": "key", "error_spans": "error"}


def active_span_classes(algorithm: Algorithm, step: int) -> frozenset[SpanClass]:
    """Classes of spans that any route asks for at this step; empty means that nobody needs to annotate."""
    routes = algorithm.routes.values()
    return frozenset(_SPAN_CLASS[route.selector.tokens] for route in routes if is_active(route, step))


def route_rollouts(annotated: Iterable[AnnotatedRollout], algorithm: Algorithm, step: int) -> list[RoutedRollout]:
    """Give every rollout its advantage and every token its weights and route, ordered by rollout key.

    Rollouts without a single token take part in the group's statistics and are then left out.
    """
    ordered = sorted(annotated, key=lambda item: item.graded.rollout.key)
    routed = []
    for _, group in groupby(ordered, key=lambda item: item.graded.rollout.prompt.prompt_id):
        members = list(group)
        rewards = np.array([[member.graded.reward for member in members]])
        settings = algorithm.policy_gradient
        advantages = group_advantages(rewards, settings.std, settings.std_epsilon)[0]
        routed += [
            _route(member, float(advantage), algorithm, step)
            for member, advantage in zip(members, advantages, strict=True)
            if member.graded.rollout.token_ids
        ]
    return routed


def _route(annotated: AnnotatedRollout, advantage: float, algorithm: Algorithm, step: int) -> RoutedRollout:
    length = len(annotated.graded.rollout.token_ids)
    pg_weight = np.ones(length)
    kl_weight = np.zeros(length)
    route_index = np.full(length, -1)
    for index, route in enumerate(algorithm.routes.values()):
        if not is_active(route, step):
            continue
        mine = _selected(annotated, route, length) & (route_index < 0)
        route_index[mine] = index
        pg_weight[mine] = routed_policy_weight(route, step)
        kl_weight[mine] = schedule_value(route.schedule, step) * route.multiplier
    return RoutedRollout(annotated, advantage, pg_weight, route_index, kl_weight)


def _selected(annotated: AnnotatedRollout, route: Route, length: int) -> np.ndarray:
    """Mask [time] of the tokens that the route selects."""
    mask = np.zeros(length, dtype=bool)
    if annotated.graded.is_correct != (route.selector.rollouts == "correct"):
        return mask
    for span in annotated.spans:
        if span.span_class == _SPAN_CLASS[route.selector.tokens]:
            mask[span.start : span.end] = True
    return mask


def token_denominators(lengths: Sequence[int], aggregation: str) -> list[float]:
    """Return what each rollout's token weights are divided by.

    seq-mean-token-mean: |y_i| * R for R rollouts; token-mean: sum_j |y_j| (Yu et al. 2025, arXiv:2503.14476, eq. 8).
    """
    if aggregation == "token-mean":
        return [float(sum(lengths))] * len(lengths)
    return [float(length * len(lengths)) for length in lengths]


def training_batch(
    routed: Sequence[RoutedRollout],
    teacher_rows: Mapping[RolloutKey, TeacherRows],
    algorithm: Algorithm,
    step: int,
    policy_version: int,
) -> TrainingBatch:
    """Join routes and teacher rows into what the learner sees, denominators folded into the weights.

    Raises:
        WeightSyncError: a rollout was written by weights of another version than `policy_version`.
    """
    stale = sorted({item.annotated.graded.rollout.policy_version for item in routed} - {policy_version})
    if stale:
        raise WeightSyncError(
            f"step {step} got rollouts written by weights of version {stale}, expected {policy_version} only; the "
            "generator was not synced before it sampled, report this as a bug"
        )
    lengths = [len(item.pg_weight) for item in routed]
    denominators = token_denominators(lengths, algorithm.aggregation)
    sequences = tuple(
        _training_sequence(item, teacher_rows, denominator)
        for item, denominator in zip(routed, denominators, strict=True)
    )
    return TrainingBatch(step, policy_version, sequences)


def _training_sequence(
    routed: RoutedRollout, teacher_rows: Mapping[RolloutKey, TeacherRows], denominator: float
) -> TrainingSequence:
    rollout = routed.annotated.graded.rollout
    positions = np.flatnonzero(routed.is_routed)
    rows = teacher_rows[rollout.key].hidden if len(positions) else np.zeros((0, 0), dtype=np.float32)
    if len(rows) != len(positions):
        raise ValueError(f"rollout {rollout.key} has {len(positions)} routed tokens but {len(rows)} teacher rows")
    return TrainingSequence(
        key=rollout.key,
        prompt_token_ids=rollout.prompt_token_ids,
        token_ids=rollout.token_ids,
        rollout_logprobs=rollout.rollout_logprobs,
        advantage=routed.advantage,
        pg_weight=(routed.pg_weight / denominator).astype(np.float32),
        kl_positions=positions,
        kl_route=routed.route_index[positions],
        kl_weight=(routed.kl_weight[positions] / denominator).astype(np.float32),
        teacher_hidden=rows,
    )


def routing_metrics(routed: Sequence[RoutedRollout], algorithm: Algorithm, step: int) -> dict[str, float]:
    """Rewards, group statistics, lengths, and what the routes took at this step."""
    graded = [item.annotated.graded for item in routed]
    lengths: Float[np.ndarray, " batch"] = np.array([len(item.pg_weight) for item in routed], dtype=float)
    groups: dict[str, list[float]] = {}
    for item in graded:
        groups.setdefault(item.rollout.prompt.prompt_id, []).append(item.reward)
    metrics = {
        "reward/mean": float(np.mean([item.reward for item in graded])),
        "reward/zero_variance_groups_frac": float(np.mean([len(set(rewards)) == 1 for rewards in groups.values()])),
        "response/length_mean_tokens": float(lengths.mean()),
        "response/truncated_frac": float(np.mean([item.rollout.finish_reason == "length" for item in graded])),
        "route/token_frac": float(sum(item.is_routed.sum() for item in routed) / lengths.sum()),
        "route/rollouts_frac": float(np.mean([item.is_routed.any() for item in routed])),
    }
    for name, route in algorithm.routes.items():
        metrics[f"route/{name}/lambda"] = schedule_value(route.schedule, step)
        metrics[f"route/{name}/policy_weight"] = routed_policy_weight(route, step) if is_active(route, step) else 1.0
    return metrics
