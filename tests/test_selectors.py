"""Selectors: filters and token selectors by hand, and what drawn masks promise."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rollouts import annotated, error, key, member

from trace_rl.batch import GroupMember, Span
from trace_rl.contexts import Context
from trace_rl.selectors import Selector, draw_runs, span_mask

NOTHING = Context()


def select(value: object, item: GroupMember, context: Context = NOTHING, seed: int = 0) -> list[int]:
    return Selector.model_validate(value).positions(item, context, seed).tolist()


GROUP = (
    annotated("p", 0, 5, 1.0, key(1, 3)),
    annotated("p", 1, 9, 0.0, error(2, 3), error(6, 8)),
    annotated("p", 2, 9, 0.0),
    annotated("p", 3, 7, 1.0),
)
CORRECT, WRONG, OTHER_WRONG, OTHER_CORRECT = (member(*GROUP, index=index) for index in range(4))
ALONE = member(annotated("q", 0, 4, 0.0, feedback="the answer is wrong"), annotated("q", 1, 4, 0.0))


@pytest.mark.parametrize(
    ("rollouts", "accepted"),
    [
        ("all", [True] * 5),
        ("correct", [True, False, False, True, False]),
        ("wrong", [False, True, True, False, True]),
        ("mixed_group", [True, True, True, True, False]),
        ("longest_wrong", [False, True, False, False, True]),  # of equal lengths the first sample
        (["wrong", "mixed_group"], [False, True, True, False, False]),
    ],
    ids=str,
)
def test_rollout_filters(rollouts: object, accepted: list[bool]) -> None:
    members = [CORRECT, WRONG, OTHER_WRONG, OTHER_CORRECT, ALONE]
    assert [bool(select({"rollouts": rollouts, "tokens": "all"}, item)) for item in members] == accepted


def test_a_rollout_with_information_is_one_of_which_the_teacher_knows_more() -> None:
    asked = {"rollouts": "has_context", "tokens": "all"}
    sibling = Context(pieces=("sibling_first",))
    either = Context(pieces=("sibling_first", "feedback"), combine="first")
    assert select(asked, WRONG, sibling) and not select(asked, ALONE, sibling)
    assert select(asked, ALONE, either)
    assert select(asked, ALONE)  # a context without pieces asks for nothing


@pytest.mark.parametrize(
    ("tokens", "item", "positions"),
    [
        ("all", CORRECT, [0, 1, 2, 3, 4]),
        ("key_spans", CORRECT, [1, 2]),
        ("error_spans", WRONG, [2, 6, 7]),
        ("suffix_from_error", WRONG, [2, 3, 4, 5, 6, 7, 8]),
        ("suffix_from_error", OTHER_WRONG, []),
        ({"type": "top", "frac": 0.1}, CORRECT, [0, 1, 2, 3, 4]),  # all are candidates
    ],
    ids=str,
)
def test_token_selectors(tokens: object, item: GroupMember, positions: list[int]) -> None:
    rollouts = "correct" if item.graded.is_correct else "wrong"
    assert select({"rollouts": rollouts, "tokens": tokens}, item) == positions


def test_coverage_is_capped_at_a_share_of_the_response() -> None:
    # floor(0.3 x 9) = 2
    assert select({"rollouts": "wrong", "tokens": "suffix_from_error", "max_coverage": 0.3}, WRONG) == [2, 3]
    assert select({"tokens": "all", "max_coverage": 0.1}, CORRECT) == []


def test_a_cap_draws_fewer_tokens_from_the_whole_response() -> None:
    # 4 of 40 tokens are allowed. Of 4000 draws from all 40 each token has 400, with a standard deviation of 19; of
    # those from the 30 outside of the span each has 533, with one of 21.
    item = member(annotated("p", 0, 40, 1.0, key(5, 15)))
    for kind, free in (("random", np.arange(40)), ("inverted", np.r_[0:5, 15:40])):
        asked = {"rollouts": "correct", "tokens": {"type": kind}, "max_coverage": 0.1}
        drawn = [select(asked, item, seed=seed) for seed in range(4000)]
        assert {len(positions) for positions in drawn} == {4}
        counts = np.bincount(np.concatenate(drawn), minlength=40)
        assert (np.abs(counts[free] - 16000 / len(free)) < 110).all()
        assert counts.sum() == counts[free].sum()


def test_a_cap_shortens_the_runs_that_are_drawn() -> None:
    # spans of 6 and 3 tokens, 8 of 100 are allowed: runs of 6 and 2, which may touch
    item = member(annotated("p", 0, 100, 1.0, key(0, 6), key(50, 53)))
    asked = {"rollouts": "correct", "tokens": {"type": "random", "shape": "spans"}, "max_coverage": 0.08}
    for seed in range(50):
        positions = np.array(select(asked, item, seed=seed))
        runs = sorted(len(run) for run in np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1))
        assert runs in ([2, 6], [8])


SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=6)


def with_spans(starts: list[tuple[int, int]], length: int) -> GroupMember:
    """A correct rollout with disjoint key spans."""
    spans, end = [], 0
    for start, width in sorted(starts):
        begin = max(start, end)
        if begin + width <= length:
            spans.append(Span(begin, begin + width, "key", "arith"))
            end = begin + width
    return member(annotated("p", 0, length, 1.0, *spans))


@given(SPANS, st.integers(1, 80), st.integers(0, 2**62), st.sampled_from(["tokens", "spans"]))
def test_drawn_masks_have_the_realised_coverage(
    starts: list[tuple[int, int]], length: int, seed: int, shape: str
) -> None:
    item = with_spans(starts, length)
    covered = span_mask(item, "key")
    drawn = {
        kind: select({"rollouts": "correct", "tokens": {"type": kind, "shape": shape}}, item, seed=seed)
        for kind in ("random", "inverted")
    }
    assert len(drawn["random"]) == covered.sum()
    assert len(drawn["inverted"]) == min(covered.sum(), (~covered).sum())
    assert not covered[drawn["inverted"]].any()


@pytest.mark.parametrize("shape", ["tokens", "spans"])
def test_a_fixed_share_may_be_drawn_instead(shape: str) -> None:
    item = member(annotated("p", 0, 41, 1.0, key(0, 3)))
    tokens = {"type": "random", "frac": 0.25, "shape": shape, "span_tokens": 4}
    found = select({"tokens": tokens}, item, seed=3)
    assert len(found) == 10
    inverted = {**tokens, "type": "inverted"}
    assert not set(select({"rollouts": "correct", "tokens": inverted}, item, seed=3)) & {0, 1, 2}


def test_runs_keep_their_lengths_where_there_is_room() -> None:
    for seed in range(50):
        mask = draw_runs(np.ones(1000, dtype=bool), [7, 4, 1], np.random.default_rng(seed))
        runs = sorted(len(list(run)) for is_taken, run in groupby(mask.tolist()) if is_taken)
        assert sum(runs) == 12
        assert runs == [1, 4, 7] or len(runs) < 3  # neighbours may touch


def test_runs_without_room_are_drawn_as_single_tokens() -> None:
    is_free = np.array([True, False, True, True, False, True])
    mask = draw_runs(is_free, [3], np.random.default_rng(0))
    assert mask.sum() == 3
    assert not mask[~is_free].any()
    assert draw_runs(is_free, [9], np.random.default_rng(0)).tolist() == is_free.tolist()
    assert draw_runs(np.zeros(0, dtype=bool), [2], np.random.default_rng(0)).tolist() == []


def test_single_tokens_are_drawn_uniformly() -> None:
    # 4000 draws of 5 of 20 tokens: each is taken 1000 times, with a standard deviation of 27
    counts = sum(
        draw_runs(np.ones(20, dtype=bool), [1] * 5, np.random.default_rng(seed)).astype(int) for seed in range(4000)
    )
    assert (np.abs(counts - 1000) < 150).all()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"rollouts": "wrong", "tokens": "key_spans"}, "key spans exist on correct rollouts only"),
        ({"rollouts": "correct", "tokens": "error_spans"}, "error spans exist on wrong rollouts only"),
        ({"tokens": "suffix_from_error"}, "error spans exist on wrong rollouts only; set rollouts: wrong"),
        ({"rollouts": "wrong", "tokens": "random"}, "key spans exist on correct rollouts only"),
        ({"tokens": "key_span"}, "did you mean 'key_spans'?"),
        ({"rollouts": "corect", "tokens": "all"}, "rollouts"),
        ({"tokens": "top", "max_coverage": 0.5}, "selector.max_coverage is 0.5, but selector.tokens top ranks"),
    ],
    ids=str,
)
def test_selectors_that_cannot_select_are_refused(value: object, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Selector.model_validate(value)
    assert sentence in str(caught.value)
