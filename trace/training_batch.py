"""From routed rollouts and what teacher and learner say of them to the batch that is trained on.

Decides every number that the loss is multiplied with: token weights, per-token advantages, and the *global*
denominators, so that any later split of the batch is exact (arXiv:2503.14476, eq. 8, is a sum over the whole batch).
Must not know tensors, ranks or micro-batches.

Invariants: a rollout that takes no route has exactly the weights of the plain policy gradient; the weights do not
depend on the order of the rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from trace_rl.actions import AdvantageAction, RowAction
from trace_rl.batch import (
    NOT_THE_POLICY,
    RolloutKey,
    RoutedRollout,
    RoutedTokens,
    ScoredTokens,
    TeacherRows,
    TokenStatistics,
    TrainingBatch,
    TrainingSequence,
)
from trace_rl.config.algorithm import Aggregation, Route
from trace_rl.config.run import RunConfig
from trace_rl.errors import WeightSyncError
from trace_rl.prompts import TeacherView
from trace_rl.routing import policy_weights

_NO_ROWS = np.zeros(0)


@dataclass(frozen=True)
class Evidence:
    """What teacher and learner have said of a step's rollouts."""

    views: Sequence[TeacherView]
    teacher_rows: Mapping[tuple[RolloutKey, int], TeacherRows]
    """By rollout and view."""
    statistics: Mapping[tuple[RolloutKey, int], TokenStatistics] = field(default_factory=dict)
    """By rollout and route: what the learner's scoring pass found, where there was one."""

    def rows_of(self, key: RolloutKey, route: int) -> tuple[TeacherRows | None, int]:
        """The teacher's rows for a rollout's tokens of a route, and their view; none where no teacher was asked."""
        for index, view in enumerate(self.views):
            if route in view.routes:
                return self.teacher_rows[key, index], index
        return None, -1


def scored_tokens(
    routed: Sequence[RoutedRollout], evidence: Evidence, config: RunConfig
) -> dict[int, dict[RolloutKey, ScoredTokens]]:
    """By route and rollout: the route's tokens with all that is known of them."""
    by_route: dict[int, dict[RolloutKey, ScoredTokens]] = {}
    for item in routed:
        for tokens in item.routed:
            by_route.setdefault(tokens.route, {})[item.key] = _scored(item, tokens, evidence)
    return by_route


def training_batch(
    routed: Sequence[RoutedRollout],
    scored: Mapping[int, Mapping[RolloutKey, ScoredTokens]],
    evidence: Evidence,
    config: RunConfig,
    step: int,
) -> TrainingBatch:
    """Fold schedules, token weights, advantages and denominators into what the learner sees.

    Args:
        scored: the tokens of each route, as `scored_tokens` gives them for `routed`.

    Raises:
        WeightSyncError: a token was written by weights that are older than scheduling.max_staleness allows, or newer
            than those that are trained.
    """
    _refuse_stale(routed, step, config.scheduling.max_staleness)
    denominators = _policy_denominators(routed, config)
    weights = _row_weights(routed, scored, denominators, config)
    advantages = _advantages(routed, scored, config, step)
    sequences = tuple(
        _training_sequence(item, advantages[item.key], denominator, weights, evidence, config, step)
        for item, denominator in zip(routed, denominators, strict=True)
    )
    return TrainingBatch(step, sequences)


def token_denominators(lengths: Sequence[int], aggregation: Aggregation, max_tokens: int) -> list[float]:
    """Return what each rollout's token weights are divided by, for R rollouts of |y_i| tokens.

    seq-mean-token-mean: |y_i| R; token-mean: sum_j |y_j| (arXiv:2503.14476, eq. 8); seq-mean-token-sum-norm:
    max_tokens R (arXiv:2503.20783).
    """
    if aggregation == "token-mean":
        return [float(sum(lengths))] * len(lengths)
    if aggregation == "seq-mean-token-sum-norm":
        return [float(max_tokens * len(lengths))] * len(lengths)
    return [float(length * len(lengths)) for length in lengths]


def _refuse_stale(routed: Sequence[RoutedRollout], step: int, max_staleness: int) -> None:
    oldest = step - max_staleness
    for item in routed:
        versions = item.member.rollout.token_versions
        is_allowed = ((versions >= oldest) & (versions <= step)) | (versions == NOT_THE_POLICY)
        if not is_allowed.all():
            bound = f"{oldest} to {step}" if max_staleness else str(step)
            raise WeightSyncError(
                f"step {step} got sample {item.key.sample} of prompt {item.key.prompt_id} with tokens written by "
                f"weights of version {versions[~is_allowed][0]}, expected {bound} (scheduling.max_staleness is "
                f"{max_staleness}); the scheduler let it through, report this as a bug"
            )


def _policy_denominators(routed: Sequence[RoutedRollout], config: RunConfig) -> list[float]:
    lengths = [item.member.length for item in routed]
    return token_denominators(lengths, config.algorithm.aggregation, config.sampling.max_response_tokens)


def _scored(item: RoutedRollout, tokens: RoutedTokens, evidence: Evidence) -> ScoredTokens:
    rows, _ = evidence.rows_of(item.key, tokens.route)
    statistics = evidence.statistics.get((item.key, tokens.route))
    index = np.searchsorted(rows.positions, tokens.positions) if rows is not None else np.zeros(0, dtype=np.int64)
    return ScoredTokens(
        member=item.member,
        advantage=item.advantage,
        positions=tokens.positions,
        teacher_logprobs=_NO_ROWS if rows is None or not len(rows.logprobs) else rows.logprobs[index],
        teacher_entropy=_NO_ROWS if rows is None or not len(rows.entropy) else rows.entropy[index],
        policy_entropy=_NO_ROWS if statistics is None else statistics.policy_entropy,
        divergence=_NO_ROWS if statistics is None else statistics.divergence,
    )


