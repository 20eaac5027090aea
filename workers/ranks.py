"""The place of one rank among the ranks of the learner, and what ranks that share sequences have to exchange.

Decides which part of a plan a rank works on, and which positions of its micro-batches. Must not know models, losses or
how the groups of ranks are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trace_rl.packing import MicroBatch

ByRoute = list[tuple[int, dict[str, Tensor]]]
"""Route, and named columns with a value for each of its rows."""


@dataclass(frozen=True)
class Ranks:
    """A rank, and how the others are grouped around it.

    Ranks that lie next to each other share their sequences: each has a stretch of the positions of every micro-batch.
    """

    rank: int
    world_size: int
    sequence_parallel: int = 1
    """How many ranks share a sequence."""
    sequence_group: torch.distributed.ProcessGroup | None = None
    """Those ranks, where there are several."""

    @property
    def num_shares(self) -> int:
        """Parts that a batch is planned for."""
        return self.world_size // self.sequence_parallel

    @property
    def share(self) -> int:
        """Which of them this rank works on."""
        return self.rank // self.sequence_parallel

    @property
    def stretch(self) -> int:
        """Which stretch of every row this rank has."""
        return self.rank % self.sequence_parallel

    def shard(self, micro_batch: MicroBatch) -> MicroBatch:
        """This rank's part of a micro-batch of its share."""
        return micro_batch.shard(self.stretch, self.sequence_parallel)

    def joined(self, micro_batch: MicroBatch, values: Float[Tensor, " shard"]) -> Float[Tensor, " row"]:
        """Values of all rows of a whole micro-batch, of which every rank brings those of its shard; collective."""
        if self.sequence_parallel == 1:
            return values
        is_mine = micro_batch.is_in_shard(self.stretch, self.sequence_parallel).to(values.device)
        whole = values.new_zeros(len(is_mine))
        whole[is_mine] = values
        torch.distributed.all_reduce(whole, group=self.sequence_group)
        return whole

    def joined_statistics(self, micro_batch: MicroBatch, by_route: ByRoute) -> ByRoute:
        """The same for columns of values over the rows of each route; columns without rows stay so. Collective."""
        if self.sequence_parallel == 1:
            return by_route
        brought: list[ByRoute] = [[] for _ in range(self.sequence_parallel)]
        mine = [(route, {name: column.cpu() for name, column in columns.items()}) for route, columns in by_route]
        torch.distributed.all_gather_object(brought, mine, group=self.sequence_group)
        rows = micro_batch.rows
        merged: dict[int, dict[str, Tensor]] = {}
        for stretch, part in enumerate(brought):
            is_inside = micro_batch.is_in_shard(stretch, self.sequence_parallel)[rows.route_row]
            for route, columns in part:
                of_route = is_inside[rows.route_index == route]
                whole = merged.setdefault(route, {})
                for name, column in columns.items():
                    whole.setdefault(name, column.new_zeros(len(of_route) if len(column) else 0, *column.shape[1:]))
                    if len(column):
                        whole[name][of_route] = column
        return sorted(merged.items())
