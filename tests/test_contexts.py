"""What a teacher is told: the wording of each piece, who has it, and what must never be in it."""

import numpy as np
import pytest
from pydantic import ValidationError

from trace_rl.batch import AnnotatedRollout, GradedRollout, GroupMember, Prompt, Rollout, Span
from trace_rl.contexts import (
    Context,
    extra_response_pieces,
    has_information,
    outline,
    privileged_question,
    prompt_question,
)

PROMPT = Prompt("p/1", "What is {x} + 1?", "7", "x is 6, so 6 + 1 = 7.", {"hint": "x is even"})
BARE = Prompt("p/2", "What is 2 + 2?", "4")


def annotated(
    sample: int,
    reward: float = 0.0,
    text: str = "text",
    spans: tuple[Span, ...] = (),
    feedback: str = "",
    reflection: str = "",
    length: int = 4,
    prompt: Prompt = PROMPT,
) -> AnnotatedRollout:
    ids, versions = tuple(range(length)), np.zeros(length, dtype=np.int64)
    rollout = Rollout(prompt, sample, (1,), ids, np.zeros(length), "stop", versions, text)
    graded = GradedRollout(rollout, reward, "graded", feedback)
    return AnnotatedRollout(graded, spans, "annotated", reflection=reflection)


def member(*group: AnnotatedRollout, index: int = 0) -> GroupMember:
    return GroupMember(group[index], group)


def context(value: object) -> Context:
    return Context.model_validate(value)


def test_a_type_label_names_types_and_nothing_else() -> None:
    text = prompt_question(context("type_label"), PROMPT, ["case_analysis", "final"])
    assert text == "What is {x} + 1?\nTake care with: case analysis, final."


def test_the_wording_of_a_reference() -> None:
    # the shipped base model was taught to read exactly this
    expected = "What is {x} + 1?\nReference solution:\nx is 6, so 6 + 1 = 7.\nNow solve it yourself."
    assert prompt_question(context("reference"), PROMPT, ()) == expected
    assert "Reference solution:\n4\n" in prompt_question(context("reference"), BARE, ())


def test_where_there_is_nothing_to_add_the_teacher_sees_the_question() -> None:
    assert prompt_question(context("type_label"), PROMPT, []) == PROMPT.question
    assert prompt_question(context("none"), PROMPT, ["final"]) == PROMPT.question


def test_a_label_names_types_once_in_canonical_order() -> None:
    spans = tuple(Span(0, 1, "key", name) for name in ("other", "arith", "copy", "arith"))
    text = privileged_question(context("type_label"), member(annotated(0, spans=spans)), ("copy", "arith"))
    assert text.endswith("Take care with: copy, arith, other.")


@pytest.mark.parametrize("pieces", ["type_label", "reflection", ["type_label", "reflection"]])
def test_positions_and_text_of_spans_do_not_reach_the_label(pieces: object) -> None:
    here = annotated(0, text="12 + 30 = 52", spans=(Span(0, 1, "error", "final"),), reflection="a sum is wrong")
    there = annotated(0, text="99 - 1 = 97", spans=(Span(2, 3, "error", "final"),), reflection="a sum is wrong")
    one, other = (privileged_question(context(pieces), member(item), ()) for item in (here, there))
    assert one == other
    assert "52" not in one


def test_a_sibling_is_another_correct_completion_without_its_thinking() -> None:
    own = annotated(1, 1.0, "<think>mine</think>own")
    group = (
        annotated(0),
        own,
        annotated(2, 1.0, "<think>aloud</think>the long way", length=9),
        annotated(3, 1.0, "short"),
    )
    first = privileged_question(context("sibling_first"), member(*group, index=1), ())
    assert first == f"{PROMPT.question}\nCorrect solution of an earlier attempt:\nthe long way\nNow solve it yourself."
    assert "\nshort\n" in privileged_question(context("sibling_shortest"), member(*group, index=1), ())
    assert "\nown\n" in privileged_question(context("sibling_first"), member(*group, index=0), ())


def test_the_only_success_of_a_group_has_no_sibling() -> None:
    group = annotated(0, 1.0), annotated(1)
    assert not has_information(context("sibling_first"), member(*group, index=0))
    assert has_information(context("sibling_first"), member(*group, index=1))
    assert privileged_question(context("sibling_first"), member(*group, index=0), ()) == PROMPT.question


@pytest.mark.parametrize(
    ("combine", "sibling", "feedback", "expected"),
    [
        ("every", True, True, "sibling feedback"),
        ("every", True, False, ""),
        ("available", True, False, "sibling"),
        ("available", False, True, "feedback"),
        ("available", False, False, ""),
        ("first", True, True, "sibling"),
        ("first", False, True, "feedback"),
        ("first", False, False, ""),
    ],
)
def test_pieces_are_combined(combine: str, sibling: bool, feedback: bool, expected: str) -> None:
    chosen = Context(
        pieces=("sibling_first", "feedback"),
        combine=combine,
        templates={"sibling_first": "sibling{sibling}", "feedback": "feedback{feedback}"},
    )
    group = annotated(0, feedback="!" if feedback else ""), annotated(1, float(sibling), "?")
    text = privileged_question(chosen, member(*group), ())
    told = text.removeprefix(PROMPT.question).replace("?", "").replace("!", "").split()
    assert " ".join(told) == expected
    assert has_information(chosen, member(*group)) == bool(expected)


def test_a_custom_text_may_name_what_the_data_know() -> None:
    own = Context(pieces=("custom",), templates={"custom": "Hint: {hint}. It is {answer}."})
    assert prompt_question(own, PROMPT, ()) == "What is {x} + 1?\nHint: x is even. It is 7."
    assert prompt_question(own, BARE, ()) == BARE.question  # no such metadata: nothing to say


def test_who_needs_an_annotator() -> None:
    assert context("type_label").needs_annotation
    assert context(["sibling_first", "reflection"]).needs_annotation
    assert Context(pieces=("custom",), templates={"custom": "{types}"}).needs_annotation
    for value in ("none", "reference", "answer", "sibling_shortest", "feedback"):
        assert not context(value).needs_annotation


def test_no_turn_is_longer_than_its_outline_and_the_texts_of_rollouts() -> None:
    chosen = context({"pieces": ["type_label", "reference", "sibling_first"], "combine": "available"})
    group = annotated(0, spans=(Span(0, 1, "key", "copy"),)), annotated(1, 1.0, "a sibling")
    turn = privileged_question(chosen, member(*group), ("copy", "arith"))
    longest = outline(chosen, PROMPT, ("copy", "arith"))
    assert extra_response_pieces(chosen) == 1
    assert len(turn) <= len(longest) + len("a sibling")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"pieces": ["reference", "reference"]}, "names 'reference' 2 times"),
        ({"pieces": ["custom"]}, "has no default text; give context.templates.custom"),
        ({"pieces": ["answer"], "templates": {"reference": "{reference}"}}, "add the piece, or remove its wording"),
        ({"pieces": ["type_label"], "templates": {"type_label": "Beware."}}, "lacks {types}"),
        ({"pieces": ["type_label"], "templates": {"type_label": "{types} {hint}"}}, "unknown field 'hint'"),
        ({"pieces": ["type_label"], "templates": {"type_label": "{types"}}, "not a valid template"),
        ({"pieces": ["type_label"], "templates": {"type_label": "{types:d}"}}, "write the bare field"),
    ],
)
def test_a_context_that_cannot_be_is_one_sentence(value: object, sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        context(value)
    assert sentence in str(caught.value)
