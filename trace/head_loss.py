"""The loss from hidden states: the policy gradient of every token and the divergences of routed ones in one pass.

Logits exist as one tile of some rows at a time. For each tile: one head product forward; log-probs, and with them the
slope of every token's term; on routed rows the teacher's logits and the action's gradient; all gradients into one tile;
then one product for the hidden states and one for the head. The gradient is complete when the forward pass ends, so
nothing is kept or computed again for the backward pass. Three products a token is what the policy gradient alone
costs; a routed token adds one for the teacher. Two tiles are allocated, once: the policy's, which its gradient
overwrites, and the teacher's rows of it, which theirs overwrites. Where the products take half precision, the gradient
has half a tile of its own, and the teacher's rows at most the other half.

Objectives in which a token's slope depends on other tokens (`trace_rl.objective.couples_tokens`) take one more head
product.

Numbers are float32, or float64 where the head is; the gradient of the head is accumulated in that precision. Products
of half-precision operands give float32 logits. Must not know models, batches, ranks or schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trace_rl.actions import RoutedRows
from trace_rl.head_tiles import Tile, plan_tiles
from trace_rl.objective import (
    LossRows,
    Objective,
    RouteLoss,
    couples_tokens,
    merge_sums,
    policy_loss,
    route_sums,
)
from trace_rl.row_kernels import RouteEntries, RouteRows, RowKernels, TokenRows, TorchKernels, blocks

DEFAULT_TILE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Projection:
    """Hidden states, and the head that makes logits of them: logits = hidden @ head.T."""

    hidden: Float[Tensor, "row hidden"]
    head: Float[Tensor, "vocab hidden"]

    def rows(self, index: Int[Tensor, " chosen"]) -> Projection:
        """The chosen rows."""
        return Projection(self.hidden[index], self.head)

    def logits(self, into: Tensor | None = None) -> Float[Tensor, "row vocab"]:
        """The logits in at least float32, written into `into` where given."""
        if into is not None and into.dtype != self.precision:
            return into.copy_(self.logits())
        hidden = self.hidden.to(self.head.dtype)
        if self.head.dtype in (torch.float32, torch.float64):
            return torch.mm(hidden, self.head.T, out=into)
        if self.head.is_cuda:
            if into is None:
                return torch.mm(hidden, self.head.T, out_dtype=torch.float32)
            return torch.mm(hidden, self.head.T, out_dtype=torch.float32, out=into)
        return torch.mm(hidden.float(), self.head.float().T, out=into)

    @property
    def precision(self) -> torch.dtype:
        """Of logits, losses and accumulated gradients."""
        return torch.float64 if self.head.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LossParts:
    """The loss and its two parts."""

    total: Float[Tensor, ""]
    """What is trained; the only one that carries a gradient."""
    policy: Float[Tensor, ""]
    routed: Float[Tensor, ""]


def head_loss(
    policy: Projection,
    rows: LossRows,
    objective: Objective,
    teacher: Projection,
    old_logprobs: Float[Tensor, " row"] | None = None,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> tuple[LossParts, dict[str, Tensor]]:
    """Return the loss and its metric sums (names ending in `_max` combine by maximum, others by addition).

    Args:
        policy: the states that predict `rows.targets`; gradients go to its states and its head, each where it
            requires one.
        teacher: the states that `rows.teacher_row` refers to, with the teacher's head; no gradient goes there.
        old_logprobs: see `trace_rl.objective.policy_loss`.
        tile_bytes: size of a tile of logits in float32; the loss does not depend on it.

    Raises:
        ValueError: an action reads a teacher, but its rows have no teacher's state.
    """
    run = _Run(policy, rows, objective, teacher, old_logprobs, tile_bytes)
    if torch.is_grad_enabled():
        total: Tensor = _HeadLoss.apply(policy.hidden, policy.head, run)  # type: ignore[no-untyped-call]
    else:
        total = run.evaluate(needs_hidden=False, needs_head=False)
    zero = total.new_zeros(())
    routed = sum((run.sums[f"{route.name}/loss"] for route in objective.routes), zero)
    return LossParts(total, run.sums["loss/policy_gradient"], routed), run.sums


@torch.no_grad()
def head_logprobs(
    policy: Projection, targets: Int[Tensor, " row"], temperature: float, tile_bytes: int = DEFAULT_TILE_BYTES
) -> Float[Tensor, " row"]:
    """log softmax(logits / temperature)[target] of every row: comparable with the sampler's log-probs."""
    kernels = _kernels(policy)
    parts = [
        kernels.token_rows(policy.rows(index).logits(), targets[index], temperature).logprobs
        for index in row_tiles(torch.arange(len(targets), device=targets.device), policy, tile_bytes)
    ]
    return torch.cat(parts) if parts else policy.hidden.new_zeros(0, dtype=policy.precision)