def _row_weights(
    routed: Sequence[RoutedRollout],
    scored: Mapping[int, Mapping[RolloutKey, ScoredTokens]],
    denominators: Sequence[float],
    config: RunConfig,
) -> dict[tuple[int, RolloutKey], Float[np.ndarray, " row"]]:
    """By route and rollout: schedule value x multiplier x token weight / denominator."""
    routes = list(config.algorithm.routes.values())
    policy = {item.key: denominator for item, denominator in zip(routed, denominators, strict=True)}
    sizes = {index: sum(len(item.positions) for item in items.values()) for index, items in scored.items()}
    pooled = sum(size for index, size in sizes.items() if routes[index].normalisation == "routes-mean")
    weights = {}
    for index, values in _token_weights(routed, scored, config).items():
        shared = {"route-mean": sizes[index], "routes-mean": pooled}.get(routes[index].normalisation)
        for key, value in values.items():
            weights[index, key] = value / (policy[key] if shared is None else shared)
    return weights


def _token_weights(
    routed: Sequence[RoutedRollout], scored: Mapping[int, Mapping[RolloutKey, ScoredTokens]], config: RunConfig
) -> dict[int, dict[RolloutKey, Float[np.ndarray, " row"]]]:
    """By route and rollout: schedule value x multiplier x token weight."""
    routes = list(config.algorithm.routes.values())
    scheduled = {tokens.route: tokens.weight for item in routed for tokens in item.routed}
    return {
        index: {
            key: value * scheduled[index]
            for key, value in zip(items, routes[index].token_weight.weights(list(items.values())), strict=True)
        }
        for index, items in scored.items()
    }


def _advantages(
    routed: Sequence[RoutedRollout],
    scored: Mapping[int, Mapping[RolloutKey, ScoredTokens]],
    config: RunConfig,
    step: int,
) -> dict[RolloutKey, Float[np.ndarray, " time"]]:
    """The advantage of every token: that of its rollout, or what the action of a route makes of it."""
    advantages = {item.key: np.full(item.member.length, item.advantage) for item in routed}
    weights = _token_weights(routed, scored, config)
    for index, route in enumerate(config.algorithm.routes.values()):
        if index not in scored or not isinstance(route.action, AdvantageAction):
            continue
        groups: dict[str, list[RolloutKey]] = {}
        for key in scored[index]:
            groups.setdefault(key.prompt_id, []).append(key)
        for keys in groups.values():
            group = [scored[index][key] for key in keys]
            found = route.action.advantages(group, route.policy_weight(step), [weights[index][key] for key in keys])
            for item, value in zip(group, found, strict=True):
                advantages[item.member.rollout.key][item.positions] = value
    return advantages


def _training_sequence(
    routed: RoutedRollout,
    advantages: Float[np.ndarray, " time"],
    denominator: float,
    weights: Mapping[tuple[int, RolloutKey], Float[np.ndarray, " row"]],
    evidence: Evidence,
    config: RunConfig,
    step: int,
) -> TrainingSequence:
    rollout = routed.member.rollout
    routes = list(config.algorithm.routes.values())
    added = [tokens for tokens in routed.routed if isinstance(routes[tokens.route].action, RowAction)]
    teacher_row, hidden = _teacher_states(routed, added, routes, evidence)
    return TrainingSequence(
        key=rollout.key,
        prompt_token_ids=rollout.prompt_token_ids,
        token_ids=rollout.token_ids,
        rollout_logprobs=rollout.rollout_logprobs,
        staleness=np.where(rollout.token_versions == NOT_THE_POLICY, 0, step - rollout.token_versions),
        advantages=advantages.astype(np.float32),
        pg_weight=(policy_weights(routed, config.algorithm, step) / denominator).astype(np.float32),
        route_positions=_joined([tokens.positions for tokens in added]).astype(np.int64),
        route_index=_joined([np.full(len(tokens.positions), tokens.route) for tokens in added]).astype(np.int64),
        route_weight=_joined([weights[tokens.route, routed.key] for tokens in added]).astype(np.float32),
        teacher_row=teacher_row,
        teacher_hidden=hidden,
    )


def _teacher_states(
    routed: RoutedRollout, added: Sequence[RoutedTokens], routes: Sequence[Route], evidence: Evidence
) -> tuple[np.ndarray, np.ndarray]:
    """Index of each row's teacher state, and the states: those of each view once, whatever routes share it."""
    looks = [evidence.rows_of(routed.key, tokens.route) for tokens in added]
    wanted: dict[int, list[np.ndarray]] = {}
    for tokens, (rows, view) in zip(added, looks, strict=True):
        if rows is not None and "states" in routes[tokens.route].reads:
            wanted.setdefault(view, []).append(tokens.positions)
    kept = {view: np.unique(np.concatenate(parts)) for view, parts in wanted.items()}
    starts = dict(zip(kept, np.cumsum([0, *map(len, kept.values())]), strict=False))
    index = [
        starts[view] + np.searchsorted(kept[view], tokens.positions)
        if view in kept and "states" in routes[tokens.route].reads
        else np.full(len(tokens.positions), -1)
        for tokens, (_, view) in zip(added, looks, strict=True)
    ]
    states = []
    for view, positions in kept.items():
        rows = evidence.teacher_rows[routed.key, view]
        states.append(rows.hidden[np.searchsorted(rows.positions, positions)])
    return _joined(index).astype(np.int64), np.concatenate(states) if states else np.zeros((0, 0), dtype=np.float32)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([_NO_ROWS, *parts])
