"""Which tokens share a tile of logits in the head loss, and which rows of routes come with them.

Decided once, before the first tile, so that a GPU is not waited for at each of them. Must not know logits or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from trace_rl.objective import LossRows, RouteLoss


@dataclass(frozen=True)
class Tile:
    """The tokens [start, end), and the rows of routes whose tokens they are."""

    start: int
    end: int
    entries: tuple[Int[Tensor, " entry"], ...]
    """By route, in the order that was asked for."""

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_routed(self) -> int:
        return sum(map(len, self.entries))


def plan_tiles(rows: LossRows, routes: Sequence[RouteLoss], most_tokens: int, most_routed: int) -> list[Tile]:
    """Tiles that cover all tokens in order, each as large as both limits allow.

    Args:
        most_routed: a token with more rows than that has a tile of its own.
    """
    bounds = _bounds(rows, most_tokens, most_routed)
    tile_of = torch.bucketize(rows.route_row, rows.route_row.new_tensor([end for _, end in bounds]), right=True)
    by_route = []
    for route in routes:
        mine = (rows.route_index == route.index).nonzero().squeeze(-1)
        mine = mine[tile_of[mine].argsort(stable=True)]
        by_route.append(mine.split_with_sizes(torch.bincount(tile_of[mine], minlength=len(bounds)).tolist()))
    return [Tile(start, end, tuple(each[number] for each in by_route)) for number, (start, end) in enumerate(bounds)]


def _bounds(rows: LossRows, most_tokens: int, most_routed: int) -> list[tuple[int, int]]:
    total = len(rows.targets)
    counts = torch.bincount(rows.route_row, minlength=total)[:total].cumsum(0).tolist()
    bounds, start = [], 0
    for end in range(1, total + 1):
        before = counts[start - 1] if start else 0
        is_full = end - start == most_tokens or (end < total and counts[end] - before > most_routed)
        if is_full or end == total:
            bounds.append((start, end))
            start = end
    return bounds
