"""Answers that need no algebra: the letter of an option, or a piece of text.

Options are lettered in a drawn order, which depends on the seed's parts alone, so that every sample of a problem and
every model sees the same one. Reading a response takes time linear in its length, and nothing of it is evaluated. This
module must not know where questions come from, nor math-verify: "cab" and "abc" are the same product of symbols there.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal

import numpy as np

from trace_rl.batch import GradedRollout, Rollout
from trace_rl.prompts import derive_seed
from trace_rl.rewards import extract_answer, last_boxed

_LETTERS = string.ascii_uppercase
_WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathbb)\s*\{|[\s{}()\[\]*$.:]+")
_IN_BOX = re.compile(r"([A-Z])(?![A-Za-z0-9])")
_STATED = re.compile(r"\b(?:[Aa]nswer|ANSWER)(?: is)?[\s:*(\[]{0,8}([A-Z])(?![A-Za-z0-9])")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_NUMBER = re.compile(r"[+-]?\d{1,60}(?:\.\d{1,60})?")


def lettered(question: str, right: str, wrong: Sequence[str], *seed_parts: int | str) -> tuple[str, str]:
    """The question with its options below it, and the letter of the right one."""
    options = [right, *wrong]
    order = np.random.default_rng(derive_seed(*seed_parts, "options")).permutation(len(options)).tolist()
    lines = [f"{_LETTERS[place]}. {options[index].strip()}" for place, index in enumerate(order)]
    return "\n".join([question.rstrip(), "", *lines]), _LETTERS[order.index(0)]


def chosen_letter(text: str) -> str:
    """The letter that a response ends on: in its last box, or else behind its last "answer (is)"; empty without one."""
    boxed = last_boxed(text)
    if boxed is not None:
        found = _IN_BOX.match(_WRAPPING.sub(" ", boxed[:200]).lstrip())
        return found.group(1) if found else ""
    letter = ""
    for stated in _STATED.finditer(text):
        letter = stated.group(1)
    return letter


def chooses(text: str, letter: str) -> bool:
    """Whether a response chooses this letter."""
    return chosen_letter(text) == letter


def ends_on(text: str, expected: str) -> bool:
    """Whether the answer of a response is this text, up to case and spaces; numbers are compared by value."""
    return _plain(extract_answer(text) or "") == _plain(expected)


def _plain(answer: str) -> str:
    words = " ".join(_TEXT_COMMAND.sub(r"\1", answer).split()).casefold()
    digits = words.replace(",", "")
    return str(Decimal(digits).normalize()) if _NUMBER.fullmatch(digits) else words


class RuleGrader:
    """Implements `trace_rl.protocols.Grader` by a rule on (text, expected answer); truncated responses earn 0."""

    def __init__(self, is_right: Callable[[str, str], bool]) -> None:
        self._is_right = is_right

    def grade(self, rollouts: Iterable[Rollout]) -> Iterator[GradedRollout]:
        for rollout in rollouts:
            if rollout.finish_reason == "length":
                yield GradedRollout(rollout, 0.0, "truncated")
            else:
                yield GradedRollout(rollout, float(self._is_right(rollout.text, rollout.prompt.answer)), "graded")
