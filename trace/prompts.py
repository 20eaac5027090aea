"""Student and teacher prompts: the same question, the teacher's with privileged context.

Both sides are rendered by the same chat template with the same arguments, so that the only difference between them is
the privileged text inside the user turn, and whatever `teacher_template_kwargs` asks for on the teacher's side alone.
`check_pair` proves that of a chat template before the run.

This module must not know what the privileged text says, how spans were found or how prompts are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from trace_rl.batch import GroupMember, Prompt, RolloutRequest, RoutedRollout, TeacherOutput, TeacherRequest
from trace_rl.contexts import Context, outline, privileged_question
from trace_rl.errors import ModelError

Message = dict[str, str]
TokenIds = tuple[int, ...]

_PROBES = ("0", "a", ".\n", "\n?")
"""Texts that begin and end differently, by kind of character too: tokenizers merge across the end of a turn's text."""


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering needs."""

    def apply_chat_template(self, conversation: Sequence[Message], **kwargs: Any) -> Any: ...


def student_messages(question: str, system: str = "") -> list[Message]:
    """The chat that the student answers."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": question}]


def render(tokenizer: ChatTokenizer, messages: Sequence[Message], template_kwargs: Mapping[str, Any]) -> TokenIds:
    """Token ids of a chat that is ready for the assistant's turn."""
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **template_kwargs
    )
    return tuple(int(i) for i in ids)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else (no process, no order)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class TeacherView:
    """One way in which the teacher looks at rollouts, for all routes that look alike."""

    context: Context
    temperature: float
    """Divides the teacher's logits before log-probs and entropy."""
    routes: frozenset[int]
    """Indices of the routes that use it."""
    outputs: frozenset[TeacherOutput]
    """What these routes read, together."""


@dataclass(frozen=True)
class PromptEncoder:
    """Renders prompts of both sides with one tokenizer and one set of template arguments."""

    tokenizer: ChatTokenizer
    system_prompt: str
    chat_template_kwargs: Mapping[str, Any]
    teacher_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """On top of `chat_template_kwargs` for the teacher's prompt only."""
    types: tuple[str, ...] = ()
    """Diagnostic types in the canonical order in which a label names them; others follow by name."""

    def with_template_kwargs(self, kwargs: Mapping[str, Any]) -> PromptEncoder:
        """The same with these arguments on top of `chat_template_kwargs`."""
        return replace(self, chat_template_kwargs={**self.chat_template_kwargs, **kwargs})

    def student_ids(self, prompt: Prompt) -> TokenIds:
        return self.render_turn(prompt.question, self.chat_template_kwargs)

    def teacher_ids(
        self, member: GroupMember, context: Context, known: MutableMapping[str, TokenIds] | None = None
    ) -> TokenIds:
        """The teacher's prompt for a rollout.

        Args:
            known: token ids of turns that were rendered before, by their text; this one's are added.
        """
        text = privileged_question(context, member, self.types)
        known = {} if known is None else known
        if text not in known:
            known[text] = self.render_turn(text, self.all_teacher_kwargs)
        return known[text]

    def teacher_length(self, prompt: Prompt, context: Context) -> int:
        """Length in tokens of the prompt's longest teacher prompt, as far as it is known before there are rollouts.

        Every piece and every type is counted. Texts of rollouts are not: they add up to max_response_tokens for each
        of the context's `extra_response_pieces`.
        """
        return len(self.render_turn(outline(context, prompt, self.types), self.all_teacher_kwargs))

    def requests(self, prompts: Sequence[Prompt], num_samples: int, *seed_parts: int | str) -> list[RolloutRequest]:
        """`num_samples` requests a prompt; seeds come from `seed_parts`, the prompt's id and the sample's number."""
        return [
            RolloutRequest(prompt, sample, ids, derive_seed(*seed_parts, prompt.prompt_id, sample))
            for prompt in prompts
            for ids in [self.student_ids(prompt)]
            for sample in range(num_samples)
        ]

    def teacher_requests(self, routed: Sequence[RoutedRollout], views: Sequence[TeacherView]) -> list[TeacherRequest]:
        """By view and rollout: one request where the rollout has tokens in a route of the view, for those tokens."""
        known: dict[str, TokenIds] = {}  # completions of one prompt mostly share a text
        return [
            self._teacher_request(item, index, view, positions, known)
            for index, view in enumerate(views)
            for item in routed
            if len(positions := _positions(item, view.routes))
        ]

    def _teacher_request(
        self,
        routed: RoutedRollout,
        index: int,
        view: TeacherView,
        positions: Int[np.ndarray, " row"],
        known: MutableMapping[str, TokenIds],
    ) -> TeacherRequest:
        return TeacherRequest(
            key=routed.key,
            view=index,
            teacher_prompt_token_ids=self.teacher_ids(routed.member, view.context, known),
            token_ids=routed.member.rollout.token_ids[: int(positions[-1]) + 1],
            positions=positions,
            outputs=view.outputs,
            temperature=view.temperature,
        )

    @property
    def all_teacher_kwargs(self) -> dict[str, Any]:
        """Arguments of the chat template on the teacher's side."""
        return {**self.chat_template_kwargs, **self.teacher_template_kwargs}

    def render_turn(self, user_text: str, template_kwargs: Mapping[str, Any]) -> TokenIds:
        """Token ids of the chat in which the user says this text."""
        return render(self.tokenizer, student_messages(user_text, self.system_prompt), template_kwargs)


