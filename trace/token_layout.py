"""How token sequences lie in the tensors that a model reads: in rows of their own, end to end, or behind their prompt.

Decides which sequences share a forward pass under a budget of positions, and where the hidden state that predicts each
response token lies: `predicting_positions` is the only place in which the shift between logits and targets happens, for
the learner and the teacher alike. Must not know what the sequences mean, nor the model.

Invariant: a state depends on the tokens of its own sequence only, whatever lies around it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

_MAX_PADDING = 0.05
"""Largest share of padding in a batch that is at least a quarter full."""


@dataclass(frozen=True)
class AttentionBlock:
    """Stretches of one row that attention computes at once; a line is padded with its last token, to be thrown away."""

    queries: Int[Tensor, "line time"]
    """Index of each token in the row."""
    keys: Int[Tensor, "line context"]
    """What stands before the queries of a line, then those themselves."""
    mask: Bool[Tensor, "time context"] | None
    """Which key a query sees; none where nothing stands before and each sees those up to itself."""


@dataclass(frozen=True)
class SharedReads:
    """Which tokens of one row see which, where several sequences go on from the same stretch."""

    blocks: tuple[AttentionBlock, ...]
    places: Int[Tensor, " time"]
    """Of each token of the row among the blocks' queries, one block behind the other, line by line."""

    def to(self, device: torch.device) -> SharedReads:
        """Copy to a device."""
        blocks = tuple(
            AttentionBlock(
                each.queries.to(device), each.keys.to(device), None if each.mask is None else each.mask.to(device)
            )
            for each in self.blocks
        )
        return SharedReads(blocks, self.places.to(device))


@dataclass(frozen=True)
class TokenGrid:
    """Token sequences as a model reads them."""

    input_ids: Int[Tensor, "batch time"]
    attention_mask: Int[Tensor, "batch time"]
    """0 at padding. Where sequences lie end to end it is of no use: there `position_ids` restart with each."""
    position_ids: Int[Tensor, "batch time"]
    starts: tuple[int, ...]
    """Index of each sequence's first token in the flattened (batch, time). Where it shares its prompt: from where to
    count for all that follows the shared stretch, the prompt's last token being the first."""
    runs: tuple[int, ...]
    """Lengths of what lies end to end in the one row, a tail of padding last; empty where rows are padded."""
    shared: SharedReads | None = None
    """Where prompts are shared."""

    def to(self, device: torch.device) -> TokenGrid:
        """Copy to a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
            shared=self.shared.to(device) if self.shared else None,
        )

    def shard(self, number: int, count: int) -> TokenGrid:
        """One of `count` equal stretches of a packed row; `starts` and `runs` are still those of the whole row."""
        parts = {
            name: getattr(self, name).chunk(count, dim=1)[number]
            for name in ("input_ids", "attention_mask", "position_ids")
        }
        return replace(self, **parts)


class Layout(ABC):
    """A way to lay sequences out."""

    shares_prompts: ClassVar[bool] = False
    """Whether a prompt that several sequences have lies there once; lengths are then those of such groups."""

    @abstractmethod
    def batches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Indices of sequences in batches of at most `max_tokens` positions or one sequence; longest first in each."""

    @abstractmethod
    def num_positions(self, lengths: Sequence[int]) -> int:
        """Positions that a forward pass over sequences of these lengths computes, padding included."""

    @abstractmethod
    def halves(self, batch: list[int]) -> list[list[int]]:
        """A batch of `batches` in two of similar size."""

    @abstractmethod
    def grid(self, sequences: Sequence[tuple[int, ...]], prompt_lengths: Sequence[int] = ()) -> TokenGrid:
        """The tensors of at least one sequence.

        Args:
            prompt_lengths: how many tokens of each are its prompt; read only where prompts are shared.
        """


class Padded(Layout):
    """A row for each sequence, padded on the right to the longest; batches hold sequences of similar length."""

    def batches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """A batch is closed where another sequence would make more than 5 % of it padding, unless it would end up less
        than a quarter full: below that what a pass costs beside its tokens outweighs the padding.
        """
        batches: list[list[int]] = []
        used = 0  # tokens of the last batch without padding
        for index in _longest_first(lengths):
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

    def num_positions(self, lengths: Sequence[int]) -> int:
        return len(lengths) * max(lengths, default=0)

    def halves(self, batch: list[int]) -> list[list[int]]:
        return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]

    def grid(self, sequences: Sequence[tuple[int, ...]], prompt_lengths: Sequence[int] = ()) -> TokenGrid:
        longest = max(map(len, sequences))
        input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for number, ids in enumerate(sequences):
            input_ids[number, : len(ids)] = torch.tensor(ids)
            attention_mask[number, : len(ids)] = 1
        # Padding goes on counting: position ids that restart would look like packed sequences to the model.
        position_ids = torch.arange(longest).expand(len(sequences), longest).contiguous()
        starts = tuple(range(0, len(sequences) * longest, longest))
        return TokenGrid(input_ids, attention_mask, position_ids, starts, runs=())


