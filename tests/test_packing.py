"""Micro-batches: which sequences share one, and where each of their tokens lies."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trace_rl.batch import RolloutKey, TrainingSequence
from trace_rl.errors import DataError
from trace_rl.packing import (
    carries_gradient,
    num_positions,
    num_tokens,
    pack,
    plan_micro_batches,
    split_minibatches,
)
from trace_rl.states import states_array
from trace_rl.token_layout import Padded

PADDED = Padded()
LENGTHS = st.lists(st.integers(2, 40), max_size=30)


def sequence(prompt: list[int], response: list[int], routed: list[int], name: str = "p", advantage: float = 1.0):
    """The routed positions take route 0 with a teacher's state each."""
    time, rows = len(response), len(routed)
    return TrainingSequence(
        key=RolloutKey(name, 0),
        prompt_token_ids=tuple(prompt),
        token_ids=tuple(response),
        rollout_logprobs=-np.arange(1.0, time + 1),
        staleness=np.arange(time)[::-1],
        advantages=np.full(time, advantage),
        pg_weight=np.full(time, 0.25),
        route_positions=np.array(routed, dtype=np.int64),
        route_index=np.zeros(rows, dtype=np.int64),
        route_weight=np.full(rows, 0.5),
        teacher_row=np.arange(rows),
        teacher_hidden=np.array([[10.0 * t, 1.0] for t in routed]).reshape(rows, 2 if routed else 0),
    )


def test_pack_by_hand() -> None:
    # First: prompt of 2, response of 2; second: prompt of 1, response of 4: five columns.
    # Response token t is predicted by column P + t - 1: first row 1, 2; second row (offset 5) 0, 1, 2, 3.
    packed = pack([sequence([7, 8], [1, 2], [1], advantage=-1.0), sequence([9], [3, 4, 5, 6], [0, 3])], PADDED)
    assert packed.grid.input_ids.tolist() == [[7, 8, 1, 2, 0], [9, 3, 4, 5, 6]]
    assert packed.grid.attention_mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert packed.grid.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert packed.row_index.tolist() == [1, 2, 5, 6, 7, 8]
    assert packed.rows.targets.tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.rows.sequence.tolist() == [0, 0, 1, 1, 1, 1] and packed.rows.num_sequences == 2
    assert packed.rows.advantages.tolist() == [-1, -1, 1, 1, 1, 1]
    assert packed.rows.rollout_logprobs.tolist() == [-1, -2, -1, -2, -3, -4]
    # versions behind: 1 and 0; 3, 2, 1 and 0
    assert packed.rows.is_stale.tolist() == [True, False, True, True, True, False]
    assert packed.rows.route_row.tolist() == [1, 2, 5]
    assert packed.rows.route_index.tolist() == [0, 0, 0] and packed.rows.route_weight.tolist() == [0.5] * 3
    assert packed.rows.teacher_row.tolist() == [0, 1, 2]
    assert packed.teacher_hidden.tolist() == [[10, 1], [0, 1], [30, 1]]


