"""Equations in text: which are found, which are true, and what the rule makes of them."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_rl.batch import Prompt
from trace_rl.tasks.equations import EquationRule, equations

PROMPT = Prompt("q", "question", "70")


def read(text: str) -> list[tuple[str, str, bool]]:
    return [
        (text[found.left.start : found.left.end], text[found.right.start : found.right.end], found.is_true)
        for found in equations(text)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Step 1: 47 + 38 = 85", [("47 + 38", "85", True)]),
        ("85 - 15 = 71.", [("85 - 15", "71", False)]),
        ("2 + 3 * 4 = 14", [("2 + 3 * 4", "14", True)]),  # products first: 2 + 12
        ("12 / 2 * 3 = 18", [("12 / 2 * 3", "18", True)]),  # from the left: 6 * 3
        ("4 - 3 - 1 = 0", [("4 - 3 - 1", "0", True)]),
        ("3 - -2 = 5 and -3 + 5 = 2", [("3 - -2", "5", True), ("-3 + 5", "2", True)]),
        ("0.1 + 0.2 = 0.3", [("0.1 + 0.2", "0.3", True)]),  # exact, unlike floats
        ("10 / 3 = 3.33", [("10 / 3", "3.33", True)]),  # |10/3 - 3.33| = 1/300 <= 1/200
        ("10 / 3 = 3.34", [("10 / 3", "3.34", False)]),  # 1/150 > 1/200
        ("10 / 3 = 3", [("10 / 3", "3", False)]),
        ("2 + 3 = 5 + 4 = 9", [("2 + 3", "5 + 4", False), ("5 + 4", "9", True)]),
        ("2 * 3 + 4 = 6 + 4 = 10", [("2 * 3 + 4", "6 + 4", True), ("6 + 4", "10", True)]),
        ("$5 + $3 = $8 and $2 \\times 3 = 6$", [("$5 + $3", "$8", True), ("$2 \\times 3", "6", True)]),
        ("1,200 - 200 = 1,000", [("1,200 - 200", "1,000", True)]),
        ("<<3 x 4=12>>", [("3 x 4", "12", True)]),
        ("total = 3 ÷ 4 = 0.75", [("3 ÷ 4", "0.75", True)]),
        ("8 − 3 = 5", [("8 − 3", "5", True)]),  # noqa: RUF001
    ],
)
def test_equations_are_found_and_checked(text: str, expected: list[tuple[str, str, bool]]) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "y = 2x + 3 + 4 = 8",
        "2^3 + 1 = 5",
        "(3 + 4) * 2 = 15",
        "2 * (3 + 4) = 15",
        "7 + 1 = 9x",
        "10% of 50 + 5 = 10",
        "20 / 100 = 20%",
        "5 / 0 = 3",
        "3! + 1 = 8",
        "at 12:30 + 1 = 32",
        "85 = 85",
        "1 + 1 =",
        "v1.2 + 3 = 5",
    ],
)
def test_what_may_be_part_of_something_larger_is_left_alone(text: str) -> None:
    assert read(text) == []


def test_error_span_is_the_first_false_equation() -> None:
    text = "Step 1: 47 + 38 = 85\nStep 2: 85 - 15 = 71\nStep 3: 71 + 1 = 73"
    ((start, end, name, importance),) = EquationRule().error_spans(PROMPT, text)
    assert (text[start:end], name, importance) == ("85 - 15 = 71", "arithmetic_slip", 1.0)
    assert EquationRule().error_spans(PROMPT, "1 + 1 = 2, so \\boxed{3}") == []


def test_key_spans_are_true_results_and_the_answer() -> None:
    text = "47 + 38 = 85\n85 - 15 = 71, no: 85 - 15 = 70\n\\boxed{1} \\boxed{70}"
    spans = EquationRule().key_spans(PROMPT, text)
    assert [(text[start:end], name) for start, end, name, _ in spans] == [
        ("85", "arithmetic"),
        ("70", "arithmetic"),
        ("70", "final"),
    ]
    assert {name for _, _, name, _ in spans} <= set(EquationRule.types)
    assert spans[0][3] > spans[-1][3]


numbers = st.integers(0, 10**12)


@given(numbers, st.sampled_from("+-*"), numbers, st.sampled_from("+-*/"), st.integers(1, 999), st.integers(-1, 1))
def test_agrees_with_exact_arithmetic(a: int, first: str, b: int, second: str, c: int, slip: int) -> None:
    value = eval(f"Fraction({a}) {first} Fraction({b}) {second} Fraction({c})", {"Fraction": Fraction}) + slip
    if value.denominator == 1:
        assert [found.is_true for found in equations(f"so {a} {first} {b} {second} {c} = {value}.")] == [slip == 0]


@settings(max_examples=500)
@given(st.text(st.sampled_from("0123456789+-*/=x×÷.,$ \n\\boxedtimesof{}%^()٣²"), max_size=80))  # noqa: RUF001
def test_no_text_raises(text: str) -> None:
    rule = EquationRule()
    for start, end, name, importance in [*rule.key_spans(PROMPT, text), *rule.error_spans(PROMPT, text)]:
        assert 0 <= start <= end <= len(text) and name in rule.types and importance > 0


def test_long_runs_take_linear_time() -> None:
    """A quadratic scan of any of these would take minutes."""
    for piece in ("1+", "1 ", "9", "1,111", "1+1=", "- ", " ", "1 x "):
        list(equations(piece * 50_000))
