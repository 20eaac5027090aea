"""How training sequences become micro-batches of tensors, the same on every rank.

Decides which sequences share a micro-batch and which rank runs it; how they lie in it is the layout's.
Must not know the model, the loss or the transport.

Invariants: every rank computes the same plan from the same lengths; every rank gets the same number of micro-batches;
micro-batches that run at the same time have similar sizes; every sequence is in exactly one of them; no weight is
touched, so the sum of the losses does not depend on the plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trace_rl.batch import TrainingSequence
from trace_rl.errors import DataError
from trace_rl.objective import LossRows
from trace_rl.states import states_tensor
from trace_rl.token_layout import Layout, TokenGrid, predicting_positions, shared_length

Plan = tuple[tuple[tuple[int, ...], ...], ...]
"""[rank][micro-batch] -> indices of sequences; an empty micro-batch only keeps its rank in step with the others."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences as the model reads them, the rows that the loss reads, and the loss's constants for them."""

    grid: TokenGrid
    row_index: Int[Tensor, " row"]
    """Index into the flattened (batch, time) of the state that predicts each response token."""
    rows: LossRows
    teacher_hidden: Float[Tensor, "state hidden"]
    """In the precision in which they were shipped."""

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device."""
        return MicroBatch(
            self.grid.to(device), self.row_index.to(device), self.rows.to(device), self.teacher_hidden.to(device)
        )

    def shard(self, number: int, count: int) -> MicroBatch:
        """The part of one of `count` ranks that share every sequence: a stretch of each row's positions.

        The number of positions must be a multiple of `count`. States of the teacher are not divided.
        """
        if count == 1:
            return self
        is_mine = self.is_in_shard(number, count)
        row_index = self.row_index[is_mine] - self._stretch(number, count)[0]
        return MicroBatch(self.grid.shard(number, count), row_index, self.rows.where(is_mine), self.teacher_hidden)

    def is_in_shard(self, number: int, count: int) -> Bool[Tensor, " row"]:
        """Which rows the shard holds."""
        start, end = self._stretch(number, count)
        return (self.row_index >= start) & (self.row_index < end)

    def _stretch(self, number: int, count: int) -> tuple[int, int]:
        size = self.grid.input_ids.shape[1] // count
        return number * size, (number + 1) * size


def num_tokens(sequence: TrainingSequence) -> int:
    """Prompt and response tokens of a sequence."""
    return len(sequence.prompt_token_ids) + len(sequence.token_ids)


def carries_gradient(sequence: TrainingSequence, is_policy_gradient_by_advantage: bool) -> bool:
    """Whether a sequence has a token whose loss can have a gradient.

    Args:
        is_policy_gradient_by_advantage: tokens whose advantage is 0 have no policy gradient.
    """
    policy = sequence.pg_weight * sequence.advantages if is_policy_gradient_by_advantage else sequence.pg_weight
    return bool(np.any(policy) or np.any(sequence.route_weight))


def read_sequences(
    sequences: Sequence[TrainingSequence], is_policy_gradient_by_advantage: bool, measured: Literal["all", "trained"]
) -> tuple[list[TrainingSequence], list[TrainingSequence]]:
    """Those that can have a gradient, and those that cannot and are read all the same.

    Args:
        measured: see `LearnerSettings.measured_sequences`.
    """
    kinds: tuple[list[TrainingSequence], list[TrainingSequence]] = ([], [])
    for sequence in sequences:
        kinds[0 if carries_gradient(sequence, is_policy_gradient_by_advantage) else 1].append(sequence)
    if kinds[0] and measured == "trained":
        kinds[1].clear()
    return kinds


def split_minibatches(sequences: Sequence[TrainingSequence], count: int) -> list[list[TrainingSequence]]:
    """Split into at most `count` parts of whole prompt groups, in order; parts differ by at most one group."""
    groups: dict[str, list[TrainingSequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.key.prompt_id, []).append(sequence)
    parts = np.array_split(np.arange(len(groups)), count)
    ordered = list(groups.values())
    return [[sequence for index in part for sequence in ordered[index]] for part in parts if len(part)]


class Extent(NamedTuple):
    """What a layout has to know of a sequence."""

    prompt: Hashable
    """What the prompt is known by."""
    num_prompt_tokens: int
    num_response_tokens: int

    @classmethod
    def of(cls, prompt: tuple[int, ...], response: Sequence[int]) -> Extent:
        """Of a sequence's token ids."""
        return cls(prompt, len(prompt), len(response))

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.num_prompt_tokens + self.num_response_tokens


