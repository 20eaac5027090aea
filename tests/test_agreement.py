"""Agreement of two sets of spans: counted by hand, additive, and silent where nothing can be said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_rl.agreement import Agreement, agreement, agreement_metrics
from trace_rl.batch import Span


def span(start: int, end: int, name: str = "slip") -> Span:
    return Span(start, end, "error", name)


def test_tokens_are_counted_by_hand() -> None:
    """Found 2..6 and 8..10, reference 4..9: tokens 4, 5 and 8 are in both, 2, 3 and 9 found only, 6 and 7 missed."""
    counts = agreement([span(8, 10, "gap"), span(2, 6)], [span(4, 9)], 12)
    assert counts == Agreement(3, 3, 2, same_type=2, has_first=True, is_first_hit=True, is_first_touched=True)
    assert agreement_metrics([counts]) == {
        "compared": 1.0,
        "both_empty": 0.0,
        "precision": 3 / 6,
        "recall": 3 / 5,
        "f1": 6 / 11,
        "type_agreement_frac": 2 / 3,
        "first_error_hit_frac": 1.0,
        "first_error_touched_frac": 1.0,
    }


@pytest.mark.parametrize(
    ("found", "is_hit", "is_touched"),
    [
        ([span(5, 6)], True, True),
        ([span(0, 2), span(5, 6)], False, True),  # something is blamed before the mistake
        ([span(7, 9)], False, False),  # what follows from the mistake is blamed
        ([span(7, 9), span(6, 7)], True, True),  # in any order
        ([span(2, 4)], False, False),  # ends where the mistake begins
        ([], False, False),
    ],
)
def test_the_first_error_is_hit_by_the_first_span_alone(found: list[Span], is_hit: bool, is_touched: bool) -> None:
    counts = agreement(found, [span(10, 12), span(4, 7)], 12)
    assert (counts.is_first_hit, counts.is_first_touched) == (is_hit, is_touched)


def test_responses_add_up_token_by_token() -> None:
    """1 of 1 and 0 of 9 tokens are right: precision is 1/10, not the mean 1/2; the reference has 1 + 4 tokens."""
    one = agreement([span(0, 1)], [span(0, 1, "gap")], 10)
    other = agreement([span(0, 9)], [span(9, 13)], 20)
    metrics = agreement_metrics([one, other])
    assert metrics["precision"] == 1 / 10 and metrics["recall"] == 1 / 5
    assert metrics["type_agreement_frac"] == 0.0 and metrics["first_error_hit_frac"] == 1 / 2


def test_what_nothing_is_known_of_is_left_out() -> None:
    nothing = agreement([], [], 10)
    assert nothing.is_empty and agreement_metrics([nothing, nothing]) == {"compared": 0.0, "both_empty": 2.0}
    assert agreement_metrics([]) == {"compared": 0.0, "both_empty": 0.0}
    missed = agreement_metrics([nothing, agreement([], [span(0, 4)], 10)])
    assert missed == {
        "compared": 1.0,
        "both_empty": 1.0,
        "recall": 0.0,
        "f1": 0.0,
        "first_error_hit_frac": 0.0,
        "first_error_touched_frac": 0.0,
    }
    invented = agreement_metrics([agreement([span(0, 4)], [], 10)])
    assert invented == {"compared": 1.0, "both_empty": 0.0, "precision": 0.0, "f1": 0.0}


def test_spans_of_another_response_are_refused() -> None:
    with pytest.raises(ValueError, match="ends at token 12 of a response of 10 tokens"):
        agreement([span(0, 4)], [span(8, 12)], 10)


borders = st.lists(st.integers(0, 30), max_size=10, unique=True).map(sorted)


@given(borders, borders)
def test_swapping_the_sets_swaps_precision_and_recall(left: list[int], right: list[int]) -> None:
    one, other = ([span(*pair) for pair in zip(cuts[::2], cuts[1::2], strict=False)] for cuts in (left, right))
    there, back = agreement(one, other, 30), agreement(other, one, 30)
    assert there.false_positives == back.false_negatives and there.true_positives == back.true_positives
    assert there.same_type == there.true_positives  # all have the same type
    assert there.is_first_touched >= there.is_first_hit and there.is_first_hit == back.is_first_hit
    itself = agreement(one, one, 30)
    assert itself.false_positives == itself.false_negatives == 0 and itself.is_first_hit == bool(one)