def test_rows_of_several_routes_share_states_or_have_none() -> None:
    # First: token 0 takes routes 0 and 1, which share one state, and token 1 takes route 2, which reads no teacher.
    # Second: one row with the second of its two states; the states of the first come before it.
    first = replace(
        sequence([7], [1, 2], []),
        route_positions=np.array([0, 0, 1]),
        route_index=np.array([0, 1, 2]),
        route_weight=np.array([0.5, 0.25, 0.125]),
        teacher_row=np.array([0, 0, -1]),
        teacher_hidden=np.array([[4.0, 5.0]]),
    )
    second = replace(sequence([7], [1, 2], [0, 1]), route_positions=np.array([1]), teacher_row=np.array([1]),
                     route_index=np.array([0]), route_weight=np.array([0.5]))  # fmt: skip
    rows = pack([first, sequence([9], [3], []), second], PADDED).rows
    assert rows.route_row.tolist() == [0, 0, 1, 4]  # 2 + 1 tokens before those of the last one
    assert rows.route_index.tolist() == [0, 1, 2, 0]
    assert rows.route_weight.tolist() == [0.5, 0.25, 0.125, 0.5]
    assert rows.teacher_row.tolist() == [0, 0, -1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_keep_the_precision_in_which_they_were_shipped(dtype: torch.dtype) -> None:
    states = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    first = replace(sequence([7], [1, 2], [1]), teacher_hidden=states_array(states[:1]))
    second = replace(sequence([7], [1, 2], [0, 1]), teacher_hidden=states_array(states[1:]))
    # whoever has no states has none of the teacher's precision either
    packed = pack([first, sequence([9], [3], []), second], PADDED)
    assert packed.teacher_hidden.dtype == dtype and torch.equal(packed.teacher_hidden, states)
    assert packed.rows.teacher_row.tolist() == [0, 1, 2]


def test_constants_are_float32_and_change_precision_together() -> None:
    rows = pack([sequence([7, 8], [1, 2], [1])], PADDED).rows
    precise = rows.to(torch.float64)
    for name, value in vars(rows).items():
        if isinstance(value, torch.Tensor):
            is_real = value.is_floating_point()
            kind = torch.bool if name == "is_stale" else torch.long
            assert value.dtype == (torch.float32 if is_real else kind), name
            assert getattr(precise, name).dtype == (torch.float64 if is_real else kind), name
    assert precise.num_sequences == 1
    assert torch.equal(rows.to(torch.device("cpu")).advantages, rows.advantages)


def test_log_probs_that_are_unknown_stay_so() -> None:
    unknown = replace(sequence([7], [1, 2], []), rollout_logprobs=np.full(2, np.nan, dtype=np.float32))
    rows = pack([unknown, sequence([7], [1], [])], PADDED).rows
    assert rows.rollout_logprobs.isnan().tolist() == [True, True, False]


def test_the_state_that_predicts_a_token_precedes_it() -> None:
    packed = pack([sequence([5, 6, 7], [1, 2], []), sequence([8], [3, 4, 9, 9, 9], [])], PADDED)
    following = packed.grid.input_ids.flatten()[packed.row_index + 1]
    assert torch.equal(following, packed.rows.targets)


def test_empty_pack_has_one_token_and_no_rows() -> None:
    packed = pack([], PADDED)
    assert packed.grid.input_ids.shape == (1, 1) and packed.grid.attention_mask.item() == 1
    assert packed.row_index.numel() == packed.rows.targets.numel() == packed.teacher_hidden.numel() == 0
    assert packed.row_index.dtype == packed.rows.route_row.dtype == torch.long


def test_plan_by_hand() -> None:
    # Longest first, at most 20 padded tokens and 5 % padding above 5: 9 | 8 | 5 | 4 4 | 3 2, where 3 2 is less than a
    # quarter full. Two ranks need an even number: 4 4 is halved. By size: 9 | 8, then 3 2 | 5 dealt in reverse, 4 | 4.
    lengths = [4, 9, 3, 2, 5, 8, 4]
    plan = plan_micro_batches(lengths, 20, 2, PADDED)
    assert plan == (((1,), (4,), (0,)), ((5,), (2, 3), (6,)))
    assert num_positions(plan, lengths, PADDED) == 9 + 8 + 6 + 5 + 4 + 4


def test_fewer_sequences_than_ranks_leaves_ranks_empty() -> None:
    assert plan_micro_batches([5], 10, 3, PADDED) == (((0,),), ((),), ((),))
    assert plan_micro_batches([], 10, 2, PADDED) == (((),), ((),))


def test_a_sequence_over_the_budget_is_refused() -> None:
    with pytest.raises(DataError, match=r"41 tokens.*max_tokens_per_micro_batch"):
        plan_micro_batches([3, 41], 40, 1, PADDED)


@given(LENGTHS, st.integers(40, 200), st.integers(1, 5))
def test_plan_invariants(lengths: list[int], budget: int, ranks: int) -> None:
    plan = plan_micro_batches(lengths, budget, ranks, PADDED)
    assert plan == plan_micro_batches(list(lengths), budget, ranks, PADDED)
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    batches = [batch for rank in plan for batch in rank]
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(lengths)))
    padded = [len(batch) * max((lengths[i] for i in batch), default=0) for batch in batches]
    assert max(padded) <= budget
    assert sum(lengths) <= num_positions(plan, lengths, PADDED) == sum(padded)
    # Micro-batches that run at the same time are neighbours in size: no later slot holds a larger one.
    slots = [[len(b) * max((lengths[i] for i in b), default=0) for b in slot] for slot in zip(*plan, strict=True)]
    assert all(min(now) >= max(later) for now, later in itertools.pairwise(slots))


def test_minibatches_keep_groups_together_and_in_order() -> None:
    names = ["a", "b", "a", "c", "b", "d"]
    sequences = [sequence([1], [n], [], name) for n, name in enumerate(names)]
    parts = split_minibatches(sequences, 2)
    assert [[s.key.prompt_id for s in part] for part in parts] == [["a", "a", "b", "b"], ["c", "d"]]
    assert [s.token_ids for s in parts[0]] == [(0,), (2,), (1,), (4,)]
    assert split_minibatches(sequences[:1], 3) == [sequences[:1]]
    assert sum(num_tokens(s) for part in parts for s in part) == 12


def test_what_has_no_gradient() -> None:
    silent = sequence([1], [2, 3], [], advantage=0.0)
    assert carries_gradient(sequence([1], [2, 3], []), True)
    assert not carries_gradient(silent, True)
    assert carries_gradient(silent, False)  # a policy gradient that does not vanish with the advantage
    assert carries_gradient(sequence([1], [2, 3], [0], advantage=0.0), True)