@dataclass(frozen=True)
class Packed(Layout):
    """All sequences end to end in one row, without padding between them.

    The attention has to tell them apart by their position ids: flash attention computes each on its own, other kinds
    build a mask and compute the square of the whole row.
    """

    multiple_of: int = 1
    """The row is filled up to a multiple of this many positions."""
    max_sequences: int | None = None
    """Sequences in a row at most."""

    def batches(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """First fit, longest first: at most 22 % more batches than the least possible (Johnson 1973)."""
        batches: list[list[int]] = []
        used: list[int] = []
        most = self.max_sequences or len(lengths)
        for index in _longest_first(lengths):
            length = lengths[index]
            fits = (n for n in range(len(batches)) if used[n] + length <= max_tokens and len(batches[n]) < most)
            number = next(fits, len(batches))
            if number == len(batches):
                batches.append([])
                used.append(0)
            batches[number].append(index)
            used[number] += length
        return batches

    def num_positions(self, lengths: Sequence[int]) -> int:
        return -(-sum(lengths) // self.multiple_of) * self.multiple_of

    def halves(self, batch: list[int]) -> list[list[int]]:
        return [batch[::2], batch[1::2]]

    def grid(self, sequences: Sequence[tuple[int, ...]], prompt_lengths: Sequence[int] = ()) -> TokenGrid:
        lengths = [len(ids) for ids in sequences]
        tail = self.num_positions(lengths) - sum(lengths)
        runs = (*lengths, tail) if tail else tuple(lengths)
        ids = torch.tensor([token for ids in sequences for token in ids] + [0] * tail).unsqueeze(0)
        is_token = torch.ones_like(ids)
        is_token[:, sum(lengths) :] = 0
        position_ids = torch.cat([torch.arange(run) for run in runs]).unsqueeze(0)
        starts = tuple(np.cumsum([0, *lengths[:-1]]).tolist())
        return TokenGrid(ids, is_token, position_ids, starts, runs)


@dataclass(frozen=True)
class SharedPrompts(Packed):
    """End to end in one row, in which a prompt that several sequences begin with lies once, before their responses.

    Each response sees its prompt and itself (arXiv:2506.05433). The prompt's last token, whose state predicts the first
    of the response, is left to each sequence, so that every state that predicts a token lies before that token.
    """

    shares_prompts: ClassVar[bool] = True

    def grid(self, sequences: Sequence[tuple[int, ...]], prompt_lengths: Sequence[int] = ()) -> TokenGrid:
        members: dict[tuple[int, ...], list[int]] = {}
        for number, (ids, length) in enumerate(zip(sequences, prompt_lengths or [0] * len(sequences), strict=True)):
            members.setdefault(ids[:length], []).append(number)
        row: list[int] = []
        positions: list[int] = []
        starts = [0] * len(sequences)
        families: list[_Family] = []
        for prompt, numbers in members.items():
            stem = prompt[: shared_length(len(prompt))] if len(numbers) > 1 else ()
            family = _Family(len(row), len(stem), [])
            row += stem
            for number in numbers:
                rest = sequences[number][len(stem) :]
                starts[number] = len(row) - len(stem)
                family.rests.append((len(row), len(rest)))
                row += rest
            positions += [*range(len(stem)), *(len(stem) + i for _, length in family.rests for i in range(length))]
            families.append(family)
        input_ids = torch.tensor([row])
        return TokenGrid(
            input_ids,
            torch.ones_like(input_ids),
            torch.tensor([positions]),
            tuple(starts),
            (len(row),),
            _shared_reads(families, len(row)),
        )


@dataclass(frozen=True)
class _Family:
    """Where a stem lies in a row, and start and length of what goes on from it."""

    start: int
    length: int
    rests: list[tuple[int, int]]


def shared_length(num_prompt_tokens: int) -> int:
    """Tokens of a prompt that lie there once for all sequences that have it."""
    return max(0, num_prompt_tokens - 1)


def _shared_reads(families: Sequence[_Family], num_tokens: int) -> SharedReads:
    blocks: list[AttentionBlock] = []
    places = torch.zeros(num_tokens, dtype=torch.long)
    offset = 0

    def add(stems: Sequence[int], stem: int, spans: Sequence[tuple[int, int]]) -> None:
        """Lines that see a stem of the same length; spans may differ a little."""
        nonlocal offset
        longest = max(length for _, length in spans)
        queries = torch.empty(len(spans), longest, dtype=torch.long)
        for line, (start, length) in enumerate(spans):
            queries[line] = torch.arange(start, start + longest).clamp(max=start + length - 1)
            places[start : start + length] = torch.arange(length) + offset + line * longest
        offset += queries.numel()
        before = torch.tensor(stems).unsqueeze(1) + torch.arange(stem)
        mask = torch.ones(longest, stem + longest, dtype=torch.bool).tril(stem) if stem else None
        blocks.append(AttentionBlock(queries, torch.cat([before, queries], dim=1), mask))

    for stem in sorted({family.length for family in families}):
        alike = [family for family in families if family.length == stem]
        if stem:
            add([0] * len(alike), 0, [(family.start, stem) for family in alike])
        rests = [(family.start, rest) for family in alike for rest in family.rests]
        lengths = [length for _, (_, length) in rests]
        for batch in Padded().batches(lengths, sum(lengths)):
            add([rests[index][0] for index in batch], stem, [rests[index][1] for index in batch])
    return SharedReads(tuple(blocks), places)


def predicting_positions(num_prompt_tokens: int, positions: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
    """Sequence positions whose states predict response tokens t: P + t - 1 behind a prompt of P tokens."""
    return num_prompt_tokens + np.asarray(positions) - 1


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
