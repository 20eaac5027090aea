"""Replies become legal spans whatever an annotator says; the oracle speaks the same protocol."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_rl.annotation import (
    AnnotationReply,
    AnnotationRequest,
    SegmentSpan,
    readable_reflection,
    resolve,
    span_budget,
)
from trace_rl.batch import Prompt, Span
from trace_rl.rule_annotators import OracleBackend, rule_reply
from trace_rl.segments import Segment, Segmentation, TokenText, segment
from trace_rl.tasks.arithmetic import ArithmeticRule
from trace_rl.tasks.equations import EquationRule

TYPES = {"slip": "a wrong result", "gap": "a missing step"}
TEN = TokenText("abcdefghij" * 4, tuple(range(41)))
"""40 tokens of one character each; cut below into ten segments of four tokens."""
SEGMENTS = tuple(Segment(i + 1, 4 * i, 4 * i + 4, TEN.text[4 * i : 4 * i + 4]) for i in range(10))


def request(cap: float = 1.0) -> AnnotationRequest:
    return AnnotationRequest(Prompt("p", "question", "1"), "error", SEGMENTS, TYPES, cap)


def reply(*entries: tuple[int, int, str, float]) -> AnnotationReply:
    spans = [SegmentSpan(start=start, end=end, type=name, importance=weight) for start, end, name, weight in entries]
    return AnnotationReply(spans=tuple(spans))


def spans(answer: AnnotationReply, cap: float = 1.0, num_tokens: int = 40) -> list[tuple[int, int, str]]:
    found, _ = resolve(answer, request(cap), TEN, num_tokens)
    return [(span.start, span.end, span.type) for span in found]


def test_segment_numbers_are_inclusive_and_count_from_one() -> None:
    found, audit = resolve(reply((2, 3, "slip", 1.0), (10, 10, "gap", 2.0)), request(), TEN, 40)
    assert found == (Span(4, 12, "error", "slip", 1.0), Span(36, 40, "error", "gap", 2.0))
    assert audit["spans_before_cap"] == audit["spans_after_cap"] == 2
    assert audit["tokens_before_cap"] == audit["tokens_after_cap"] == 12
    assert audit["round_trip_errors"] == 0


def test_invalid_entries_are_dropped_and_counted() -> None:
    answer = reply((0, 1, "slip", 1), (3, 2, "slip", 1), (9, 11, "slip", 1), (-2, -1, "slip", 1), (1, 1, "new", 1))
    found, audit = resolve(answer, request(), TEN, 40)
    assert found == (Span(0, 4, "error", "other", 1.0),)
    assert audit["out_of_range"] == 4 and audit["unknown_types"] == 1


def test_overlaps_merge_and_the_more_important_type_wins() -> None:
    assert spans(reply((1, 3, "slip", 1), (3, 5, "gap", 2))) == [(0, 20, "gap")]
    assert spans(reply((1, 3, "slip", 1), (3, 5, "gap", 1))) == [(0, 20, "slip")]
    assert spans(reply((1, 5, "slip", 1), (2, 2, "gap", 1))) == [(0, 20, "slip")]
    assert spans(reply((1, 3, "slip", 1), (4, 5, "gap", 1))) == [(0, 12, "slip"), (12, 20, "gap")]  # neighbours stay


def test_cap_keeps_by_importance_and_cuts_the_last() -> None:
    """Budget floor(0.25 * 40) = 10: all 4 tokens of segment 9, all 4 of segment 3, then 2 of segment 5."""
    answer = reply((3, 3, "slip", 1), (5, 6, "slip", 1), (9, 9, "gap", 3))
    assert spans(answer, cap=0.25) == [(8, 12, "slip"), (16, 18, "slip"), (32, 36, "gap")]


def test_cap_counts_the_whole_response() -> None:
    """With end-of-sequence the response has 41 tokens, with a long one 48: budgets 10 and 12."""
    answer = reply((1, 10, "slip", 1))
    assert spans(answer, cap=0.25, num_tokens=41) == [(0, 10, "slip")]
    assert spans(answer, cap=0.25, num_tokens=48) == [(0, 12, "slip")]


def test_cap_below_one_token_leaves_nothing() -> None:
    found, audit = resolve(reply((1, 1, "slip", 1)), request(0.02), TEN, 40)
    assert found == () and audit["tokens_before_cap"] == 4 and audit["budget_tokens"] == 0


def test_cap_never_cuts_inside_a_character() -> None:
    """Tokens 1 to 4 write one character; a budget of 3 tokens ends behind token 0."""
    token_text = TokenText("aXb", (0, 1, 1, 1, 1, 2, 3))
    whole = AnnotationRequest(Prompt("p", "q", "1"), "key", (Segment(1, 0, 6, "aXb"),), TYPES, 0.5)
    found, audit = resolve(reply((1, 1, "slip", 1)), whole, token_text, 6)
    assert found == (Span(0, 1, "key", "slip", 1.0),)
    assert audit["round_trip_errors"] == 0


def test_budget_is_exact_where_floats_are_not() -> None:
    assert span_budget(100, 0.29) == 29
    assert span_budget(10, 0.25) == 2
    assert span_budget(3, 0.25) == 0


entries = st.tuples(
    st.integers(-1, 12), st.integers(-1, 12), st.sampled_from(["slip", "gap", "nonsense"]), st.floats(0, 5)
)


@settings(max_examples=500, deadline=None)
@given(st.lists(entries, max_size=8), st.floats(0.01, 1.0), st.integers(40, 44))
def test_spans_are_legal_whatever_is_said(said: list[tuple[int, int, str, float]], cap: float, length: int) -> None:
    found, audit = resolve(reply(*said), request(cap), TEN, length)
    assert sum(span.end - span.start for span in found) == audit["tokens_after_cap"] <= int(cap * length + 1e-9)
    assert audit["tokens_after_cap"] <= audit["tokens_before_cap"]
    assert all(0 <= span.start < span.end <= 40 and span.span_class == "error" for span in found)
    assert all(left.end <= right.start for left, right in pairwise(found))
    assert {span.type for span in found} <= {"slip", "gap", "other"}


def oracle(rule: object, prompt: Prompt, text: str, span_class: str, boundary: str) -> list[tuple[str, str]]:
    """Texts and types of the oracle's spans, with one token a character and no cap."""
    token_text = TokenText(text, tuple(range(len(text) + 1)))
    cuts = segment(token_text, Segmentation(boundary=boundary, min_tokens=1))
    asked = AnnotationRequest(prompt, span_class, cuts, rule.types, 1.0)  # type: ignore[arg-type, attr-defined]
    answer = asyncio.run(OracleBackend(rule).answer(asked)).reply  # type: ignore[arg-type]
    assert AnnotationReply.model_validate_json(answer.model_dump_json()) == answer
    found, audit = resolve(answer, asked, token_text, len(text))
    assert audit["round_trip_errors"] == audit["out_of_range"] == audit["unknown_types"] == 0
    return [(text[span.start : span.end], span.type) for span in found]


