"""Answers that are equal, answers that are not, and text that must stay text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_rl.errors import RewardError
from trace_rl.rewards import MAX_ANSWER_CHARS, extract_answer, feedback, grade_text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Step 1: 47 + 38 = 85\nStep 2: 85 - 15 = 70\n\\boxed{70}", "70"),
        ("\\boxed{70.0}", "70"),
        ("\\boxed{ 1{,}234 }", "1,234"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed{2\\sqrt{3}}", "$\\sqrt{12}$"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{\\text{Monday}}", "Monday"),
        ("\\boxed{12\\text{ cm}}", "12"),
        ("first \\boxed{3}, no: \\boxed{4}", "\\boxed{4}"),
        ("\\boxed{4} and \\boxed{broken", "4"),
        ("\\boxed{broken and \\boxed{4}", "4"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("so it costs $18.", "18"),
        ("the answer is \\(\\frac{3}{4}\\).", "0.75"),
        ("half of it, that is 1/2", "0.5"),
        ("he owes 1,250 dollars", "1250"),
        ("from 5 down to -3", "-3"),
    ],
)
def test_equal_answers_earn_one(text: str, answer: str) -> None:
    assert grade_text(text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{71}", "70"),
        ("\\boxed{70, 71}", "70"),
        ("\\boxed{70 \\text{ or } 71}", "70"),
        ("\\boxed{-70}", "70"),
        ("the box decides: \\boxed{7} although 70", "70"),
        ("\\boxed{}", "70"),
        ("", "70"),
        ("no idea", "70"),
        ("70 first, then 71", "70"),
        ("\\boxed{" + "7" * (MAX_ANSWER_CHARS + 1) + "}", "70"),
        ("\\boxed{\\frac{1}{", "70"),
    ],
)
def test_other_answers_earn_nothing(text: str, answer: str) -> None:
    assert grade_text(text, answer) == 0.0


def test_text_is_never_evaluated(tmp_path) -> None:  # type: ignore[no-untyped-def]
    marker = tmp_path / "executed"
    code = f"__import__('os').system('touch {marker}')"
    for text in (code, f"\\boxed{{{code}}}", f"${code}$", f"\\boxed{{[{code}][0] + 1}}", f"1 + {code}"):
        assert grade_text(text, "70") == 0.0
    assert not marker.exists()


@pytest.mark.parametrize("answer", ["", "  ", "\\boxed{}"])
def test_a_reference_that_cannot_be_read_is_an_error_of_the_data(answer: str) -> None:
    with pytest.raises(RewardError, match="reference answer"):
        grade_text("\\boxed{1}", answer)


def test_extraction_prefers_the_last_complete_box() -> None:
    assert extract_answer("\\boxed{\\frac{1}{2}} then 7") == "\\frac{1}{2}"
    assert extract_answer("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert extract_answer("\\fbox {8}") == "8"
    assert extract_answer("a $x + 1$ b 12 c") == "12"
    assert extract_answer("nothing") is None


def test_extraction_is_linear_on_hostile_text() -> None:
    """Each of these has 50,000 openings; a quadratic scan would take minutes."""
    for piece in ("\\boxed{", "\\[", "\\(", "$$a", "{", "1,", "-1/"):
        extract_answer(piece * 50_000)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("\\boxed{}$()[]0123456789+-*/^ \n.,%aé√"), max_size=60))
def test_extraction_takes_any_text(text: str) -> None:
    found = extract_answer(text)
    assert found is None or found in text


@pytest.mark.parametrize(
    ("text", "reward", "cause", "said"),
    [
        ("so \\boxed{5}", 0.0, "graded", "The final answer 5 is not correct."),
        ("I do not know.", 0.0, "graded", "No final answer was found in the response."),
        ("so \\boxed{4}", 1.0, "graded", ""),
        ("and then", 0.0, "truncated", "The response was cut off before it was finished."),
        ("so \\boxed{5}", 0.0, "timeout", ""),
        ("so \\boxed{5}", 0.0, "error", ""),
        ("\\boxed{" + "9" * 500 + "}", 0.0, "graded", f"The final answer {'9' * 60} is not correct."),
    ],
)
def test_feedback_says_what_was_wrong_without_the_reference(text: str, reward: float, cause: str, said: str) -> None:
    assert feedback(text, reward, cause) == said


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("\\boxed{\\text{St. Louis}, \\text{New-York}}", "\\text{New-York}, \\text{St. Louis}", 1.0),
        ("\\boxed{\\text{St. Louis}}", "\\text{St. Paul}", 0.0),
        ("\\boxed{a_{n+1} = 2a_{n}}", "a_{n+1} - 2a_{n} = 0", 1.0),
        ("\\boxed{2\\hat{x} + f(y)}", "f(y) + \\hat{x} + \\hat{x}", 1.0),
        ("\\boxed{3\\text{a.b} + 1}", "\\text{a.b} + 2\\text{a.b} + 1", 1.0),
        ("\\boxed{3\\text{a.b} + 1}", "\\text{a-b} + 2\\text{a-b} + 1", 0.0),
    ],
)
def test_names_of_any_kind_are_compared(text: str, answer: str, reward: float) -> None:
    assert grade_text(text, answer) == reward


def test_names_that_could_be_code_are_spelled_otherwise() -> None:
    """sympy compiles the terms of such a series; the name would end this process, or be a list that is called."""
    for name in ("[0for[quit.__class__.__getitem__]in[[exit]]]+quit[0]", "a\rimport\x0cthis\rb"):
        series = f"(\\sum_{{n=0}}^{{\\infty}} \\frac{{\\text{{{name}}}^n}}{{n!}})"
        assert grade_text(f"\\boxed{{{series}}}", "\\sqrt{2}") == 0.0
        assert grade_text("\\boxed{\\sqrt{2}}", series) == 0.0