def _positions(routed: RoutedRollout, routes: frozenset[int]) -> Int[np.ndarray, " row"]:
    """Response positions that are in any of the routes, ascending, each once."""
    parts = [tokens.positions for tokens in routed.routed if tokens.route in routes]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)


def check_pair(encoder: PromptEncoder, prompt: Prompt, context: Context) -> None:
    """Prove that student and teacher prompts of a context differ in the user's turn only, token for token.

    The tokens that stay the same whatever follows the question are the frame of a side: all up to the question and
    with it, and all behind the user's turn (the generation prompt, with its thinking flag). Each side's prompt must
    stand in its frame. Both frames come from the same template and, without `teacher_template_kwargs`, from the same
    arguments, and are equal then.

    Raises:
        ModelError: the template drops text of the user's turn or the system prompt, or puts other tokens around the
            user's turn on one side than on the other.
    """
    turn = outline(context, prompt, encoder.types)
    sides = {
        "student": (prompt.question, encoder.chat_template_kwargs),
        "teacher": (turn, encoder.all_teacher_kwargs),
    }
    for side, (text, kwargs) in sides.items():
        _check_nothing_is_dropped(encoder, side, prompt, text, kwargs)
        head, tail = _frame(encoder, prompt.question, kwargs)
        ids = encoder.render_turn(text, kwargs)
        if ids[: len(head)] != head or ids[len(ids) - len(tail) :] != tail or len(ids) < len(head) + len(tail):
            raise ModelError(
                f"student and teacher prompts of {prompt.prompt_id} do not start and end with the same template "
                f"tokens: the {side}'s has others around its user turn than the question alone; choose a chat template "
                "that does not depend on what the user says"
            )


def _check_nothing_is_dropped(
    encoder: PromptEncoder, side: str, prompt: Prompt, text: str, kwargs: Mapping[str, Any]
) -> None:
    rendered = [encoder.render_turn(text + probe, kwargs) for probe in _PROBES]
    bare = [encoder.render_turn(probe, kwargs) for probe in _PROBES]
    if len(set(rendered)) < len(_PROBES) or (text and set(rendered) & set(bare)):
        raise ModelError(
            f"the chat template drops a part of the user's text in the {side}'s prompt of {prompt.prompt_id}; choose "
            "one that renders all of it"
        )
    if encoder.system_prompt:
        chats = [student_messages(text, encoder.system_prompt + probe) for probe in _PROBES]
        if len({render(encoder.tokenizer, chat, kwargs) for chat in chats}) < len(_PROBES):
            raise ModelError(
                f"the chat template drops data.system_prompt in the {side}'s prompt of {prompt.prompt_id}; choose one "
                "with a system turn, or put the text into data.question_suffix"
            )


def _frame(encoder: PromptEncoder, question: str, kwargs: Mapping[str, Any]) -> tuple[TokenIds, TokenIds]:
    """What stands before and behind any text that follows the question in the user's turn."""
    rendered = [encoder.render_turn(question + probe, kwargs) for probe in _PROBES]
    return _common_prefix(rendered), _common_prefix([ids[::-1] for ids in rendered])[::-1]


def _common_prefix(sequences: Sequence[TokenIds]) -> TokenIds:
    first, last = min(sequences), max(sequences)  # in the order of tuples all others lie between these two
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]