@torch.no_grad()
def head_statistics(
    policy: Projection,
    rows: LossRows,
    objective: Objective,
    teacher: Projection,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> list[tuple[int, dict[str, Float[Tensor, " row"]]]]:
    """By route: entropy of the policy, divergence, and log-probs of the tokens on both sides, per row of the route.

    Pairs, because ZeRO-3's hooks take the keys of a mapping for names.
    """
    _check_teacher(rows, objective.routes, teacher)
    kernels = _kernels(policy)
    found = []
    for route in objective.routes:
        parts = []
        entries = (rows.route_index == route.index).nonzero().squeeze(-1)
        # a block, not a tile: autograd-free actions still hold several copies of their rows
        for index in row_tiles(entries, policy, tile_bytes // 8):
            token = rows.route_row[index]
            logits, targets = policy.rows(token).logits(), rows.targets[token]
            states = logits[:0]
            if _reads_teacher(route):
                states = teacher.rows(rows.teacher_row[index]).logits()
            routed = RoutedRows(logits, states, targets, route.temperature, torch.ones_like(logits[:, 0]))
            parts.append(
                {
                    "policy_entropy": kernels.token_rows(logits, targets, objective.sampling_temperature).entropy,
                    "divergence": route.ranking.terms(routed).unclipped,
                    "policy_logprobs": kernels.token_rows(logits, targets, route.temperature).logprobs,
                    "teacher_logprobs": kernels.token_rows(states, targets, route.temperature).logprobs
                    if len(states)
                    else logits.new_zeros(0),
                }
            )
        if parts:
            found.append((route.index, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}))
    return found


class _HeadLoss(torch.autograd.Function):
    """Hands the gradient that the forward pass has computed to the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, run: _Run) -> Tensor:
        total = run.evaluate(*ctx.needs_input_grad[:2])
        ctx.gradients = run.hidden_gradient, run.head_gradient
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (scale,) = upstream
        hidden, head = (None if gradient is None else gradient.mul_(scale) for gradient in ctx.gradients)
        ctx.gradients = None, None
        return hidden, head, None


class _Run:
    """One evaluation of the loss: its gradients, and its metric sums."""

    hidden_gradient: Tensor | None = None
    head_gradient: Tensor | None = None

    def __init__(
        self,
        policy: Projection,
        rows: LossRows,
        objective: Objective,
        teacher: Projection,
        old_logprobs: Tensor | None,
        tile_bytes: int,
    ) -> None:
        _check_teacher(rows, objective.routes, teacher)
        self._policy = Projection(policy.hidden.detach(), policy.head.detach())
        self._teacher = teacher
        self._rows = rows
        self._objective = objective
        self._old = old_logprobs
        self._kernels = _kernels(policy)
        self._gradient_dtype = policy.head.dtype if policy.head.is_cuda else policy.precision
        size = _rows_per_tile(policy, tile_bytes)
        # in half precision the gradient takes half of the second tile
        room = size if self._gradient_dtype == policy.precision else max(1, size // 2)
        # those that read a teacher first, so that its rows of a tile are one product
        self._routes = sorted(objective.routes, key=lambda route: not _reads_teacher(route))
        self._tiles = plan_tiles(rows, self._routes, size, room)
        self._couples = couples_tokens(objective, old_logprobs is None)
        nothing = self._policy.hidden.new_zeros(0, dtype=policy.precision)
        self.sums = {"entropy": nothing.sum(), **self._slopes(nothing, 0, 0)[1]}
        for route in objective.routes:
            zeros = route_sums(*[nothing] * 6)
            self._add_route(route, zeros)

    @torch.no_grad()
    def evaluate(self, needs_hidden: bool, needs_head: bool) -> Float[Tensor, ""]:
        policy = self._policy
        if needs_hidden:
            self.hidden_gradient = torch.zeros_like(policy.hidden)
        if needs_head:
            self.head_gradient = torch.zeros_like(policy.head, dtype=policy.precision)
        self._allocate_tiles()
        slopes = self._all_slopes() if self._couples else None
        for tile in self._tiles:
            logits = self._logits(tile)
            found = self._token_rows(logits, tile)
            if slopes is None:
                slope = self._add_policy(found, tile)
            else:
                slope = slopes[tile.start : tile.end]
                merge_sums(self.sums, {"entropy": found.entropy.sum()})
            self._add_gradients(logits, found, slope, tile)
        routed = sum((self.sums[f"{route.name}/loss"] for route in self._objective.routes), torch.zeros(()))
        return self.sums["loss/policy_gradient"] + routed

    def _allocate_tiles(self) -> None:
        tokens = max((tile.num_tokens for tile in self._tiles), default=0)
        routed = max((tile.num_routed for tile in self._tiles), default=0)
        head = self._policy.head
        self._policy_tile, self._teacher_tile = (
            head.new_empty(rows, len(head), dtype=self._policy.precision) for rows in (tokens, routed)
        )

    def _logits(self, tile: Tile) -> Float[Tensor, "row vocab"]:
        states = self._policy.hidden[tile.start : tile.end]
        return Projection(states, self._policy.head).logits(self._policy_tile[: tile.num_tokens])

    def _token_rows(self, logits: Tensor, tile: Tile) -> TokenRows:
        targets = self._rows.targets[tile.start : tile.end]
        return self._kernels.token_rows(logits, targets, self._objective.sampling_temperature)

    def _all_slopes(self) -> Float[Tensor, " row"]:
        """Slopes of all tokens, where they depend on each other."""
        parts = [self._token_rows(self._logits(tile), tile).logprobs for tile in self._tiles]
        logprobs = torch.cat(parts) if parts else self._policy.hidden.new_zeros(0, dtype=self._policy.precision)
        slopes, sums = self._slopes(logprobs, 0, len(logprobs))
        merge_sums(self.sums, sums)
        return slopes

    def _add_policy(self, found: TokenRows, tile: Tile) -> Float[Tensor, " row"]:
        slope, sums = self._slopes(found.logprobs, tile.start, tile.end)
        merge_sums(self.sums, {"entropy": found.entropy.sum(), **sums})
        return slope

    def _slopes(self, logprobs: Tensor, start: int, end: int) -> tuple[Float[Tensor, " row"], dict[str, Tensor]]:
        """Derivative of the policy-gradient part with respect to each log-prob, and its metric sums."""
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            old = None if self._old is None else self._old[start:end]
            loss, sums = policy_loss(leaf, old, self._rows.tokens(start, end), self._objective)
            (slope,) = torch.autograd.grad(loss, leaf)
        return slope, sums

    def _add_gradients(
        self, logits: Float[Tensor, "row vocab"], found: TokenRows, slope: Float[Tensor, " row"], tile: Tile
    ) -> None:
        needs_gradient = self.hidden_gradient is not None or self.head_gradient is not None
        second, used = self._teacher_tile[: tile.num_routed], 0
        num_states = self._project_teacher(tile, second)
        for route, index in zip(self._routes, tile.entries, strict=True):
            if len(index):
                mine = slice(used, used + len(index))
                states = second[:num_states][mine]
                self._add_route(route, self._route(route, index, logits, states, found.logprobs, tile, second[mine]))
                used += len(index)
        if not needs_gradient or (not used and not slope.any()):
            return
        gradient = self._kernels.policy_gradient(
            logits,
            self._rows.targets[tile.start : tile.end],
            self._objective.sampling_temperature,
            found.normaliser,
            slope,
            self._gradient_dtype,
        )
        if used:
            tokens = self._rows.route_row[torch.cat(tile.entries)] - tile.start
            for first, last in blocks(second):
                gradient.index_add_(0, tokens[first:last], second[first:last].to(gradient.dtype))
        self._multiply(gradient, tile.start, tile.end)

    def _multiply(self, gradient: Float[Tensor, "row vocab"], start: int, end: int) -> None:
        """Gradients of hidden states and head from that of the logits."""
        hidden, head = self._policy.hidden[start:end].to(gradient.dtype), self._policy.head.to(gradient.dtype)
        if self.hidden_gradient is not None:
            self.hidden_gradient[start:end] = gradient @ head
        if self.head_gradient is None:
            return
        if gradient.dtype == self.head_gradient.dtype:
            self.head_gradient.addmm_(gradient.T, hidden)
        else:
            total = self.head_gradient
            torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)

    def _project_teacher(self, tile: Tile, into: Float[Tensor, "entry vocab"]) -> int:
        """Write the logits of the teacher's rows of a tile, and return how many there are."""
        read = [each for route, each in zip(self._routes, tile.entries, strict=True) if _reads_teacher(route)]
        index = torch.cat([self._rows.route_row[:0], *read])
        if len(index):
            self._teacher.rows(self._rows.teacher_row[index]).logits(into[: len(index)])
        return len(index)

    def _route(
        self,
        route: RouteLoss,
        index: Int[Tensor, " entry"],
        logits: Float[Tensor, "row vocab"],
        states: Float[Tensor, "entry vocab"],
        logprobs: Float[Tensor, " row"],
        tile: Tile,
        into: Float[Tensor, "entry vocab"],
    ) -> dict[str, Tensor]:
        """Metric sums of some rows of a route, whose weighted gradient goes into `into`."""
        token = self._rows.route_row[index] - tile.start
        old = logprobs if self._old is None else self._old[tile.start : tile.end]
        weights = self._rows.route_weight[index]
        entries = RouteEntries(
            index=token,
            teacher_logits=states,
            targets=self._rows.targets[tile.start : tile.end][token],
            temperature=route.temperature,
            ratio=torch.exp(logprobs - old)[token],
            weights=weights,
        )
        found: RouteRows = self._kernels.route_gradient(route.action, logits, entries, into)
        return route_sums(
            found.unclipped,
            found.num_clipped_terms,
            found.clipped_teacher_mass,
            found.loss * weights,
            found.teacher_entropy,
            found.teacher_advantage,
        )

    def _add_route(self, route: RouteLoss, sums: dict[str, Tensor]) -> None:
        merge_sums(self.sums, {f"{route.name}/{key}": value for key, value in sums.items()})


def _reads_teacher(route: RouteLoss) -> bool:
    return "states" in route.action.reads | route.ranking.reads


def _check_teacher(rows: LossRows, routes: Sequence[RouteLoss], teacher: Projection) -> None:
    for route in filter(_reads_teacher, routes):
        states = rows.teacher_row[rows.route_index == route.index]
        if len(states) and (not len(teacher.hidden) or bool((states < 0).any())):
            raise ValueError(f"route {route.name} reads a teacher, but some of its rows have no teacher's state")


def row_tiles(index: Int[Tensor, " row"], policy: Projection, tile_bytes: int) -> Iterator[Int[Tensor, " chosen"]]:
    """The rows, as many at a time as have logits of at most `tile_bytes`; at least one."""
    size = _rows_per_tile(policy, tile_bytes)
    return (index[start : start + size] for start in range(0, len(index), size))


def _rows_per_tile(policy: Projection, tile_bytes: int) -> int:
    return max(1, tile_bytes // (len(policy.head) * policy.precision.itemsize))


def _kernels(policy: Projection) -> RowKernels:
    if policy.head.is_cuda and policy.precision == torch.float32:
        from trace_rl.triton_kernels import TritonKernels

        return TritonKernels()
    return TorchKernels()
