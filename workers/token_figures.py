"""Columns of figures over the tokens of a micro-batch, cut into what belongs to each of its rollouts.

Must not know where the figures come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from trace_rl.batch import Candidates, RouteFigures, TokenFigures, TokenStatistics, TrainingSequence

Columns = Mapping[str, Tensor]


def cut_figures(
    sequences: Sequence[TrainingSequence], tokens: Columns, by_route: Sequence[tuple[int, Columns]]
) -> list[TokenFigures]:
    """The figures of each sequence.

    Args:
        tokens: over the tokens of all sequences in order.
        by_route: over the rows of each route in the order of the sequences; see `trace_rl.head_figures`.
    """
    per_token = {name: column.cpu().numpy() for name, column in tokens.items()}
    per_route = [
        (route, {name: column.cpu().numpy() for name, column in columns.items()}) for route, columns in by_route
    ]
    ends = {route: 0 for route, _ in per_route}
    found, end = [], 0
    for sequence in sequences:
        start, end = end, end + len(sequence.token_ids)
        routes = []
        for route, columns in per_route:
            first, last = ends[route], ends[route] + int((sequence.route_index == route).sum())
            ends[route] = last
            if last > first:
                mine = {name: column[first:last] for name, column in columns.items()}
                routes.append(_route_figures(sequence, route, mine))
        found.append(
            TokenFigures(
                sequence.key,
                policy_logprobs=per_token["policy_logprobs"][start:end],
                policy_entropy=per_token["policy_entropy"][start:end],
                routes=tuple(routes),
            )
        )
    return found


def _route_figures(sequence: TrainingSequence, route: int, columns: Mapping[str, np.ndarray]) -> RouteFigures:
    return RouteFigures(
        statistics=TokenStatistics(
            sequence.key,
            route,
            policy_entropy=columns["policy_entropy"],
            divergence=columns["divergence"],
            policy_logprobs=columns["policy_logprobs"],
            teacher_logprobs=columns["teacher_logprobs"],
        ),
        policy=Candidates(columns["policy_ids"], columns["policy_top"]),
        teacher=Candidates(columns["teacher_ids"], columns["teacher_top"]),
    )
