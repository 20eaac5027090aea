"""Student and teacher prompts: one template for both, privileged text for one, and seeds from identity alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from trace_rl.batch import (
    AnnotatedRollout,
    GradedRollout,
    GroupMember,
    Prompt,
    Rollout,
    RoutedRollout,
    RoutedTokens,
    Span,
)
from trace_rl.contexts import Context
from trace_rl.errors import ModelError
from trace_rl.prompts import PromptEncoder, TeacherView, check_pair, derive_seed, render, student_messages

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


def encoder(system: str = "", tokenizer: Any = None, **settings: Any) -> PromptEncoder:
    kwargs = settings.pop("chat_template_kwargs", {})
    return PromptEncoder(tokenizer or CharTokenizer(), system, kwargs, **settings)


def view(context: object = "type_label", *routes: int) -> TeacherView:
    return TeacherView(Context.model_validate(context), 1.0, frozenset(routes or (0,)), frozenset({"states"}))


def test_the_system_turn_is_there_only_when_it_says_something() -> None:
    assert student_messages("q") == [{"role": "user", "content": "q"}]
    assert student_messages("q", "be brief")[0] == {"role": "system", "content": "be brief"}


def test_rendering_ends_with_the_assistants_turn_and_passes_arguments_on() -> None:
    assert text_of(render(CharTokenizer(), student_messages("q"), {})) == "<user>q<assistant>"
    assert text_of(render(CharTokenizer(), student_messages("q"), {"thinking": True})) == "<user>q<assistant><think>"


def test_both_sides_differ_in_the_users_text_only() -> None:
    both = encoder(system="be brief", chat_template_kwargs={"thinking": True})
    head, tail = "<system>be brief<user>What is {x} + 1?", "<assistant><think>"
    assert text_of(both.student_ids(PROMPT)) == head + tail
    labelled = routed([1], Span(0, 1, "key", "final")).member
    assert text_of(both.teacher_ids(labelled, view().context)) == f"{head}\nTake care with: final.{tail}"


def test_a_teacher_without_context_has_the_students_prompt() -> None:
    assert encoder().teacher_ids(routed([1]).member, Context()) == encoder().student_ids(PROMPT)


def test_a_teacher_may_think_beside_a_student_that_does_not() -> None:
    asymmetric = encoder(teacher_template_kwargs={"thinking": True})
    assert text_of(asymmetric.student_ids(PROMPT)).endswith("<assistant>")
    assert text_of(asymmetric.teacher_ids(routed([1]).member, Context())).endswith("<assistant><think>")


def test_held_out_prompts_may_be_rendered_with_other_arguments() -> None:
    trained = encoder(chat_template_kwargs={"thinking": False})
    evaluated = trained.with_template_kwargs({"thinking": True})
    assert text_of(trained.student_ids(PROMPT)).endswith("<assistant>")
    assert text_of(evaluated.student_ids(PROMPT)).endswith("<assistant><think>")
    assert trained.with_template_kwargs({}) == trained


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


def routed(positions: list[int], *spans: Span, sample: int = 0, length: int = 6, route: int = 0) -> RoutedRollout:
    ids, logprobs, versions = tuple(range(50, 50 + length)), np.zeros(length), np.zeros(length, dtype=np.int64)
    rollout = Rollout(PROMPT, sample, (1,), ids, logprobs, "stop", versions, "text")
    annotated = AnnotatedRollout(GradedRollout(rollout, 1.0, "graded"), spans, "annotated")
    tokens = (RoutedTokens(route, np.array(positions), 1.0),) if positions else ()
    return RoutedRollout(GroupMember(annotated, (annotated,)), 0.0, tokens)


def test_the_teacher_is_asked_for_routed_tokens_and_nothing_behind_them() -> None:
    spans = (Span(1, 2, "key", "final"), Span(3, 4, "key", "arith"), Span(4, 5, "key", "final"))
    (request,) = encoder().teacher_requests([routed([1, 3], *spans), routed([], sample=1)], [view()])
    assert request.key == ("p/1", 0)
    assert request.view == 0
    assert request.positions.tolist() == [1, 3]
    assert request.token_ids == (50, 51, 52, 53)
    assert request.outputs == {"states"}
    # each type once, in canonical order
    assert "Take care with: arith, final." in text_of(request.teacher_prompt_token_ids)


def test_each_view_asks_for_the_tokens_of_its_own_routes() -> None:
    items = [routed([1, 3]), routed([0, 4], sample=1, route=1)]
    first, second = encoder().teacher_requests(items, [view("none", 0), view("answer", 1, 2)])
    assert (first.key.sample, first.view, first.positions.tolist()) == (0, 0, [1, 3])
    assert (second.key.sample, second.view, second.positions.tolist()) == (1, 1, [0, 4])
    assert "Reference answer: 7" in text_of(second.teacher_prompt_token_ids)


def test_routes_of_one_view_share_a_request() -> None:
    item = routed([1, 3])
    both = RoutedRollout(item.member, 0.0, (*item.routed, RoutedTokens(1, np.array([0, 3, 5]), 1.0)))
    (request,) = encoder().teacher_requests([both], [view("none", 0, 1)])
    assert request.positions.tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize("context", ["type_label", "none", "reference"])
def test_no_position_and_no_span_text_reaches_the_teachers_prompt(context: str) -> None:
    here, there = routed([0], Span(0, 1, "key", "final")), routed([2], Span(2, 3, "key", "final"))
    (one,), (other,) = (encoder().teacher_requests([item], [view(context)]) for item in (here, there))
    assert one.teacher_prompt_token_ids == other.teacher_prompt_token_ids


def test_the_longest_teacher_prompt_counts_every_piece_and_type() -> None:
    known = encoder(types=("copy", "arith"))
    labelled = routed([1], Span(0, 1, "key", "copy")).member
    length = known.teacher_length(PROMPT, view().context)
    assert length == len("<user>What is {x} + 1?\nTake care with: copy, arith.<assistant>")
    assert len(known.teacher_ids(labelled, view().context)) <= length


class Template(CharTokenizer):
    """A chat template that is built by a function of the user's text."""

    def __init__(self, write: Any) -> None:
        self._write = write

    def apply_chat_template(self, conversation: Sequence[dict[str, str]], **kwargs: Any) -> list[int]:
        return [ord(character) for character in self._write(conversation, kwargs)]


def plain(conversation: Sequence[dict[str, str]]) -> str:
    return "".join(f"<{message['role']}>{message['content']}" for message in conversation)


@pytest.mark.parametrize("context", ["none", "type_label", "reference", ["answer", "type_label"]])
@pytest.mark.parametrize("system", ["", "be brief"])
def test_a_plain_template_passes_as_a_pair(context: object, system: str) -> None:
    for kwargs in ({}, {"thinking": True}):
        check_pair(encoder(system, chat_template_kwargs=kwargs, types=("copy",)), PROMPT, view(context).context)


@pytest.mark.parametrize(
    ("write", "system", "sentence"),
    [
        (lambda chat, kwargs: plain(chat)[:24] + "<assistant>", "", "drops a part of the user's text"),
        (lambda chat, kwargs: plain(chat[-1:]) + "<assistant>", "be brief", "drops data.system_prompt"),
        (
            lambda chat, kwargs: plain(chat) + ("<think>" if "solution" in chat[-1]["content"] else "<assistant>"),
            "",
            "do not start and end with the same template tokens",
        ),
    ],
    ids=["cuts", "no system turn", "depends on the text"],
)
def test_a_template_that_treats_the_sides_differently_is_refused(write: Any, system: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        check_pair(encoder(system, tokenizer=Template(write)), PROMPT, view("reference").context)
