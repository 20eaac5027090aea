"""What a teacher knows beyond the question: the pieces of privileged information, their wording, and who has them.

The teacher's user turn is the question, then the texts of the pieces, joined by newlines. A piece is available for a
rollout where every field of its wording has something to say. Sources: types arXiv:2605.10194, reference
arXiv:2601.18734, answer arXiv:2604.03128, sibling and feedback arXiv:2601.20802, shortest sibling arXiv:2605.17497,
reflection arXiv:2605.28014. The wording is ours.

Invariants:
* `type_label` and `reflection` carry nothing of a span but its coarse type, and nothing of the rollout itself: no text,
  no positions, no numbers.
* A sibling is another completion of the same prompt, never the rollout itself, and is shown without its thinking.

This module must not know chat templates, tokens or how rollouts are scored.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any, Literal

from pydantic import Field, model_validator

from trace_rl.batch import AnnotatedRollout, GroupMember, Prompt
from trace_rl.config.base import Section, check_fields
from trace_rl.segments import THINK_END

Piece = Literal[
    "type_label", "reference", "answer", "sibling_first", "sibling_shortest", "feedback", "reflection", "custom"
]
Fields = Mapping[str, str]

DEFAULT_TEMPLATES: Mapping[Piece, str] = {
    "type_label": "Take care with: {types}.",
    "reference": "Reference solution:\n{reference}\nNow solve it yourself.",
    "answer": "Reference answer: {answer}\nNow solve it yourself.",
    "sibling_first": "Correct solution of an earlier attempt:\n{sibling}\nNow solve it yourself.",
    "sibling_shortest": "Correct solution of an earlier attempt:\n{sibling}\nNow solve it yourself.",
    "feedback": "Feedback on an earlier attempt:\n{feedback}",
    "reflection": "What went wrong in an earlier attempt:\n{reflection}",
}
_FIELD: Mapping[Piece, str] = {
    "type_label": "types",
    "reference": "reference",
    "answer": "answer",
    "sibling_first": "sibling",
    "sibling_shortest": "sibling",
    "feedback": "feedback",
    "reflection": "reflection",
}
"""The one field that the wording of a piece has."""
_CUSTOM_FIELDS = frozenset({"question", "reference", "answer", "types"})
"""What `custom` may name beside the metadata of the prompt."""
_RESPONSE_PIECES = frozenset({"sibling_first", "sibling_shortest", "feedback", "reflection"})
"""Pieces that are known only when there are rollouts, and may be as long as a response."""


class Context(Section):
    """What the teacher knows beyond the question: `none`, one piece by its name, a list of pieces, or the fields."""

    pieces: tuple[Piece, ...] = ()
    """In the order in which the teacher reads them; without any it reads the question alone. `type_label`: coarse types
    of the rollout's spans; `reference`: worked solution, or the answer where there is none; `answer`: final answer;
    `sibling_first`, `sibling_shortest`: a correct completion of the same question, the first or the shortest one;
    `feedback`: what the environment says of the rollout; `reflection`: the annotator's explanation of what went wrong;
    `custom`: own text."""
    combine: Literal["every", "available", "first"] = "every"
    """`every`: all pieces must be available, or the teacher has no information on the rollout; `available`: those that
    are, at least one; `first`: the first that is, and no other."""
    templates: dict[Piece, str] = Field(default_factory=dict)
    """Wording of a piece in place of the default. Each has one field: {types} in type_label, {reference}, {answer},
    {sibling} in both kinds of sibling, {feedback}, {reflection}; `custom`, which has no default, may name {question},
    {reference}, {answer}, {types} and the keys of the prompt's metadata."""

    @property
    def needs_annotation(self) -> bool:
        """Whether an annotator has to look at the rollouts before the teacher can be asked."""
        return any(piece == "reflection" or "types" in _fields_of(template) for piece, template in self.wording.items())

    @property
    def wording(self) -> dict[Piece, str]:
        """The template of each piece, in their order."""
        return {piece: self.templates.get(piece) or DEFAULT_TEMPLATES[piece] for piece in self.pieces}

    @model_validator(mode="before")
    @classmethod
    def _pieces_may_stand_alone(cls, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            value = {"pieces": value}
        if isinstance(value, Mapping) and isinstance(value.get("pieces"), str):
            return {**value, "pieces": () if value["pieces"] == "none" else (value["pieces"],)}
        return value

    @model_validator(mode="after")
    def _pieces_are_different(self) -> Context:
        for piece in self.pieces:
            if self.pieces.count(piece) > 1:
                raise ValueError(f"context.pieces names {piece!r} {self.pieces.count(piece)} times; name it once")
        return self

    @model_validator(mode="after")
    def _templates_are_templates(self) -> Context:
        if "custom" in self.pieces and not self.templates.get("custom"):
            raise ValueError("context.pieces has 'custom', which has no default text; give context.templates.custom")
        for piece, template in self.templates.items():
            if piece not in self.pieces:
                raise ValueError(
                    f"context.templates has a wording of {piece!r}, but context.pieces is {list(self.pieces)}; add the "
                    "piece, or remove its wording"
                )
            _check_template(piece, template)
        return self


def has_information(context: Context, member: GroupMember) -> bool:
    """Whether the context has for this rollout what `combine` asks for; one without pieces asks for nothing."""
    return _is_enough(context, _member_texts(context, member, ()))


def privileged_question(context: Context, member: GroupMember, types_order: Sequence[str]) -> str:
    """The user turn that the teacher reads for one rollout; the plain question where there is no information.

    Args:
        types_order: canonical order in which a label names types; types beyond it follow by name.
    """
    return _turn(context, member.rollout.prompt.question, _member_texts(context, member, types_order))


def prompt_question(context: Context, prompt: Prompt, types: Iterable[str]) -> str:
    """The user turn that the teacher would read if there were no rollouts but the types were known.

    Args:
        types: in the order in which they are to be named.
    """
    return _turn(context, prompt.question, _texts(context, _prompt_fields(prompt, types), {}))


def outline(context: Context, prompt: Prompt, types: Iterable[str]) -> str:
    """The user turn with every piece, whatever `combine` says; what only rollouts tell is replaced by the piece's name.

    No turn of the prompt is longer, but for the texts of up to `extra_response_pieces` pieces.

    Args:
        types: all types that a label may name, in canonical order.
    """
    known = _prompt_fields(prompt, types)
    texts = [
        template.format_map(defaultdict(str, _fields(piece, known, {piece: piece})))
        for piece, template in context.wording.items()
    ]
    return "\n".join([prompt.question, *texts])


def extra_response_pieces(context: Context) -> int:
    """Number of pieces in one turn that may be as long as a response."""
    count = sum(piece in _RESPONSE_PIECES for piece in context.pieces)
    return min(count, 1) if context.combine == "first" else count


def _check_template(piece: Piece, template: str) -> None:
    setting = f"context.templates.{piece}"
    if piece == "custom":
        fields = check_fields(setting, template, _CUSTOM_FIELDS | set(re.findall(r"{(\w+)}", template)))
    else:
        fields = check_fields(setting, template, {_FIELD[piece]})
        if not fields:
            raise ValueError(
                f"{setting} {template!r} lacks {{{_FIELD[piece]}}}, which the piece is there for; add it, or use the "
                "piece custom for a fixed text"
            )
    try:
        template.format_map(dict.fromkeys(fields, ""))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{setting} {template!r} formats a field in a way that text cannot be ({error}); write the bare field"
        ) from None