@dataclass(frozen=True)
class Unit:
    """Sequences that lie together wherever prompts are shared; elsewhere one sequence."""

    indices: tuple[int, ...]
    length: int
    """Positions that they take, a shared prompt once."""


def units_of(extents: Sequence[Extent], max_tokens: int, layout: Layout) -> list[Unit]:
    """Group sequences that have a prompt in common, if the layout shares it, into units of at most `max_tokens`."""
    if not layout.shares_prompts:
        return [Unit((index,), extent.length) for index, extent in enumerate(extents)]
    by_prompt: dict[Hashable, list[int]] = {}
    for index, extent in enumerate(extents):
        by_prompt.setdefault(extent.prompt, []).append(index)
    units = []
    for members in by_prompt.values():
        taken: list[int] = []
        for index in members:
            if taken and _unit([*taken, index], extents).length > max_tokens:
                units.append(_unit(taken, extents))
                taken = []
            taken.append(index)
        units.append(_unit(taken, extents))
    return units


def _unit(indices: Sequence[int], extents: Sequence[Extent]) -> Unit:
    """Sequences behind one prompt."""
    again = (len(indices) - 1) * shared_length(extents[indices[0]].num_prompt_tokens)
    return Unit(tuple(indices), sum(extents[index].length for index in indices) - again)


def batches_of(extents: Sequence[Extent], max_tokens: int, layout: Layout) -> list[tuple[int, ...]]:
    """Indices of sequences by forward pass, of at most `max_tokens` positions or one sequence."""
    units = units_of(extents, max_tokens, layout)
    return [_members(units, batch) for batch in layout.batches([unit.length for unit in units], max_tokens)]


@dataclass(frozen=True)
class SequencePlan:
    """Who runs which sequences together, and what that computes."""

    plan: Plan
    num_positions: int
    """Of all forward passes, padding included."""
    num_laid: int
    """Of these, all but padding: the tokens of all sequences, a prompt that is shared once."""


def plan_sequences(extents: Sequence[Extent], max_tokens: int, num_ranks: int, layout: Layout) -> SequencePlan:
    """Assign sequences to micro-batches and ranks, those with the same prompt together where the layout shares it.

    Groups are divided, the largest first, where a rank would have nothing to do in a pass.

    Raises:
        DataError: a sequence is longer than `max_tokens`.
    """
    units = units_of(extents, max_tokens, layout)
    plan = plan_micro_batches([unit.length for unit in units], max_tokens, num_ranks, layout)
    for _ in range(num_ranks - 1):  # so many have nothing at most; a half may end up in the room that a batch has left
        divisible = [unit for unit in units if len(unit.indices) > 1]
        if not divisible or all(batch for rank in plan for batch in rank):
            break
        largest = max(divisible, key=lambda unit: unit.length)
        middle = len(largest.indices) // 2
        units.remove(largest)
        units += [_unit(half, extents) for half in (largest.indices[:middle], largest.indices[middle:])]
        plan = plan_micro_batches([unit.length for unit in units], max_tokens, num_ranks, layout)
    lengths = [unit.length for unit in units]
    members = tuple(tuple(_members(units, batch) for batch in rank) for rank in plan)
    return SequencePlan(members, num_positions(plan, lengths, layout), sum(lengths))


def extent_of(sequence: TrainingSequence) -> Extent:
    """Of a sequence that is trained on."""
    return Extent.of(sequence.prompt_token_ids, sequence.token_ids)


