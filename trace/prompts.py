"""Student and teacher prompts: the same question, the teacher's with privileged context.

Both sides are rendered by the same chat template with the same arguments, so that the only difference between
them is the privileged text inside the user turn (method: arXiv:2605.10194; the wording of the context is ours).
The teacher never sees span positions, span text, or (under `type_label`) anything of the reference solution.

This module must not know how the spans were found or how the prompts are scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, Protocol

import numpy as np

from trace_rl.batch import Prompt, RolloutRequest, RoutedRollout, TeacherRequest
from trace_rl.config.roles import Teacher

ContextKind = Literal["none", "type_label", "reference"]
Message = dict[str, str]

TemplatedContext = Literal["type_label", "reference"]
DEFAULT_TEMPLATES: Mapping[TemplatedContext, str] = {
    "type_label": "{question}\nTake care with: {types}.",
    "reference": "{question}\nReference solution:\n{reference}\nNow solve it yourself.",
}


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering needs."""

    def apply_chat_template(self, conversation: Sequence[Message], **kwargs: Any) -> Any: ...


def student_messages(question: str, system: str = "") -> list[Message]:
    """The chat that the student answers."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": question}]


def privileged_question(
    prompt: Prompt,
    context: ContextKind,
    types: Iterable[str],
    templates: Mapping[TemplatedContext, str] = DEFAULT_TEMPLATES,
) -> str:
    """The user turn that the teacher sees; equals the question where there is nothing to add.

    Args:
        types: diagnostic types in canonical order, each once; underscores are read as spaces.
        templates: text per context; fields: {question} in both, {types} in type_label, {reference} in reference.
    """
    if context == "type_label":
        names = ", ".join(name.replace("_", " ") for name in types)
        return templates["type_label"].format(question=prompt.question, types=names) if names else prompt.question
    if context == "reference":
        reference = prompt.solution or prompt.answer
        return templates["reference"].format(question=prompt.question, reference=reference)
    return prompt.question


def render(
    tokenizer: ChatTokenizer, messages: Sequence[Message], template_kwargs: Mapping[str, Any]
) -> tuple[int, ...]:
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
class PromptEncoder:
    """Renders prompts of both sides with one tokenizer and one set of template arguments."""

    tokenizer: ChatTokenizer
    system_prompt: str
    chat_template_kwargs: Mapping[str, Any]
    teacher: Teacher
    types: tuple[str, ...] = ()
    """Diagnostic types in the canonical order in which a label names them; others follow by name."""

    def student_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return self._render(prompt.question)

    def teacher_ids(self, prompt: Prompt, types: Iterable[str]) -> tuple[int, ...]:
        templates = {**DEFAULT_TEMPLATES, **self.teacher.templates}
        return self._render(privileged_question(prompt, self.teacher.context, types, templates))

    def requests(self, prompts: Sequence[Prompt], num_samples: int, *seed_parts: int | str) -> list[RolloutRequest]:
        """`num_samples` requests a prompt; seeds come from `seed_parts`, the prompt's id and the sample's number."""
        return [
            RolloutRequest(prompt, sample, ids, derive_seed(*seed_parts, prompt.prompt_id, sample))
            for prompt in prompts
            for ids in [self.student_ids(prompt)]
            for sample in range(num_samples)
        ]

    def teacher_requests(self, routed: Iterable[RoutedRollout]) -> list[TeacherRequest]:
        """One request for each rollout with routed tokens, cut behind the last of them."""
        return [self._teacher_request(item) for item in routed if item.is_routed.any()]

    def _teacher_request(self, routed: RoutedRollout) -> TeacherRequest:
        rollout = routed.annotated.graded.rollout
        positions = np.flatnonzero(routed.is_routed)
        found = {span.type for span in routed.annotated.spans}
        types = [name for name in self.types if name in found] + sorted(found.difference(self.types))
        token_ids = rollout.token_ids[: int(positions[-1]) + 1]
        return TeacherRequest(rollout.key, self.teacher_ids(rollout.prompt, types), token_ids, positions)

    def _render(self, user_text: str) -> tuple[int, ...]:
        messages = student_messages(user_text, self.system_prompt)
        return render(self.tokenizer, messages, self.chat_template_kwargs)
