"""Student and teacher prompts: one template for both, privileged text for one, and seeds from identity alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from trace_rl.batch import AnnotatedRollout, GradedRollout, Prompt, Rollout, RoutedRollout, Span
from trace_rl.config.roles import Teacher
from trace_rl.prompts import PromptEncoder, derive_seed, privileged_question, render, student_messages

PROMPT = Prompt("p/1", "What is {x} + 1?", "7", "x is 6, so 6 + 1 = 7.")
BARE = Prompt("p/2", "What is 2 + 2?", "4")


class CharTokenizer:
    """One id per character; the template writes role, content and, when asked, the assistant's turn."""

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, str]],
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
        thinking: bool = False,
    ) -> list[int]:
        assert tokenize
        assert not return_dict
        text = "".join(f"<{message['role']}>{message['content']}" for message in conversation)
        text += ("<assistant>" if add_generation_prompt else "") + ("<think>" if thinking else "")
        return [ord(character) for character in text]


def text_of(ids: Sequence[int]) -> str:
    return "".join(chr(i) for i in ids)


def encoder(context: str = "type_label", system: str = "", **settings: Any) -> PromptEncoder:
    kwargs = settings.pop("chat_template_kwargs", {})
    return PromptEncoder(CharTokenizer(), system, kwargs, Teacher(context=context, **settings))


def test_the_system_turn_is_there_only_when_it_says_something() -> None:
    assert student_messages("q") == [{"role": "user", "content": "q"}]
    assert student_messages("q", "be brief")[0] == {"role": "system", "content": "be brief"}


def test_a_type_label_names_types_and_nothing_else() -> None:
    text = privileged_question(PROMPT, "type_label", ["case_analysis", "final"])
    assert text == "What is {x} + 1?\nTake care with: case analysis, final."
    assert PROMPT.solution not in text
    assert "7" not in text


def test_where_there_is_nothing_to_add_the_teacher_sees_the_question() -> None:
    assert privileged_question(PROMPT, "type_label", []) == PROMPT.question
    assert privileged_question(PROMPT, "none", ["final"]) == PROMPT.question


def test_the_reference_is_the_solution_or_else_the_answer() -> None:
    assert PROMPT.solution in privileged_question(PROMPT, "reference", [])
    assert "Reference solution:\n4\n" in privileged_question(BARE, "reference", [])


def test_rendering_ends_with_the_assistants_turn_and_passes_arguments_on() -> None:
    assert text_of(render(CharTokenizer(), student_messages("q"), {})) == "<user>q<assistant>"
    assert text_of(render(CharTokenizer(), student_messages("q"), {"thinking": True})) == "<user>q<assistant><think>"


def test_both_sides_differ_in_the_users_text_only() -> None:
    both = encoder(system="be brief", chat_template_kwargs={"thinking": True})
    head, tail = "<system>be brief<user>What is {x} + 1?", "<assistant><think>"
    assert text_of(both.student_ids(PROMPT)) == head + tail
    assert text_of(both.teacher_ids(PROMPT, ["final"])) == f"{head}\nTake care with: final.{tail}"


def test_a_teacher_without_context_has_the_students_prompt() -> None:
    assert encoder("none").teacher_ids(PROMPT, ["final"]) == encoder("none").student_ids(PROMPT)


def test_the_wording_can_be_replaced_per_context() -> None:
    own = encoder(templates={"type_label": "{question} Beware of {types}!"})
    assert "What is {x} + 1? Beware of final!" in text_of(own.teacher_ids(PROMPT, ["final"]))
    reference = encoder("reference", templates={"type_label": "{question} Beware of {types}!"})
    assert PROMPT.solution in text_of(reference.teacher_ids(PROMPT, []))


def test_requests_are_one_a_sample_with_seeds_of_their_own() -> None:
    requests = encoder().requests([PROMPT, BARE], 3, 0, "train", 5)
    assert [(request.prompt.prompt_id, request.sample) for request in requests] == [
        ("p/1", 0), ("p/1", 1), ("p/1", 2), ("p/2", 0), ("p/2", 1), ("p/2", 2),
    ]  # fmt: skip
    assert len({request.seed for request in requests}) == 6
    assert {request.prompt_token_ids for request in requests[:3]} == {encoder().student_ids(PROMPT)}


def test_a_rollouts_seed_does_not_depend_on_its_neighbours() -> None:
    together = encoder().requests([PROMPT, BARE], 3, 0, "train", 5)
    alone = encoder().requests([BARE], 2, 0, "train", 5)
    assert [request.seed for request in alone] == [request.seed for request in together[3:5]]
    assert not {request.seed for request in encoder().requests([PROMPT, BARE], 3, 0, "train", 6)} & {
        request.seed for request in together
    }


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, "train", 3, "arithmetic/train/17", 2) == 6601163608471849112


def test_seeds_have_63_bits_and_tell_their_parts_apart() -> None:
    seeds = [derive_seed(0, index) for index in range(2000)]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert derive_seed("ab", "c") != derive_seed("a", "bc")
    assert derive_seed(1, 23) != derive_seed(12, 3)


def routed(route_index: list[int], *spans: Span, sample: int = 0) -> RoutedRollout:
    length = len(route_index)
    rollout = Rollout(
        PROMPT, sample, (1,), tuple(range(50, 50 + length)), np.zeros(length, dtype=np.float32), "stop", 0, "text"
    )
    annotated = AnnotatedRollout(GradedRollout(rollout, 1.0, "graded"), spans, "annotated")
    return RoutedRollout(annotated, 0.0, np.ones(length), np.array(route_index), np.zeros(length))


def test_the_teacher_is_asked_for_routed_tokens_and_nothing_behind_them() -> None:
    spans = (Span(1, 2, "key", "final"), Span(3, 4, "key", "arith"), Span(4, 5, "key", "final"))
    (request,) = encoder().teacher_requests([routed([-1, 0, -1, 0, -1, -1], *spans), routed([-1, -1], sample=1)])
    assert request.key == ("p/1", 0)
    assert request.positions.tolist() == [1, 3]
    assert request.token_ids == (50, 51, 52, 53)
    # each type once, in canonical order
    assert "Take care with: arith, final." in text_of(request.teacher_prompt_token_ids)


@pytest.mark.parametrize("context", ["type_label", "none", "reference"])
def test_no_position_and_no_span_text_reaches_the_teachers_prompt(context: str) -> None:
    here, there = routed([0, -1, -1], Span(0, 1, "key", "final")), routed([-1, -1, 0], Span(2, 3, "key", "final"))
    (one,), (other,) = encoder(context).teacher_requests([here]), encoder(context).teacher_requests([there])
    assert one.teacher_prompt_token_ids == other.teacher_prompt_token_ids


def test_a_label_names_types_once_in_canonical_order() -> None:
    ordered = PromptEncoder(CharTokenizer(), "", {}, Teacher(), types=("copy", "arith"))
    spans = [Span(0, 1, "key", name) for name in ("other", "arith", "copy", "arith")]
    (request,) = ordered.teacher_requests([routed([0, -1], *spans)])
    assert "Take care with: copy, arith, other." in text_of(request.teacher_prompt_token_ids)
