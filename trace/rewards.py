"""What a response earns: 1 when its answer equals the reference answer, 0 otherwise.

The answer is the content of the last complete `\\boxed{}`; without one, the last piece of math or the last number.
Equality is decided by math-verify (LaTeX parsed by a grammar, compared by sympy).

Invariants:
* Model text is never evaluated as code. Three ways lead there, and each is closed. math-verify's plain-expression path
  hands text to Python's `eval` through sympy's `parse_expr`: it is not used, everything is read as LaTeX by a grammar.
  Numbers in LaTeX take that path too (`sympy.Number(text)`): the grammar lets nothing but digits, separators and an
  exponent come so far. And sympy compiles terms of series to Python functions (`lambdify`), with the names of symbols,
  which can be any text in LaTeX (`\\text{...}`): names that could be code are spelled otherwise (`_with_plain_names`)
  before anything is compared.
* Extraction takes time linear in the text. Parsing and comparing may take forever (`9^{9^{9^9}}`), and the
  signal-based timeouts of math-verify cannot interrupt big-integer arithmetic, so they are off: a caller runs
  `grade_text` in a process that it can kill (`trace_rl.workers.grading`).

This module must not know about deadlines, truncated rollouts or who asks.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections import deque
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase, Symbol
from sympy.core.function import AppliedUndef
from sympy.core.symbol import Str

from trace_rl.batch import GradeCause
from trace_rl.errors import RewardError

MAX_ANSWER_CHARS = 2000
"""Longer answers are graded 0; no reference answer is that long, and the grammar is slow on garbage."""

_QUOTED_CHARS = 60
"""Characters of a wrong answer that feedback repeats."""
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_CANDIDATE = re.compile(
    r"""
    \$\$ (?P<display>.{1,500}?) \$\$
    | \$ (?P<inline>[^$\n]{1,500}) \$
    | \\\( (?P<paren>.{1,500}?) \\\)
    | \\\[ (?P<bracket>.{1,500}?) \\\]
    | (?P<number> (?: (?<![\w)]) - )? (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)? (?: /\d+ )? %? )
    """,
    re.DOTALL | re.VERBOSE,
)
_LATEX = (LatexExtractionConfig(boxed_match_priority=0),)
_PLAIN_NAME = re.compile(
    rf"""
    \w*                                                       # one word
    | \\[A-Za-z] .*                                           # \text{{...}}: the backslash is an error in Python,
    | (?!\d) (?! (?:{"|".join(keyword.kwlist)}) \{{ ) \w+ \{{ .*  # and so is a brace behind a word, as in x_{{...}}
    """,
    re.DOTALL | re.VERBOSE,
)
_NO_WORD = re.compile(r"\W")


def grade_text(text: str, answer: str) -> float:
    """1.0 if the response's answer equals the reference answer, else 0.0.

    Args:
        text: the response without special tokens.
        answer: the reference, plain ("70", "1/2") or LaTeX, boxed or not.

    Raises:
        RewardError: the reference answer cannot be read, or the comparison itself failed.

    May run for any time and take any memory; see the module docstring.
    """
    found = extract_answer(text)
    if not found or len(found) > MAX_ANSWER_CHARS:
        return 0.0
    reference = last_boxed(answer) or answer.strip()
    if found == reference:
        return 1.0
    gold = _parse_reference(reference)
    try:
        is_equal = verify(list(gold), _parse(found), timeout_seconds=None, raise_on_error=True)
    except Exception as error:
        raise RewardError(
            f"Comparing the answer {found[:80]!r} with the reference {reference[:80]!r} failed with "
            f"{type(error).__name__}; the response counts as wrong, report the pair to math-verify if it should not."
        ) from error
    return 1.0 if is_equal else 0.0


def extract_answer(text: str) -> str | None:
    """The text of a response's final answer; None where nothing looks like one."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    candidates = deque(_CANDIDATE.finditer(text), maxlen=1)
    return candidates[0][candidates[0].lastgroup or 0].strip() if candidates else None


def feedback(text: str, reward: float, cause: GradeCause) -> str:
    """What the environment says of a wrong response, without telling the reference; empty where it says nothing.

    Nothing is said of correct responses, nor where grading itself failed. Reference: environment feedback in
    arXiv:2601.20802; the wording is ours.
    """
    if cause == "truncated":
        return "The response was cut off before it was finished."
    if cause != "graded" or reward >= 0.5:
        return ""
    answer = extract_answer(text)
    if answer is None:
        return "No final answer was found in the response."
    return f"The final answer {answer[:_QUOTED_CHARS]} is not correct."


def last_boxed(text: str) -> str | None:
    """Content of the complete box that closes last, braces balanced."""
    content: str | None = None
    open_braces: list[int | None] = []  # where a box's content starts; None for other braces
    for brace in _BRACE.finditer(text):
        if brace["box"]:
            open_braces.append(brace.end())
        elif brace.group() == "{":
            open_braces.append(None)
        elif brace.group() == "}" and open_braces:
            start = open_braces.pop()
            content = content if start is None else text[start : brace.start()].strip()
    return content


@lru_cache(maxsize=1024)
def _parse_reference(reference: str) -> tuple[Any, ...]:
    """The parsed reference; cached because a whole group of rollouts shares it."""
    gold = _parse(reference) if reference else []
    if not gold:
        raise RewardError(
            f"The reference answer {reference[:80]!r} cannot be read as a number or LaTeX: correct the answer of this "
            "prompt in the data."
        )
    return tuple(gold)


def _parse(answer: str) -> list[Any]:
    """What the answer can be read as: an expression, where it is one, and its normalised text."""
    read = parse(f"\\boxed{{{answer}}}", _LATEX, parsing_timeout=None)
    try:
        return [plain for item in read if (plain := _with_plain_names(item)) is not None]
    except RecursionError:  # nested deeper than sympy can walk: it counts as a text
        return [item for item in read if isinstance(item, str)]


def _with_plain_names(read: Any) -> Any:
    """The same expression without names that would mean something in Python code; None where one cannot be changed."""
    if not isinstance(read, Basic | MatrixBase):
        return read
    symbols = [symbol for symbol in read.atoms(Symbol) if not _PLAIN_NAME.fullmatch(symbol.name)]
    if symbols:
        read = read.xreplace({symbol: Symbol(_spelled(symbol.name), **symbol.assumptions0) for symbol in symbols})
    functions = {function.func.__name__ for function in read.atoms(AppliedUndef)}
    names = functions | {text.name for text in read.atoms(Str)}
    is_plain = functions.isdisjoint(dir(builtins)) and all(map(_PLAIN_NAME.fullmatch, names))
    return read if is_plain else None


def _spelled(name: str) -> str:
    return _NO_WORD.sub(lambda character: f"_{ord(character[0]):x}_", name)
