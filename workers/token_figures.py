"""Columns of figures over the tokens of a micro-batch, cut into what belongs to each of its rollouts.

Must not know where the figures come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from trace_rl.batch import Candidates, RolloutKey, RouteFigures, TokenFigures, TokenStatistics, TrainingSequence

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
    routes: dict[RolloutKey, list[RouteFigures]] = {sequence.key: [] for sequence in sequences}
    for route, columns in by_route:
        for sequence, mine in split_rows(sequences, route, columns):
            routes[sequence.key].append(_route_figures(sequence, route, mine))
    ends = np.cumsum([len(sequence.token_ids) for sequence in sequences])
    return [
        TokenFigures(
            sequence.key,
            policy_logprobs=per_token["policy_logprobs"][end - len(sequence.token_ids) : end],
            policy_entropy=per_token["policy_entropy"][end - len(sequence.token_ids) : end],
            routes=tuple(routes[sequence.key]),
        )
        for sequence, end in zip(sequences, ends, strict=True)
    ]


def split_rows(
    sequences: Sequence[TrainingSequence], route: int, columns: Columns
) -> list[tuple[TrainingSequence, dict[str, np.ndarray]]]:
    """Cut a route's rows of a micro-batch at the borders of its sequences; those without such rows are left out.

    Args:
        columns: over the rows in the order of the sequences; a column without rows has none for each of them.
    """
    counts = [int((sequence.route_index == route).sum()) for sequence in sequences]
    cuts = np.cumsum(counts)[:-1]
    parts = {
        name: np.split(value.cpu().numpy(), cuts if len(value) else [0] * len(cuts)) for name, value in columns.items()
    }
    return [
        (sequence, {name: part[number] for name, part in parts.items()})
        for number, sequence in enumerate(sequences)
        if counts[number]
    ]


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
