"""Layouts: which sequences share a pass, and where each of their tokens lies in it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trace_rl.token_layout import Layout, Packed, Padded, predicting_positions

LAYOUTS = [Padded(), Packed(), Packed(multiple_of=8), Packed(max_sequences=2)]


def test_padded_rows_by_hand() -> None:
    grid = Padded().grid([(7, 8), (9,), (1, 2, 3)])
    assert grid.input_ids.tolist() == [[7, 8, 0], [9, 0, 0], [1, 2, 3]]
    assert grid.attention_mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert grid.position_ids.tolist() == [[0, 1, 2]] * 3
    assert grid.starts == (0, 3, 6) and grid.runs == ()


def test_a_packed_row_by_hand() -> None:
    # 2 + 1 + 3 = 6 tokens; the next multiple of 4 is 8: a tail of 2 that counts as a sequence of its own
    grid = Packed(multiple_of=4).grid([(7, 8), (9,), (1, 2, 3)])
    assert grid.input_ids.tolist() == [[7, 8, 9, 1, 2, 3, 0, 0]]
    assert grid.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    assert grid.position_ids.tolist() == [[0, 1, 0, 0, 1, 2, 0, 1]]
    assert grid.starts == (0, 2, 3) and grid.runs == (2, 1, 3, 2)
    assert Packed().grid([(7, 8)]).runs == (2,)


def test_shards_of_a_packed_row_by_hand() -> None:
    grid = Packed(multiple_of=2).grid([(7, 8), (9, 5)])
    parts = [grid.shard(number, 2) for number in range(2)]
    assert [part.input_ids.tolist() for part in parts] == [[[7, 8]], [[9, 5]]]
    assert [part.position_ids.tolist() for part in parts] == [[[0, 1]], [[0, 1]]]
    assert all(part.runs == (2, 2) for part in parts)


def test_the_state_that_predicts_the_first_token_is_that_of_the_prompts_end() -> None:
    assert predicting_positions(3, np.array([0, 4])).tolist() == [2, 6]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 200))
def test_batches_hold_every_sequence_once_within_the_budget(layout: Layout, lengths: list[int], budget: int) -> None:
    batches = layout.batches(lengths, budget)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[index] for index in batch]
        assert own == sorted(own, reverse=True)
        assert sum(own) <= layout.num_positions(own) < budget + 8
        grid = layout.grid([tuple(range(1, length + 1)) for length in own])
        assert grid.input_ids.numel() == layout.num_positions(own) and int(grid.attention_mask.sum()) == sum(own)
        flat, positions = grid.input_ids.flatten(), grid.position_ids.flatten()
        for start, length in zip(grid.starts, own, strict=True):
            assert torch.equal(flat[start : start + length], torch.arange(1, length + 1))
            assert torch.equal(positions[start : start + length], torch.arange(length))
        if len(batch) > 1:
            halves = layout.halves(batch)
            assert sorted(itertools.chain.from_iterable(halves)) == sorted(batch) and all(halves)


def test_first_fit_by_hand() -> None:
    # longest first, at most 13 together: 7 6, then 5 4 3, then 2
    assert Packed().batches([2, 3, 4, 5, 6, 7], 13) == [[5, 4], [3, 2, 1], [0]]
    assert Packed(max_sequences=1).batches([2, 3], 13) == [[1], [0]]


def test_batches_respect_the_token_budget() -> None:
    # longest first: 12 is over the budget and still goes, alone; 10 and 9 alone; 4 and 4 are 8 <= 10
    assert Padded().batches([10, 4, 9, 4, 12], 10) == [[4], [0], [2], [1, 3]]


def test_batches_are_closed_at_five_percent_padding() -> None:
    # 20 x 10, then 9: 209 of 210 tokens, 0.5 % padding; 5: 214 of 220 are 2.7 %; 3: 217 of 230 would be 5.7 %
    lengths = [10] * 20 + [9, 5, 3]
    assert Padded().batches(lengths, 800) == [[*range(22)], [22]]
    # a quarter of the budget is not reached: what a pass costs outweighs the padding
    assert Padded().batches(lengths, 1000) == [[*range(23)]]
