"""What policy and teacher say of single tokens, to be looked at: log-probs, entropies and the most likely tokens.

Goes over the rows in tiles of logits, as `trace_rl.head_loss` does, and takes no gradient. Must not know which rollouts
are looked at, or why.

Invariant: what is said of a row does not depend on the other rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trace_rl.head_loss import DEFAULT_TILE_BYTES, Projection, head_statistics, row_tiles
from trace_rl.objective import LossRows, Objective
from trace_rl.row_kernels import TorchKernels

NUM_CANDIDATES = 5
_COPIES = 8
"""Of a tile that are held at a time."""

Columns = dict[str, Tensor]


@torch.no_grad()
def head_figures(
    policy: Projection,
    rows: LossRows,
    objective: Objective,
    teacher: Projection,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> tuple[Columns, list[tuple[int, Columns]]]:
    """Columns over all tokens, and by route those over its rows.

    Of all tokens `policy_logprobs` and `policy_entropy`, at the sampling temperature. Of a route the columns of
    `trace_rl.head_loss.head_statistics` and, at its temperature, `policy_ids`, `policy_top`, `teacher_ids` and
    `teacher_top`: the most likely tokens and their log-probs [row, candidate], the likeliest first; the last two have
    no rows where the route reads no teacher.
    """
    kernels = TorchKernels()
    found = [
        kernels.token_rows(policy.rows(index).logits(), rows.targets[index], objective.sampling_temperature)
        for index in _parts(len(rows.targets), policy, tile_bytes)
    ]
    tokens = {
        "policy_logprobs": torch.cat([part.logprobs for part in found]),
        "policy_entropy": torch.cat([part.entropy for part in found]),
    }
    temperatures = {route.index: route.temperature for route in objective.routes}
    by_route = []
    for route, statistics in head_statistics(policy, rows, objective, teacher, tile_bytes):
        entries = (rows.route_index == route).nonzero().squeeze(-1)
        states = rows.teacher_row[entries] if len(statistics["teacher_logprobs"]) else entries[:0]
        policy_ids, policy_top = _most_likely(policy.rows(rows.route_row[entries]), temperatures[route], tile_bytes)
        teacher_ids, teacher_top = _most_likely(teacher.rows(states), temperatures[route], tile_bytes)
        top = {"policy_ids": policy_ids, "policy_top": policy_top}
        by_route.append((route, {**statistics, **top, "teacher_ids": teacher_ids, "teacher_top": teacher_top}))
    return tokens, by_route


def _most_likely(
    projection: Projection, temperature: float, tile_bytes: int
) -> tuple[Tensor, Float[Tensor, "row candidate"]]:
    """Ids and log-probs of the most likely tokens of each row."""
    count = min(NUM_CANDIDATES, len(projection.head))
    parts = [
        torch.log_softmax(projection.rows(index).logits() / temperature, -1).topk(count)
        for index in _parts(len(projection.hidden), projection, tile_bytes)
    ]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _parts(count: int, projection: Projection, tile_bytes: int) -> list[Int[Tensor, " chosen"]]:
    """The first `count` rows by tiles; one part without any where there are no rows."""
    every = torch.arange(count, device=projection.hidden.device)
    return list(row_tiles(every, projection, tile_bytes // _COPIES)) or [every]
