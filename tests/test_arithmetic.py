"""The arithmetic task: questions, split, first errors and the rule's spans."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trace_rl.batch import Prompt
from trace_rl.errors import DataError
from trace_rl.tasks.arithmetic import (
    ERROR_TYPES,
    ArithmeticDifficulty,
    ArithmeticRule,
    Step,
    first_error,
    parse_question,
    question_at,
    split_of,
    write_question,
    write_solution,
)
from trace_rl.tasks.demonstrations import SlipRates, counterfactual_solution, demonstrate

DIFFICULTY = ArithmeticDifficulty()
QUESTION = "Start with 47. Step 1: add 38. Step 2: subtract 15. Step 3: add 20."
# 47 + 38 = 85 carries (7 + 8 = 15); 85 - 15 = 70 does not borrow; 70 + 20 = 90 does not carry.
SOLUTION = "Step 1: 47 + 38 = 85\nStep 2: 85 - 15 = 70\nStep 3: 70 + 20 = 90\n\\boxed{90}"
PROMPT = Prompt("hand/0", QUESTION, "90", SOLUTION)


def test_a_question_reads_as_its_steps() -> None:
    steps = (Step(47, "+", 38, 85), Step(85, "-", 15, 70), Step(70, "+", 20, 90))
    assert parse_question(QUESTION) == steps
    assert write_question(steps) == QUESTION
    assert write_solution(steps) == SOLUTION


@pytest.mark.parametrize(
    ("step", "has_carry"),
    [
        (Step(47, "+", 38, 85), True),
        (Step(41, "+", 38, 79), False),
        (Step(52, "-", 9, 43), True),
        (Step(59, "-", 9, 50), False),
        (Step(60, "+", 50, 110), True),
        (Step(100, "-", 1, 99), True),
    ],
)
def test_carries_and_borrows(step: Step, has_carry: bool) -> None:
    assert step.has_carry is has_carry


# Each case: the wrong text, the line of its first error, the text of the wrong piece, its kind.
FIRST_ERRORS = {
    "wrong result": ("Step 1: 47 + 38 = 75\nStep 2: 75 - 15 = 60\nStep 3: 60 + 20 = 80\n\\boxed{80}", 0, "75", "arith"),
    "wrong result later": ("Step 1: 47 + 38 = 85\nStep 2: 85 - 15 = 71\n", 1, "71", "arith"),
    "start miscopied": ("Step 1: 74 + 38 = 112\n", 0, "74", "copy"),
    "total miscopied": ("Step 1: 47 + 38 = 85\nStep 2: 58 - 15 = 43\n", 1, "58", "copy"),
    "wrong sign": ("Step 1: 47 - 38 = 9\n", 0, "-", "operand"),
    "wrong number": ("Step 1: 47 + 83 = 130\n", 0, "83", "operand"),
    "wrong sign and number": ("Step 1: 47 - 39 = 8\n", 0, "- 39", "operand"),
    "operation left out": ("Step 1: 47 + = 47\nStep 2: 47 - 15 = 32", 0, "Step 1: 47 + = 47", "format"),
    "step left out": ("Step 1: 47 + 38 = 85\nStep 3: 85 + 20 = 105\n", 1, "3", "format"),
    "prose": ("The answer is \\boxed{90}", 0, "The answer is \\boxed{90}", "format"),
    "cut off in a line": ("Step 1: 47 + 38 = 85\nStep 2: 85 -", 1, "Step 2: 85 -", "format"),
    "nothing written": ("", 0, "", "format"),
    "wrong box": (SOLUTION.replace("{90}", "{70}"), 3, "70", "final"),
    "box too early": ("Step 1: 47 + 38 = 85\n\\boxed{85}", 1, "\\boxed{85}", "final"),
    "no box": (SOLUTION.removesuffix("\\boxed{90}"), 3, "", "final"),
    "no box and no line": (SOLUTION.removesuffix("\n\\boxed{90}"), 3, "", "final"),
    "another step": (SOLUTION.replace("\\boxed{90}", "Step 4: 90 + 1 = 91"), 3, "Step 4: 90 + 1 = 91", "final"),
}


@pytest.mark.parametrize("case", FIRST_ERRORS)
def test_the_first_error_is_found_with_its_kind(case: str) -> None:
    text, line, piece, kind = FIRST_ERRORS[case]
    error = first_error(PROMPT, text)
    assert error is not None
    assert (error.line, text[error.char_start : error.char_end], error.kind) == (line, piece, kind)


def test_the_position_of_an_error_counts_characters_of_the_text() -> None:
    # "Step 1: 47 + 38 = 85\n" has 21 characters; the result of line 2 starts after "Step 2: 85 - 15 = " (18).
    assert first_error(PROMPT, "Step 1: 47 + 38 = 85\nStep 2: 85 - 15 = 71") == (1, 39, 41, "arith")


@pytest.mark.parametrize("text", [SOLUTION, SOLUTION + "\n", SOLUTION + " ", SOLUTION.replace("= 70", "= 070")])
def test_a_correct_completion_has_no_error(text: str) -> None:
    assert first_error(PROMPT, text) is None


def test_key_spans_are_the_results_and_carries_count_more() -> None:
    # Lines have 20 characters and a newline: results at 18, 21 + 18 = 39, 42 + 18 = 60, two digits each.
    assert ArithmeticRule().key_spans(PROMPT, SOLUTION) == [
        (18, 20, "arith", 2.0),
        (39, 41, "arith", 1.0),
        (60, 62, "arith", 1.0),
    ]


def test_key_spans_stop_where_a_lucky_completion_goes_wrong() -> None:
    # 85 - 15 = 60 and 60 + 20 = 90: two slips that cancel, so the answer is right and only line 1 is decisive.
    lucky = SOLUTION.replace("= 70", "= 60").replace("70 +", "60 +").replace("= 80", "= 90")
    assert ArithmeticRule().key_spans(PROMPT, lucky) == [(18, 20, "arith", 2.0)]
    assert ArithmeticRule().key_spans(PROMPT, "no steps at all \\boxed{90}") == []


def test_error_spans_mark_the_first_wrong_piece() -> None:
    rule = ArithmeticRule()
    assert rule.error_spans(PROMPT, "Step 1: 47 + 38 = 75\nStep 2: 75 - 99 = 0") == [(18, 20, "arith", 1.0)]
    assert rule.error_spans(PROMPT, "Step 1: 74 + 38 = 112") == [(8, 10, "copy", 1.0)]
    assert rule.error_spans(PROMPT, "Step 1: 47 - 38 = 9") == [(11, 12, "operand", 1.0)]
    assert rule.error_spans(PROMPT, SOLUTION.replace("{90}", "{70}")) == [(70, 72, "final", 1.0)]


@pytest.mark.parametrize("case", ["operation left out", "prose", "nothing written", "no box", "step left out"])
def test_failures_of_form_or_of_nothing_give_no_error_span(case: str) -> None:
    assert ArithmeticRule().error_spans(PROMPT, FIRST_ERRORS[case][0]) == []


def test_the_rule_names_every_kind_with_a_meaning() -> None:
    assert list(ArithmeticRule.types) == ["copy", "operand", "arith", "format", "final"]
    assert all(ArithmeticRule.types.values())


LINES = st.sampled_from(
    [*SOLUTION.split("\n"), "Step 2: 85 - 15 = 7\u0660", "\\boxed{", "", "Step ²: 1 + 1 = 2", "9" * 5000]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.one_of(LINES, st.text(max_size=20))).map("\n".join)))
def test_garbage_is_judged_without_raising(text: str) -> None:
    error = first_error(PROMPT, text)
    rule = ArithmeticRule()
    if error is not None:
        assert 0 <= error.char_start <= error.char_end <= len(text)
        assert error.kind in ERROR_TYPES
    for start, end, kind, importance in [*rule.key_spans(PROMPT, text), *rule.error_spans(PROMPT, text)]:
        assert 0 <= start < end <= len(text)
        assert kind in rule.types
        assert importance > 0


def test_a_number_too_long_for_int_is_compared() -> None:
    assert first_error(PROMPT, "Step 1: 47 + 38 = " + "8" * 10_000) == (0, 18, 10_018, "arith")


@pytest.mark.parametrize(
    "question",
    ["", "What is 1 + 1?", QUESTION + " Think.", "Start with 47.", " " + QUESTION, "Start with 4. Step 1: add x."],
)
def test_a_question_of_another_task_is_refused(question: str) -> None:
    with pytest.raises(DataError, match="not a running sum"):
        first_error(Prompt("x", question, "1"), SOLUTION)


def test_questions_are_a_function_of_their_position() -> None:
    first = [question_at(DIFFICULTY, 3, "train", i) for i in range(50)]
    random.seed(99)
    again = [question_at(DIFFICULTY, 3, "train", i) for i in reversed(range(50))][::-1]
    assert first == again
    assert first[17].prompt_id == "arithmetic/train/17"
    assert question_at(DIFFICULTY, 3, "heldout", 17).prompt_id == "arithmetic/heldout/17"
    assert [p.question for p in first] != [question_at(DIFFICULTY, 4, "train", i).question for i in range(50)]


def test_the_global_generator_is_left_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    question_at(DIFFICULTY, 0, "train", 0)
    assert random.random() == expected


def test_a_known_question_stays_the_same() -> None:
    """Prompt ids name data positions across versions, so the stream must not drift."""
    prompt = question_at(
        ArithmeticDifficulty(min_steps=3, max_steps=5, min_operand=2, max_operand=20, max_total=99, max_start=30),
        0,
        "heldout",
        0,
    )
    assert prompt.question == "Start with 9. Step 1: add 7. Step 2: subtract 2. Step 3: add 19."


def test_train_and_heldout_questions_are_disjoint() -> None:
    train = {question_at(DIFFICULTY, 0, "train", i).question for i in range(15_000)}
    heldout = {question_at(DIFFICULTY, seed, "heldout", i).question for seed in (0, 1) for i in range(2_500)}
    assert len(train) > 14_900
    assert len(heldout) > 4_950
    assert not train & heldout
    assert all(split_of(q) == "train" for q in train)
    assert all(split_of(q) == "heldout" for q in heldout)


@pytest.mark.parametrize(
    "difficulty",
    [
        DIFFICULTY,
        ArithmeticDifficulty(min_steps=8, max_steps=10),
        ArithmeticDifficulty(min_operand=100, max_operand=500, max_total=999, max_start=900),
        ArithmeticDifficulty(min_steps=1, max_steps=1, min_operand=9, max_operand=9, max_total=17, max_start=17),
    ],
)
def test_questions_keep_their_difficulty_and_solutions_are_right(difficulty: ArithmeticDifficulty) -> None:
    rule = ArithmeticRule()
    for index in range(200):
        prompt = question_at(difficulty, 1, "train", index)
        steps = parse_question(prompt.question)
        assert difficulty.min_steps <= len(steps) <= difficulty.max_steps
        assert 1 <= steps[0].left <= difficulty.max_start
        assert all(difficulty.min_operand <= step.operand <= difficulty.max_operand for step in steps)
        assert all(0 <= step.result <= difficulty.max_total for step in steps)
        assert prompt.answer == str(steps[-1].result)
        assert first_error(prompt, prompt.solution) is None
        assert len(rule.key_spans(prompt, prompt.solution)) == len(steps)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"min_steps": 7, "max_steps": 6}, "min_steps=7 exceeds max_steps=6"),
        ({"min_operand": 30, "max_operand": 29}, "min_operand=30 exceeds max_operand=29"),
        ({"max_start": 100}, "max_start=100 exceeds max_total=99"),
        ({"max_operand": 80}, "max_total to at least 2 \\* max_operand - 1 = 159"),
        ({"max_steps": 0}, "max_steps"),
        ({"operands": 3}, "operands"),
    ],
)
def test_a_contradictory_difficulty_is_refused(setting: dict[str, int], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        ArithmeticDifficulty(**setting)


def test_a_split_without_questions_is_an_error() -> None:
    # One step of 1 from 1 gives two questions, add and subtract; both may belong to one split.
    tiny = ArithmeticDifficulty(min_steps=1, max_steps=1, min_operand=1, max_operand=1, max_total=1, max_start=1)
    owned = {split_of("Start with 1. Step 1: subtract 1.")}
    missing = ({"train", "heldout"} - owned).pop()
    with pytest.raises(DataError, match=f"No {missing} question"):
        question_at(tiny, 0, missing, 0)


@pytest.mark.parametrize("kind", list(ERROR_TYPES))
def test_each_kind_of_slip_is_recognised_and_a_label_removes_it(kind: str) -> None:
    none = {"arith_carry": 0.0, "arith_plain": 0.0, "copy": 0.0, "operand": 0.0, "format": 0.0, "final": 0.0}
    names = ("arith_carry", "arith_plain") if kind == "arith" else (kind,)
    rates = SlipRates(**(none | dict.fromkeys(names, 1.0)))
    for index in range(50):
        prompt = question_at(DIFFICULTY, 2, "train", index)
        steps = parse_question(prompt.question)
        slipped = first_error(prompt, demonstrate(steps, rates, (), random.Random(index)))
        assert slipped is not None
        assert slipped.kind == kind
        assert demonstrate(steps, rates, [kind], random.Random(index)) == prompt.solution


def test_demonstrations_slip_at_their_rates() -> None:
    # Only copies slip, with probability 0.1 a line: without a slip go 0.9^n of the completions of n lines.
    rates = SlipRates(arith_carry=0, arith_plain=0, copy=0.1, operand=0, format=0, final=0)
    three = ArithmeticDifficulty(min_steps=3, max_steps=3)
    rng = random.Random(0)
    prompts = [question_at(three, 0, "train", i) for i in range(4000)]
    clean = sum(demonstrate(parse_question(p.question), rates, (), rng) == p.solution for p in prompts)
    assert clean / 4000 == pytest.approx(0.9**3, abs=4 * (0.729 * 0.271 / 4000) ** 0.5)


def test_a_counterfactual_solution_carries_its_replacements_on() -> None:
    prompt = question_at(DIFFICULTY, 0, "train", 0)
    steps = parse_question(prompt.question)
    assert counterfactual_solution(steps, 99, 0.0, random.Random(0)) == prompt.solution
    text = counterfactual_solution(steps, 99, 1.0, random.Random(0))
    lines = [line.split() for line in text.split("\n")[:-1]]
    assert all(line[2] == before[6] for before, line in pairwise(lines))
    assert text.endswith(f"\\boxed{{{lines[-1][6]}}}")
    assert text != prompt.solution
