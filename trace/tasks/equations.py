"""Written equations such as `47 + 38 = 85` in any math text: found by a regular expression, checked exactly.

This is the oracle for data without a rule of its own. It decides which pieces of a text are equations that can be
judged; whatever looks like part of something larger (variables, powers, percentages, open products) is left alone,
because a missed equation costs a span while a misjudged one teaches something false.

Invariants: numbers are compared as fractions and never evaluated as code; no text raises; time is linear in the text.

This module must not know about tokens, segments or rewards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from trace_rl.batch import Prompt

EQUATION_IMPORTANCE = 2.0
"""A computed result decides more than the boxed answer that repeats it."""
FINAL_IMPORTANCE = 1.0

_SPACE = r"[ \t]{0,4}+"
_NUMBER = rf"(?:-{_SPACE})?+(?:\\?\$)?+(?:\d{{1,3}}(?:,\d{{3}}){{1,9}}+(?!\d)|\d{{1,30}}+)(?:\.\d{{1,30}}+)?+"
_OPERATOR = r"(?:[-+*/×÷·−]|x|\\times|\\cdot|\\div)"  # noqa: RUF001
_EQUALS_SIGN = rf"{_SPACE}&?={_SPACE}"
# Possessive and bounded everywhere: a start is given up after a bounded number of characters.
_SIDE = rf"{_NUMBER}(?:{_SPACE}{_OPERATOR}{_SPACE}{_NUMBER}){{0,16}}+"
_CHAIN = re.compile(
    rf"(?<![\w.,^!%}})])(?<!\d:)"  # not inside a number, a name, a power or a time of day
    rf"{_NUMBER}{_SPACE}{_OPERATOR}{_SPACE}{_SIDE}(?:{_EQUALS_SIGN}{_SIDE}){{1,16}}+"
    rf"(?![\w^!%\\]|[.,]\d|{_SPACE}(?:[-+*/×÷·−^%(=]|\\times|\\cdot|\\div|x\b))"  # noqa: RUF001
)
_CARRIED_ON = re.compile(r"(?:[-+*/×÷·−^]|\\times|\\cdot|\\div|\bof|\bx)[ \t]*$")  # noqa: RUF001
_LOOK_BEHIND_CHARS = 16
_EQUALS = re.compile(_EQUALS_SIGN)
_TERM = re.compile(rf"{_SPACE}(?P<operator>{_OPERATOR})?{_SPACE}(?P<number>{_NUMBER})")
_PRODUCTS = {"*": "*", "×": "*", "·": "*", "x": "*", "\\times": "*", "\\cdot": "*"}  # noqa: RUF001
_QUOTIENTS = {"/": "/", "÷": "/", "\\div": "/"}
_SIGNS = {"+": "+", "-": "-", "−": "-"} | _PRODUCTS | _QUOTIENTS  # noqa: RUF001
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


class Side(NamedTuple):
    """One side of an equation: text[start:end]."""

    start: int
    end: int
    value: Fraction
    num_decimals: int | None
    """Digits behind the point where the side is one number, None where it is a calculation."""


class Equation(NamedTuple):
    """Two neighbouring sides, `left = right`."""

    left: Side
    right: Side

    @property
    def is_true(self) -> bool:
        """Exactly, or after rounding to the digits that a decimal right side shows (10 / 3 = 3.33)."""
        if self.left.value == self.right.value:
            return True
        shown = self.right.num_decimals
        return bool(shown) and abs(self.left.value - self.right.value) <= Fraction(1, 2 * 10 ** (shown or 0))


class EquationRule:
    """Where a text calculates rightly and where it first goes wrong (implements `ErrorRule`)."""

    types: Mapping[str, str] = {
        "arithmetic": "a calculation that the answer rests on",
        "final": "the final answer",
        "arithmetic_slip": "a calculation with a wrong result",
    }

    def key_spans(self, prompt: Prompt, text: str) -> Sequence[tuple[int, int, str, float]]:
        """The right sides of true equations and the last boxed answer."""
        spans = [
            (equation.right.start, equation.right.end, "arithmetic", EQUATION_IMPORTANCE)
            for equation in equations(text)
            if equation.is_true
        ]
        boxes = list(_BOX.finditer(text))
        return [*spans, *((*box.span(1), "final", FINAL_IMPORTANCE) for box in boxes[-1:])]

    def error_spans(self, prompt: Prompt, text: str) -> Sequence[tuple[int, int, str, float]]:
        """The first false equation, both sides; none where no equation is false."""
        for equation in equations(text):
            if not equation.is_true:
                return [(equation.left.start, equation.right.end, "arithmetic_slip", 1.0)]
        return []


def equations(text: str) -> Iterator[Equation]:
    """Every equation that can be judged, in the order of the text; `a + b = c + d = e` gives two."""
    for match in _CHAIN.finditer(text):
        if _CARRIED_ON.search(text, max(0, match.start() - _LOOK_BEHIND_CHARS), match.start()):
            continue
        sides, start = [], match.start()
        for equals in [*_EQUALS.finditer(text, match.start(), match.end()), None]:
            end = match.end() if equals is None else equals.start()
            sides.append(_read_side(text, start, end))
            start = end if equals is None else equals.end()
        for left, right in pairwise(sides):
            if left is not None and right is not None:
                yield Equation(left, right)


def _read_side(text: str, start: int, end: int) -> Side | None:
    """Sum of signed products; None where it divides by zero."""
    total, product = Fraction(0), Fraction(0)
    num_terms, num_decimals = 0, None
    for term in _TERM.finditer(text, start, end):
        digits = re.sub(r"[$\\, \t]", "", term["number"])
        number, num_terms = Fraction(digits), num_terms + 1
        num_decimals = len(digits.partition(".")[2])
        match _SIGNS[term["operator"] or "+"]:
            case "+":
                total, product = total + product, number
            case "-":
                total, product = total + product, -number
            case "*":
                product *= number
            case _ if number == 0:
                return None
            case _:
                product /= number
    return Side(start, end, total + product, num_decimals if num_terms == 1 else None)