def _members(units: Sequence[Unit], batch: Iterable[int]) -> tuple[int, ...]:
    return tuple(index for number in batch for index in units[number].indices)


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, num_ranks: int, layout: Layout) -> Plan:
    """Assign sequences of the given lengths to micro-batches of at most `max_tokens` positions and to ranks.

    Raises:
        DataError: a sequence is longer than `max_tokens`.
    """
    if lengths and max(lengths) > max_tokens:
        raise DataError(
            f"a training sequence has {max(lengths)} tokens, but a micro-batch may have {max_tokens}; "
            "raise learner.max_tokens_per_micro_batch"
        )
    batches = layout.batches(lengths, max_tokens)

    def cost(batch: Sequence[int]) -> int:
        return layout.num_positions([lengths[index] for index in batch])

    num_slots = max(1, -(-len(batches) // num_ranks))
    while len(batches) < num_slots * num_ranks:
        batches.sort(key=cost, reverse=True)
        divisible = next((batch for batch in batches if len(batch) > 1), None)
        if divisible is None:
            batches.append([])
            continue
        batches.remove(divisible)
        batches += layout.halves(divisible)
    batches.sort(key=lambda batch: (-cost(batch), batch))
    slots = [batches[start : start + num_ranks] for start in range(0, len(batches), num_ranks)]
    # Every other slot is dealt in reverse, so that no rank always gets the larger share.
    dealt = [slot if number % 2 == 0 else slot[::-1] for number, slot in enumerate(slots)]
    return tuple(tuple(tuple(slot[rank]) for slot in dealt) for rank in range(num_ranks))


def num_positions(plan: Plan, lengths: Sequence[int], layout: Layout) -> int:
    """Positions that the plan's forward passes compute, padding included."""
    return sum(layout.num_positions([lengths[index] for index in batch]) for rank in plan for batch in rank)


def pack(sequences: Sequence[TrainingSequence], layout: Layout) -> MicroBatch:
    """Lay sequences out as one micro-batch; none at all gives one token and no rows."""
    if not sequences:
        return _empty(layout)
    grid = layout.grid(
        [s.prompt_token_ids + s.token_ids for s in sequences], [len(s.prompt_token_ids) for s in sequences]
    )
    row_index, route_row, teacher_row, num_rows, num_states = [], [], [], 0, 0
    for start, sequence in zip(grid.starts, sequences, strict=True):
        predicting = predicting_positions(len(sequence.prompt_token_ids), np.arange(len(sequence.token_ids)))
        row_index.append(start + predicting)
        route_row.append(np.asarray(sequence.route_positions) + num_rows)
        teacher_row.append(np.where(sequence.teacher_row < 0, -1, sequence.teacher_row + num_states))
        num_rows += len(sequence.token_ids)
        num_states += len(sequence.teacher_hidden)
    states = [s.teacher_hidden for s in sequences if len(s.teacher_hidden)]
    return MicroBatch(
        grid=grid,
        row_index=_long(row_index),
        rows=LossRows(
            targets=_long([np.asarray(s.token_ids) for s in sequences]),
            sequence=_long([np.full(len(s.token_ids), number) for number, s in enumerate(sequences)]),
            num_sequences=len(sequences),
            advantages=_float([s.advantages for s in sequences]),
            rollout_logprobs=_float([s.rollout_logprobs for s in sequences]),
            is_stale=torch.from_numpy(np.concatenate([s.staleness for s in sequences]) > 0),
            pg_weight=_float([s.pg_weight for s in sequences]),
            route_row=_long(route_row),
            route_index=_long([s.route_index for s in sequences]),
            route_weight=_float([s.route_weight for s in sequences]),
            teacher_row=_long(teacher_row),
        ),
        teacher_hidden=states_tensor(np.concatenate(states)) if states else torch.zeros(0, 0),
    )


def _empty(layout: Layout) -> MicroBatch:
    none, nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    rows = LossRows(
        targets=none,
        sequence=none,
        num_sequences=0,
        advantages=nothing,
        rollout_logprobs=nothing,
        is_stale=none.bool(),
        pg_weight=nothing,
        route_row=none,
        route_index=none,
        route_weight=nothing,
        teacher_row=none,
    )
    return MicroBatch(layout.grid([(0,)]), none, rows, torch.zeros(0, 0))


def _long(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _float(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))
