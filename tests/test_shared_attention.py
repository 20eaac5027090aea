"""Prompts that lie once in a row: what each token sees, and training on such rows against plain torch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learner_harness import Group, batch, gap, load, reference, run_config
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from trace_rl.batch import RolloutKey, TrainingBatch
from trace_rl.errors import ModelError
from trace_rl.packing import Extent, Unit, extent_of, num_tokens, pack, plan_sequences, units_of
from trace_rl.token_layout import Packed, Padded, SharedPrompts, TokenGrid
from trace_rl.workers import shared_attention
from trace_rl.workers.learner import learner_spec
from trace_rl.workers.policy_model import final_hidden

SHARED = SharedPrompts()
TOLERANCE = 1e-6


def with_one_prompt_a_group(item: TrainingBatch, size: int = 3) -> TrainingBatch:
    """The batch in groups of `size` that have the prompt of their first."""
    sequences = []
    for number, each in enumerate(item.sequences):
        first = item.sequences[number - number % size]
        key = RolloutKey(first.key.prompt_id, number % size)
        sequences.append(replace(each, key=key, prompt_token_ids=first.prompt_token_ids))
    return replace(item, sequences=tuple(sequences))


GROUPED = [with_one_prompt_a_group(batch(step, 9)) for step in range(2)]


def seen(grid: TokenGrid) -> list[list[int]]:
    """Places in the row that each token of it sees, in order."""
    assert grid.shared is not None
    found: list[list[int]] = []
    for block in grid.shared.blocks:
        for queries, keys in zip(block.queries.tolist(), block.keys.tolist(), strict=True):
            assert keys[len(keys) - len(queries) :] == queries
            for place in range(len(queries)):
                sees = block.mask[place].tolist() if block.mask is not None else [j <= place for j in range(len(keys))]
                found.append([key for key, is_seen in zip(keys, sees, strict=True) if is_seen])
    return [found[place] for place in grid.shared.places.tolist()]


def test_a_row_by_hand() -> None:
    # prompts 5 6 7 (of two), 8 (of two) and 9 3 (of one); the last token of a prompt is each sequence's own
    sequences = [(5, 6, 7, 1), (8, 2), (5, 6, 7, 3, 4), (9, 3, 1), (8, 1)]
    grid = SHARED.grid(sequences, [3, 1, 3, 2, 1])
    assert grid.input_ids.tolist() == [[5, 6, 7, 1, 7, 3, 4, 8, 2, 8, 1, 9, 3, 1]]
    assert grid.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 0, 1, 0, 1, 2]]
    # the first response begins at 2 behind two shared tokens, the other at 4: counted from 0 and from 2
    assert grid.starts == (0, 7, 2, 11, 9)
    assert seen(grid)[:7] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]]
    assert seen(grid)[7:11] == [[7], [7, 8], [9], [9, 10]]


FAMILIES = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=12
)  # length of a prompt, which prompt of that length, and length of the response


@given(FAMILIES)
def test_each_token_sees_its_own_sequence_and_nothing_else(families: list[tuple[int, int, int]]) -> None:
    prompts = [tuple(10 * which + i for i in range(length)) for length, which, _ in families]
    sequences = [
        prompt + tuple(range(100 * (number + 1), 100 * (number + 1) + response))
        for number, (prompt, (_, _, response)) in enumerate(zip(prompts, families, strict=True))
    ]
    grid = SHARED.grid(sequences, [len(prompt) for prompt in prompts])
    row, positions, sees = grid.input_ids[0].tolist(), grid.position_ids[0].tolist(), seen(grid)
    for start, ids, prompt in zip(grid.starts, sequences, prompts, strict=True):
        for place in range(max(0, len(prompt) - 1), len(ids)):
            assert tuple(row[index] for index in sees[start + place]) == ids[: place + 1]
            assert positions[start + place] == place
    extents = [
        Extent(prompt, len(prompt), response) for prompt, (_, _, response) in zip(prompts, families, strict=True)
    ]
    assert sum(unit.length for unit in units_of(extents, 999, SHARED)) == len(row)


def test_units_by_hand() -> None:
    # a prompt of 4 lies there as 3 tokens: 4 + 2, then 1 + 2 and 1 + 5 more
    extents = [Extent("a", 4, 2), Extent("b", 2, 3), Extent("a", 4, 2), Extent("a", 4, 5)]
    assert units_of(extents, 100, SHARED) == [Unit((0, 2, 3), 15), Unit((1,), 5)]
    assert units_of(extents, 10, SHARED) == [Unit((0, 2), 9), Unit((3,), 9), Unit((1,), 5)]
    assert units_of(extents, 100, Packed()) == [Unit((0,), 6), Unit((1,), 5), Unit((2,), 6), Unit((3,), 9)]


def test_groups_are_divided_where_a_rank_would_have_nothing_by_hand() -> None:
    # three behind a prompt of 4, and one more sequence: 15 and 5 tokens
    extents = [Extent("a", 4, 2), Extent("b", 2, 3), Extent("a", 4, 2), Extent("a", 4, 5)]
    assert plan_sequences(extents, 100, 1, SHARED).plan == (((0, 2, 3, 1),),)
    assert plan_sequences(extents, 100, 2, SHARED).plan == (((0, 2, 3),), ((1,),))
    # for three ranks the first is divided: 6 tokens, and 3 + 3 + 6
    assert plan_sequences(extents, 100, 3, SHARED).plan == (((2, 3),), ((0,),), ((1,),))
    found = plan_sequences(extents, 100, 5, SHARED)
    assert [len(rank[0]) for rank in found.plan] == [1, 1, 1, 1, 0] and found.num_laid == 6 + 5 + 6 + 9


def test_a_plan_counts_a_shared_prompt_once() -> None:
    sequences, extents = GROUPED[0].sequences, [extent_of(each) for each in GROUPED[0].sequences]
    whole = plan_sequences(extents, 1000, 1, SHARED)
    laid = sum(map(num_tokens, sequences)) - sum(
        2 * (len(sequences[number].prompt_token_ids) - 1) for number in (0, 3, 6)
    )
    assert whole.num_laid == whole.num_positions == laid
    assert pack(sequences, SHARED).grid.input_ids.numel() == laid
    # a group of three for each rank, the others' group divided or not: nobody has nothing, and each passes 64 at most
    dealt = plan_sequences(extents, 64, 2, SHARED).plan
    assert sorted(index for rank in dealt for each in rank for index in each) == [*range(9)]
    assert all(batch for rank in dealt for batch in rank)
    assert all(pack([sequences[i] for i in batch], SHARED).grid.input_ids.numel() <= 64 for r in dealt for batch in r)
    # of one group each of two ranks has a part
    one = plan_sequences(extents[:3], 1000, 2, SHARED).plan
    assert sorted(len(rank[0]) for rank in one) == [1, 2]


@given(FAMILIES, st.integers(1, 5), st.integers(12, 60))
def test_plans_hold_every_sequence_once_within_the_budget(
    families: list[tuple[int, int, int]], num_ranks: int, budget: int
) -> None:
    extents = [Extent((length, which), length, response) for length, which, response in families]
    found = plan_sequences(extents, budget, num_ranks, SHARED)
    assert sorted(index for rank in found.plan for part in rank for index in part) == [*range(len(families))]
    assert len({len(rank) for rank in found.plan}) == 1 and len(found.plan) == num_ranks
    sequences = [tuple(10 * which + i for i in range(length)) + (99,) * n for length, which, n in families]
    laid = 0
    for indices in (part for rank in found.plan for part in rank if part):
        grid = SHARED.grid([sequences[index] for index in indices], [families[index][0] for index in indices])
        assert grid.input_ids.numel() <= budget
        laid += grid.input_ids.numel()
    assert laid <= found.num_laid == found.num_positions <= sum(extent.length for extent in extents)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_states_and_gradients_are_those_of_padded_rows(model_path: str, is_checkpointed: bool) -> None:
    sequences = GROUPED[0].sequences
    direction = torch.randn(sum(len(s.token_ids) for s in sequences), 64, dtype=torch.float64)

    def run(layout: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        policy = load(model_path).train()
        if layout.shares_prompts:
            shared_attention.prepare(policy)
        policy.double()
        if is_checkpointed:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        packed = pack(sequences, layout)
        states = final_hidden(policy, packed.grid).flatten(0, 1)[packed.row_index]
        (states * direction).sum().backward()
        return states.detach(), [each.grad for each in policy.model.parameters()]

    (expected, gradients), (found, others) = run(Padded()), run(SHARED)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for one, other in zip(gradients, others, strict=True):  # transformers computes norms in float32 here, too
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6 * float(one.abs().max()))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("world_size", "zero_stage", "more"),
    [
        (1, 0, {}),
        (1, 2, {}),
        (2, 1, {}),
        (2, 3, {}),
        (2, 2, {"gradient_checkpointing": True}),
        (1, 2, {"max_tokens_per_micro_batch": 1000}),
    ],
)
def test_steps_equal_plain_torch(
    groups: dict[int, Group], model_path: str, world_size: int, zero_stage: int, more: dict[str, Any]
) -> None:
    weights, _, norms = reference(model_path, GROUPED)
    config = run_config(model_path, world_size=world_size, zero_stage=zero_stage, layout="shared", **more)
    group = groups[world_size].build(learner_spec(config))
    reports = group.train(GROUPED)
    assert [norm for report in reports for norm in report.grad_norms] == pytest.approx(norms, rel=1e-5)
    assert gap(group.weights(), weights) <= TOLERANCE
    assert all(report.padding_frac == 0 and report.shared_frac > 0.1 for report in reports)


@pytest.mark.engine
def test_several_optimizer_steps_and_figures_read_shared_prompts(groups: dict[int, Group], model_path: str) -> None:
    def of(layout: str) -> tuple[Any, list[Any], list[np.ndarray]]:
        config = run_config(model_path, zero_stage=2, layout=layout, minibatches_per_step=2)
        group = groups[1].build(learner_spec(config))
        first, second = GROUPED
        group.train([first])
        inspected: list[Any] = group.all("call", "inspect", second)[0]
        logprobs: list[np.ndarray] = group.all("call", "canary_logprobs", [(1, 2, 3, 4), (1, 2, 5)])[
            0
        ]  # prompts of one
        return group.weights(), inspected, logprobs

    (weights, *expected), (others, *found) = of("padded"), of("shared")
    assert gap(others, weights) <= TOLERANCE
    by_key = [{item.key: item for item in items} for items in (expected[0], found[0])]
    assert len(by_key[0]) == 9 and by_key[0].keys() == by_key[1].keys()
    for key, item in by_key[0].items():
        np.testing.assert_allclose(by_key[1][key].policy_logprobs, item.policy_logprobs, atol=1e-4)
        np.testing.assert_allclose(by_key[1][key].policy_entropy, item.policy_entropy, atol=1e-4)
    assert len(expected[1]) == len(found[1]) == 2
    for one, other in zip(expected[1], found[1], strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)


def windowed() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
    )
    return AutoModelForCausalLM.from_config(config)


def test_a_model_with_windows_is_not_prepared() -> None:
    policy = windowed()
    assert shared_attention.prepare(policy).startswith("has layers with a window")
    assert policy.config._attn_implementation == "sdpa"
    assert isinstance(shared_attention.layout_for_reading([policy]), Padded)


def test_a_model_with_an_attention_of_its_own_is_not_prepared(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(model_path)
    monkeypatch.setattr(policy, "set_attn_implementation", lambda name: None)  # as a model that looks nothing up
    assert "where a prompt is shared" in shared_attention.prepare(policy)
    assert isinstance(shared_attention.layout_for_reading([policy]), Padded)


def test_a_model_that_takes_no_other_arguments_is_not_prepared(model_path: str) -> None:
    policy = load(model_path)
    forward = policy.model.forward
    policy.model.forward = lambda input_ids, position_ids, attention_mask=None, use_cache=False: forward(
        input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=use_cache
    )
    assert shared_attention.prepare(policy).startswith("cannot be told which tokens see which")
    assert policy.config._attn_implementation == "sdpa" and not policy.training


def test_of_several_models_all_share_prompts_or_none(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = load(model_path), load(model_path)
    prepare = shared_attention.prepare
    monkeypatch.setattr(
        shared_attention, "prepare", lambda policy: prepare(policy) if policy is first else "does not fit"
    )
    assert isinstance(shared_attention.layout_for_reading([first, second]), Padded)
    assert first.config._attn_implementation == "sdpa"


def test_models_that_are_read_share_prompts_under_torchs_attention(model_path: str) -> None:
    assert shared_attention.layout_for_reading([load(model_path), load(model_path)]) == SHARED
    eager = load(model_path)
    eager.set_attn_implementation("eager")
    assert isinstance(shared_attention.layout_for_reading([eager]), Padded)


@pytest.mark.engine
def test_a_learner_of_such_a_model_says_why(groups: dict[int, Group], tmp_path: Path) -> None:
    windowed().save_pretrained(tmp_path)
    spec = learner_spec(run_config(str(tmp_path), layout="shared"))
    with pytest.raises(
        ModelError, match=r"learner\.layout is shared, but .* has layers with a window .* set learner\.layout=auto"
    ):
        groups[1].build(spec, head=None)


def test_rows_of_another_layout_are_refused(model_path: str) -> None:
    policy = load(model_path)
    shared_attention.prepare(policy)
    with pytest.raises(ModelError, match="rows of another layout"):
        final_hidden(policy, Padded().grid([(1, 2)]))


def test_ranks_that_share_sequences_do_not_share_prompts(model_path: str) -> None:
    with pytest.raises(ValueError, match=r"learner\.layout is shared, but sequences that ranks share"):
        run_config(model_path, layout="shared", world_size=2, sequence_parallel=2)


def test_flash_attention_does_not_share_prompts(model_path: str) -> None:
    config = run_config(model_path, layout="shared")
    as_read = config.model_dump(mode="json")
    as_read["model"]["attention"] = "flash_attention_2"
    with pytest.raises(ValueError, match=r"model\.attention is flash_attention_2; set model\.attention=sdpa"):
        type(config).model_validate(as_read)