def _fields_of(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def _turn(context: Context, question: str, texts: Sequence[str]) -> str:
    if not _is_enough(context, texts):
        return question
    return "\n".join([question, *(texts[:1] if context.combine == "first" else texts)])


def _is_enough(context: Context, texts: Sequence[str]) -> bool:
    if context.combine == "every" or not context.pieces:
        return len(texts) == len(context.pieces)
    return len(texts) > 0


def _texts(context: Context, known: Fields, told: Mapping[Piece, str]) -> list[str]:
    """The texts of the pieces that are available, in their order."""
    texts = []
    for piece, template in context.wording.items():
        fields = _fields(piece, known, told)
        if all(fields.get(name, "").strip() for name in _fields_of(template)):
            texts.append(template.format_map(fields))
    return texts


def _fields(piece: Piece, known: Fields, told: Mapping[Piece, str]) -> Fields:
    """What the wording of a piece may name: what the prompt tells, or what rollouts tell of this piece."""
    return {_FIELD[piece]: told.get(piece, "")} if piece in _RESPONSE_PIECES else known


def _member_texts(context: Context, member: GroupMember, types_order: Sequence[str]) -> list[str]:
    found = {span.type for span in member.annotated.spans}
    types = [name for name in types_order if name in found] + sorted(found.difference(types_order))
    told = {piece: _told(piece, member) for piece in context.pieces if piece in _RESPONSE_PIECES}
    return _texts(context, _prompt_fields(member.rollout.prompt, types), told)


def _told(piece: Piece, member: GroupMember) -> str:
    """What the rollouts of the prompt tell of a piece; empty when they tell nothing."""
    if piece == "feedback":
        return member.graded.feedback
    if piece == "reflection":
        return member.annotated.reflection
    siblings = [item for item in member.correct_siblings if _without_thinking(item)]
    if piece == "sibling_shortest":
        siblings.sort(key=lambda item: len(item.graded.rollout.token_ids))  # stable: ties keep the order of samples
    return _without_thinking(siblings[0]) if siblings else ""


def _prompt_fields(prompt: Prompt, types: Iterable[str]) -> dict[str, str]:
    """Field -> text of all that is known without rollouts; fields without text are empty."""
    return {
        **prompt.metadata,
        "question": prompt.question,
        "reference": prompt.solution or prompt.answer,
        "answer": prompt.answer,
        "types": ", ".join(name.replace("_", " ") for name in types),
    }


def _without_thinking(item: AnnotatedRollout) -> str:
    return item.graded.rollout.text.rpartition(THINK_END)[2].strip()
