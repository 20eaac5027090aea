"""How training sequences become micro-batches of tensors, the same on every rank.

Decides which sequences share a micro-batch (by padded tokens), which rank runs it, and where the hidden state that
predicts each response token lies: `predicting_positions` is the only place in which the shift between logits and
targets happens, for the learner and the teacher alike.
Must not know the model, the loss or the transport.

Invariants: every rank computes the same plan from the same lengths; every rank gets the same number of micro-batches;
micro-batches that run at the same time have similar sizes; every sequence is in exactly one of them; no weight is
touched, so the sum of the losses does not depend on the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trace_rl.batch import TrainingSequence
from trace_rl.errors import DataError
from trace_rl.objective import LossRows

_MAX_PADDING = 0.05
"""Largest share of padding in a micro-batch that is at least a quarter full."""

Plan = tuple[tuple[tuple[int, ...], ...], ...]
"""[rank][micro-batch] -> indices of sequences; an empty micro-batch only keeps its rank in step with the others."""


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded sequences, the rows that the loss reads, and the loss's constants for them."""

    input_ids: Int[Tensor, "batch time"]
    attention_mask: Int[Tensor, "batch time"]
    position_ids: Int[Tensor, "batch time"]
    row_index: Int[Tensor, " row"]
    """Index into the flattened (batch, time) of the state that predicts each response token."""
    rows: LossRows
    teacher_hidden: Float[Tensor, "state hidden"]

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to a device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, rows=self.rows.to(device), **moved)


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


def split_minibatches(sequences: Sequence[TrainingSequence], count: int) -> list[list[TrainingSequence]]:
    """Split into at most `count` parts of whole prompt groups, in order; parts differ by at most one group."""
    groups: dict[str, list[TrainingSequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.key.prompt_id, []).append(sequence)
    parts = np.array_split(np.arange(len(groups)), count)
    ordered = list(groups.values())
    return [[sequence for index in part for sequence in ordered[index]] for part in parts if len(part)]


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, num_ranks: int) -> Plan:
    """Assign sequences of the given lengths to micro-batches of at most `max_tokens` padded tokens and to ranks.

    Raises:
        DataError: a sequence is longer than `max_tokens`.
    """
    if lengths and max(lengths) > max_tokens:
        raise DataError(
            f"a training sequence has {max(lengths)} tokens, but a micro-batch may have {max_tokens}; "
            "raise learner.max_tokens_per_micro_batch"
        )
    batches = length_batches(lengths, max_tokens)

    def cost(batch: Sequence[int]) -> int:
        return len(batch) * lengths[batch[0]] if batch else 0

    num_slots = max(1, -(-len(batches) // num_ranks))
    while len(batches) < num_slots * num_ranks:
        batches.sort(key=cost, reverse=True)
        divisible = next((batch for batch in batches if len(batch) > 1), None)
        if divisible is None:
            batches.append([])
            continue
        batches.remove(divisible)
        batches += [divisible[: len(divisible) // 2], divisible[len(divisible) // 2 :]]
    batches.sort(key=lambda batch: (-cost(batch), batch))
    slots = [batches[start : start + num_ranks] for start in range(0, len(batches), num_ranks)]
    # Every other slot is dealt in reverse, so that no rank always gets the larger share.
    dealt = [slot if number % 2 == 0 else slot[::-1] for number, slot in enumerate(slots)]
    return tuple(tuple(tuple(slot[rank]) for slot in dealt) for rank in range(num_ranks))


def padded_tokens(plan: Plan, lengths: Sequence[int]) -> int:
    """Positions that the plan's forward passes compute, padding included."""
    return sum(len(batch) * max(lengths[i] for i in batch) for rank in plan for batch in rank if batch)


def predicting_positions(num_prompt_tokens: int, positions: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    """Sequence positions whose states predict response tokens t: P + t - 1 behind a prompt of P tokens."""
    return num_prompt_tokens + np.asarray(positions) - 1


def right_pad(
    sequences: Sequence[tuple[int, ...]],
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Return input ids, attention mask and position ids of token sequences, padded with zeros to the longest."""
    longest = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for number, ids in enumerate(sequences):
        input_ids[number, : len(ids)] = torch.tensor(ids)
        attention_mask[number, : len(ids)] = 1
    # Padding goes on counting: position ids that restart would look like packed sequences to the model.
    return input_ids, attention_mask, torch.arange(longest).expand(len(sequences), longest).contiguous()


def pack(sequences: Sequence[TrainingSequence]) -> MicroBatch:
    """Lay sequences out as one micro-batch; none at all gives one masked-in token and no rows."""
    if not sequences:
        return _empty()
    input_ids, attention_mask, position_ids = right_pad([s.prompt_token_ids + s.token_ids for s in sequences])
    row_index, route_row, teacher_row, num_rows, num_states = [], [], [], 0, 0
    for number, sequence in enumerate(sequences):
        predicting = predicting_positions(len(sequence.prompt_token_ids), np.arange(len(sequence.token_ids)))
        row_index.append(number * input_ids.shape[1] + predicting)
        route_row.append(np.asarray(sequence.route_positions) + num_rows)
        teacher_row.append(np.where(sequence.teacher_row < 0, -1, sequence.teacher_row + num_states))
        num_rows += len(sequence.token_ids)
        num_states += len(sequence.teacher_hidden)
    states = [s.teacher_hidden for s in sequences if len(s.teacher_hidden)]
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        row_index=_long(row_index),
        rows=LossRows(
            targets=_long([np.asarray(s.token_ids) for s in sequences]),
            sequence=_long([np.full(len(s.token_ids), number) for number, s in enumerate(sequences)]),
            num_sequences=len(sequences),
            advantages=_float([s.advantages for s in sequences]),
            rollout_logprobs=_float([s.rollout_logprobs for s in sequences]),
            pg_weight=_float([s.pg_weight for s in sequences]),
            route_row=_long(route_row),
            route_index=_long([s.route_index for s in sequences]),
            route_weight=_float([s.route_weight for s in sequences]),
            teacher_row=_long(teacher_row),
        ),
        teacher_hidden=_float(states) if states else torch.zeros(0, 0),
    )


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, of at most `max_tokens` padded tokens or one sequence.

    A batch is closed where another sequence would make more than 5 % of it padding, unless it would end up less than a
    quarter full: below that what a pass costs beside its tokens outweighs the padding.
    """
    batches: list[list[int]] = []
    used = 0  # tokens of the last batch without padding
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        padded = (len(batches[-1]) + 1) * longest if batches else 0
        is_wasteful = used + lengths[index] < (1 - _MAX_PADDING) * padded and padded - longest >= max_tokens / 4
        if batches and padded <= max_tokens and not is_wasteful:
            batches[-1].append(index)
            used += lengths[index]
        else:
            batches.append([index])
            used = lengths[index]
    return batches


def _empty() -> MicroBatch:
    ids, none, nothing = torch.zeros(1, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    rows = LossRows(
        targets=none,
        sequence=none,
        num_sequences=0,
        advantages=nothing,
        rollout_logprobs=nothing,
        pg_weight=nothing,
        route_row=none,
        route_index=none,
        route_weight=nothing,
        teacher_row=none,
    )
    return MicroBatch(ids, torch.ones_like(ids), torch.zeros_like(ids), none, rows, torch.zeros(0, 0))


def _long(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _float(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))