RUNNING_SUM = Prompt("p", "Start with 47. Step 1: add 38. Step 2: subtract 15.", "70")


def test_oracle_marks_results_of_a_correct_sum_and_the_first_error_of_a_wrong_one() -> None:
    boundary = r"(?<== )|(?=\n)"
    right = "Step 1: 47 + 38 = 85\nStep 2: 85 - 15 = 70\n\\boxed{70}"
    assert oracle(ArithmeticRule(), RUNNING_SUM, right, "key", boundary) == [("85", "arith"), ("70", "arith")]
    slip = "Step 1: 47 + 38 = 86\nStep 2: 86 - 15 = 70\n\\boxed{70}"
    assert oracle(ArithmeticRule(), RUNNING_SUM, slip, "error", boundary) == [("86", "arith")]


def test_oracle_widens_a_rules_span_to_the_segments_it_touches() -> None:
    text = "We add. Then 2 + 2 = 5. So\n\\boxed{5}"
    assert oracle(EquationRule(), RUNNING_SUM, text, "error", r"(?<=[.]) |\n") == [
        ("Then 2 + 2 = 5. ", "arithmetic_slip")
    ]
    assert oracle(EquationRule(), RUNNING_SUM, text, "key", r"(?<=[.]) |\n") == [("\\boxed{5}", "final")]


def test_oracle_of_an_empty_response_says_nothing() -> None:
    assert oracle(EquationRule(), RUNNING_SUM, "", "error", "\n") == []


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("A sum was  wrong;\nthe rest follows.", "A sum was wrong; the rest follows."),
        ("", ""),
        ("Segment 3 is wrong.", ""),  # a position
        ("It says efghijabcdefghijab where it should not.", ""),  # a quote of 16 characters and more
        ("It says efghij.", "It says efghij."),
        ("word " * 200, ""),
    ],
)
def test_a_reflection_tells_what_went_wrong_and_not_where(said: str, kept: str) -> None:
    assert readable_reflection(AnnotationReply(spans=(), reflection=said), request()) == kept


@pytest.mark.parametrize(
    ("said", "is_kept"),
    [
        ("Ben buys four times as many apples.", False),  # 16 characters and more of the reference solution
        ("ben  BUYS four times as many", False),
        ("The answer should be thirty-six.", False),
        ("The answer should be Thirty-Six, not less.", False),
        ("A step was left out.", True),
    ],
)
def test_a_reflection_tells_nothing_of_the_solution(said: str, is_kept: bool) -> None:
    prompt = Prompt("p", "question", "thirty-six", "First, Ben buys four times as many apples as Ann.")
    asked = AnnotationRequest(prompt, "error", SEGMENTS, TYPES, 1.0)
    assert readable_reflection(AnnotationReply(spans=(), reflection=said), asked) == (said if is_kept else "")


def test_the_oracle_reflects_on_the_first_error_in_the_words_of_its_type() -> None:
    text = "Step 1: 47 + 38 = 86\nStep 2: 86 - 15 = 71\n\\boxed{71}"
    token_text = TokenText(text, tuple(range(len(text) + 1)))
    prompt = Prompt("p", "Start with 47. Step 1: add 38. Step 2: subtract 15.", "70")
    segments = segment(token_text, Segmentation(boundary=r"(?<== )|(?=\n)", min_tokens=1))
    rule = ArithmeticRule()
    asked = AnnotationRequest(prompt, "error", segments, rule.types, 1.0)
    answer = rule_reply(rule, asked)
    assert readable_reflection(answer, asked) == "The first mistake: the result of a sum or difference is wrong."
    right = AnnotationRequest(prompt, "key", segments, rule.types, 1.0)
    assert rule_reply(rule, right).reflection == ""
