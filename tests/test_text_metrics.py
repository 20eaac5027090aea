"""Words of the responses: what counts as a leak, what is a false alarm, and the markers of doubt."""

import numpy as np
import pytest

from trace_rl.batch import GradedRollout, Prompt, Rollout
from trace_rl.text_metrics import epistemic_markers, leaks, text_metrics

QUESTION = "What is 2 + 2?"
TYPES = ("missing_case", "arithmetic", "arithmetic_slip", "copy", "format", "final", "other")


def graded(text: str, num_tokens: int, question: str = QUESTION) -> GradedRollout:
    prompt = Prompt("p", question, "4")
    logprobs, versions = np.zeros(num_tokens, dtype=np.float32), np.zeros(num_tokens, dtype=np.int64)
    rollout = Rollout(prompt, 0, (1,), tuple(range(num_tokens)), logprobs, "stop", versions, text)
    return GradedRollout(rollout, 1.0, "graded")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The reference solution says 4.", 1),
        ("According to the reference\n  solution, it is 4, as the REFERENCE ANSWER shows.", 2),
        ("The provided solution uses induction; the given answer is 4.", 2),
        ("That is the ground-truth answer of the answer key.", 2),
        ("according to the solution, x = 1, as stated in the answer", 2),
        ("The hint tells us to factor, and your provided hints agree.", 2),
        ("Take care with signs. Taking care with signs helps.", 2),
        ("The previous attempt failed, and so did both earlier attempts.", 2),
        ("According to the feedback, the provided feedback is complete.", 2),
    ],
)
def test_privileged_context_is_counted_by_mention(text: str, count: int) -> None:
    assert leaks(text, QUESTION, ()) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The solution is 4.",
        "The given answer choices are A and B; the provided answer options differ.",
        "We have provided the solution.",
        "The given numbers have two solutions.",
        "This hints at a contradiction.",
        "My previous attempt was wrong, and our earlier attempts too.",
        "A feedback loop needs care.",
        "I must be careful with signs.",
        "Unreferenced solutions and preference answers",
    ],
)
def test_what_a_student_says_of_its_own_is_no_leak(text: str) -> None:
    assert leaks(text, QUESTION, TYPES) == 0


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (
            "The provided solution is wrong, as the given solution divides by 0.",
            "Is the given solution right? x = x / 0",
        ),
        ("The hint says so.", "Factor x^2 - 1. Hint: use (a - b)(a + b)."),
        ("The previous attempt hit the target.", "Each attempt hits with probability 0.5."),
        ("Based on the feedback we adjust.", "A feedback controller has gain 2."),
        ("Taking care with acids matters.", "Why should one take care with acids?"),
    ],
)
def test_what_the_question_speaks_of_is_no_leak(text: str, question: str) -> None:
    assert leaks(text, question, ()) == 0
    assert leaks(text, QUESTION, ()) > 0


def test_a_question_explains_its_own_kind_only() -> None:
    assert leaks("The hint and the reference solution agree.", "Hint: add.", ()) == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("There is a missing case, and a Missing_Case is a missing-case.", 3),
        ("An arithmetic slip.", 1),
        ("Emissing case, missing cases, missing the case", 0),
        # "take care with" is a mention of its own; only the longer of the two labels is counted behind it
        ("Take care with: arithmetic slip.", 2),
        ("Take care with: missing case, arithmetic slip.", 3),
    ],
)
def test_labels_of_several_words_count_anywhere(text: str, count: int) -> None:
    assert leaks(text, QUESTION, TYPES) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The final answer in the other format is a copy: arithmetic.", 0),
        ("Final check of the format: copy the other number.", 0),
        ("label other vertices and label final states", 0),
        ("error type: format", 1),
        ("The mistake type is 'copy', the hint is final.", 3),  # with "the hint"
        ("Label = (other)", 1),
        ("take care with copy", 2),  # with the wording itself
        ("take care with copying", 1),
    ],
)
def test_labels_of_one_word_count_behind_wording_that_names_labels(text: str, count: int) -> None:
    assert leaks(text, QUESTION, TYPES) == count


def test_labels_that_the_question_contains_are_not_counted() -> None:
    text = "There is a missing case. error type: copy"
    assert leaks(text, QUESTION, TYPES) == 2
    assert leaks(text, "Find the Missing Case.", TYPES) == 1
    assert leaks(text, "How many copies? Write one copy.", TYPES) == 1


def test_labels_are_read_literally() -> None:
    assert (
        leaks("an invariant/bound (a.b) here, error type: invariant/bound", QUESTION, ["invariant/bound", "a.b"]) == 1
    )
    assert leaks("error type: axb", QUESTION, ["a.b", "_", "", "(["]) == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("Wait, maybe. Hmm... let me CHECK: perhaps it seems likely, or might be; Alternatively, actually no.", 10),
        ("hmmmm, wait—wait", 3),
        ("waiting for an unlikely checkerboard that almighty Mightily seemed", 0),
    ],
)
def test_epistemic_markers_are_whole_words_of_the_published_list(text: str, count: int) -> None:
    assert epistemic_markers(text) == count


def test_text_in_other_scripts_and_broken_text() -> None:
    text = "等等\uff0cwait。参考 the reference solution —— déjà vu 🙂 maybe\u2028perhaps \ud800 \x00"
    assert epistemic_markers(text) == 3
    assert leaks(text, "问题", ("情况_遗漏", "déjà_vu")) == 2
    assert leaks("这里有 情况 遗漏。", "问题", ("情况_遗漏",)) == 1


def test_metrics_of_a_batch() -> None:
    rollouts = [
        graded("Wait, the reference solution and the hint say 4.", 10),  # 2 leaks, 1 marker
        graded("Maybe 4. The hint says so.", 6, question="Hint: count."),  # 1 marker
        graded("4", 3),
        graded("", 1),
    ]
    # 2 leaks in 4 rollouts, in 1 of them; 2 markers in 20 tokens
    assert text_metrics(rollouts, TYPES) == {
        "response/leaks_per_rollout": 0.5,
        "response/leaking_rollouts_frac": 0.25,
        "response/epistemic_markers_per_1k_tokens": 100.0,
    }


def test_metrics_without_rollouts_are_zero() -> None:
    assert set(text_metrics([], TYPES).values()) == {0.0}


def test_metrics_do_not_depend_on_the_order_of_rollouts_or_types() -> None:
    rollouts = [graded("take care with arithmetic slip", 5), graded("Hmm, a missing case", 7), graded("4", 2)]
    assert text_metrics(rollouts, TYPES) == text_metrics(rollouts[::-1], TYPES[::-1])
