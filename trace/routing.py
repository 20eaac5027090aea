"""Which tokens take which route, and the advantage of every rollout.

Decides for every response token whether it is trained with the policy gradient, the action of a route, or both. Must
not know how actions work, token weights or denominators (`trace_rl.training_batch`); no tensor of a model is touched.

Invariants: with no active route the result is that of the plain policy gradient, bit for bit; a token belongs to at
most one exclusive route; nothing depends on the order in which rollouts arrive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

from trace_rl.actions import AdvantageAction
from trace_rl.batch import (
    AnnotatedRollout,
    GroupMember,
    RolloutKey,
    RoutedRollout,
    RoutedTokens,
    ScoredTokens,
    SpanClass,
    TeacherOutput,
)
from trace_rl.config.algorithm import Algorithm, Route
from trace_rl.config.run import RunConfig
from trace_rl.prompts import TeacherView, derive_seed
from trace_rl.selectors import Top
from trace_rl.token_scores import keep_top


def active_span_classes(config: RunConfig, step: int) -> frozenset[SpanClass]:
    """Classes of spans that any route asks for at this step; empty means that nobody needs to annotate."""
    routes = config.algorithm.routes.values()
    return frozenset().union(*(r.span_classes(config.teacher.context) for r in routes if r.is_active(step)))


def teacher_views(config: RunConfig, step: int) -> list[TeacherView]:
    """The ways in which active routes look at the teacher; routes that look alike share one."""
    found: dict[tuple[str, float], list[int]] = {}
    routes = list(config.algorithm.routes.values())
    for index, route in enumerate(routes):
        if route.is_active(step) and route.reads:
            context = route.teacher_context(config.teacher.context)
            found.setdefault((context.model_dump_json(), route.temperature), []).append(index)
    return [
        TeacherView(
            context=routes[indices[0]].teacher_context(config.teacher.context),
            temperature=temperature,
            routes=frozenset(indices),
            outputs=_union(routes[index].reads for index in indices),
        )
        for (_, temperature), indices in found.items()
    ]


def route_rollouts(
    annotated: Iterable[AnnotatedRollout],
    config: RunConfig,
    step: int,
    known: Mapping[RolloutKey, tuple[RoutedTokens, ...]] = MappingProxyType({}),
) -> list[RoutedRollout]:
    """Give every rollout its advantage and every token its routes, ordered by rollout key.

    Rollouts without a single token, and truncated ones under algorithm.overlong.mask, take part in the statistics of
    their group and are then left out.

    Args:
        annotated: all completions of each of their prompts.
        known: routes that were found before; those of a rollout depend on its prompt and the step alone.
    """
    ordered = sorted(annotated, key=lambda item: item.graded.rollout.key)
    groups = [tuple(group) for _, group in groupby(ordered, key=lambda item: item.graded.rollout.prompt.prompt_id)]
    rewards = [np.array([_shaped_reward(item, config) for item in group]) for group in groups]
    routed = []
    for group, advantages in zip(groups, config.algorithm.advantage.advantages(rewards), strict=True):
        for item, advantage in zip(group, advantages, strict=True):
            rollout = item.graded.rollout
            is_masked = config.algorithm.overlong.mask and rollout.finish_reason == "length"
            if rollout.token_ids and not is_masked:
                member = GroupMember(item, group)
                found = known[rollout.key] if rollout.key in known else _routes(member, config, step)
                routed.append(RoutedRollout(member, float(advantage), found))
    return routed


def keep_top_tokens(
    routed: Sequence[RoutedRollout], candidates: Mapping[int, Mapping[RolloutKey, ScoredTokens]], config: RunConfig
) -> list[RoutedRollout]:
    """Thin out the routes with a token score to the tokens that score highest in the whole batch.

    Args:
        candidates: by route that has a score, then by rollout: its candidate tokens with what the score reads.
    """
    kept: dict[tuple[int, RolloutKey], np.ndarray] = {}
    for index, route in enumerate(config.algorithm.routes.values()):
        tokens = route.selector.tokens
        if isinstance(tokens, Top) and index in candidates:
            scored = list(candidates[index].values())
            masks = keep_top(tokens.score.scores(scored), tokens.frac)
            kept |= {(index, item.member.rollout.key): mask for item, mask in zip(scored, masks, strict=True)}
    thinned = [
        [
            replace(tokens, positions=tokens.positions[kept.get((tokens.route, item.key), slice(None))])
            for tokens in item.routed
        ]
        for item in routed
    ]
    routes = list(config.algorithm.routes.values())
    return [
        replace(item, routed=_without_claimed(parts, routes, item.member.length, is_ranked=True))
        for item, parts in zip(routed, thinned, strict=True)
    ]


def policy_weights(routed: RoutedRollout, algorithm: Algorithm, step: int) -> Float[np.ndarray, " time"]:
    """What the routes leave of the policy gradient on each token of a rollout.

    Actions that change the advantage are not counted: they take what is left into account themselves.
    """
    routes = list(algorithm.routes.values())
    weights = np.ones(routed.member.length)
    for tokens in routed.routed:
        if not isinstance(routes[tokens.route].action, AdvantageAction):
            weights[tokens.positions] *= routes[tokens.route].policy_weight(step)
    return weights


def _routes(member: GroupMember, config: RunConfig, step: int) -> tuple[RoutedTokens, ...]:
    selected = []
    for index, (name, route) in enumerate(config.algorithm.routes.items()):
        if route.is_active(step):
            seed = derive_seed(config.run.seed, "route", name, step, *member.rollout.key)
            positions = route.selector.positions(member, route.teacher_context(config.teacher.context), seed)
            selected.append(RoutedTokens(index, positions, route.schedule.at(step) * route.multiplier))
    routes = list(config.algorithm.routes.values())
    return _without_claimed(selected, routes, member.length, is_ranked=False)


def _without_claimed(
    selected: Iterable[RoutedTokens], routes: Sequence[Route], length: int, is_ranked: bool
) -> tuple[RoutedTokens, ...]:
    """Exclusive routes without the tokens that an earlier one has; routes that are left with nothing are dropped.

    Args:
        selected: of one rollout, in the order of the routes.
        is_ranked: whether routes with a token score hold what they keep. Candidates close nothing to later routes.
    """
    is_claimed = np.zeros(length, dtype=bool)
    left = []
    for tokens in selected:
        route = routes[tokens.route]
        positions = tokens.positions[~is_claimed[tokens.positions]] if route.is_exclusive else tokens.positions
        if route.is_exclusive and (is_ranked or route.score is None):
            is_claimed[positions] = True
        if len(positions):
            left.append(replace(tokens, positions=positions))
    return tuple(left)


def _shaped_reward(item: AnnotatedRollout, config: RunConfig) -> float:
    limit = config.sampling.max_response_tokens
    return item.graded.reward + config.algorithm.overlong.penalty(len(item.graded.rollout.token_ids), limit)


def _union(parts: Iterable[frozenset[TeacherOutput]]) -> frozenset[TeacherOutput]:
    return frozenset().union(*parts)
