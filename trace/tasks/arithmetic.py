"""Labelled running sums: a language task with one written step a line and errors that a rule can locate.

    question    Start with 47. Step 1: add 38. Step 2: subtract 15.
    completion  Step 1: 47 + 38 = 85
                Step 2: 85 - 15 = 70
                \\boxed{70}

This module decides the questions, their train/held-out split and what counts as the first wrong piece of a
completion. It must not know who writes completions, how they are graded or how spans reach tokens.

Invariants:
* A question is a pure function of (difficulty, seed, split, index); nothing is stored and no global state is read.
* Train and held-out questions are disjoint for every seed and difficulty: a hash of the text owns each question.
* `first_error` and the spans depend on the question and the text alone and never raise on any text.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trace_rl.batch import Prompt
from trace_rl.errors import ConfigError, DataError, ModelError

Split = Literal["train", "heldout"]
ErrorKind = Literal["copy", "operand", "arith", "format", "final"]

ERROR_TYPES: Mapping[str, str] = {
    "copy": "the running total was not copied from the line before",
    "operand": "the operation or its number was misread from the question",
    "arith": "the result of a sum or difference is wrong",
    "format": "the line is not the next written step",
    "final": "the boxed answer is missing or differs from the last total",
}
"""Closed list of diagnostic types in canonical order, each with one line of meaning."""

HELDOUT_FRACTION_INVERSE = 10
"""One question in this many belongs to the held-out split."""
MAX_DRAWS = 2000
"""Draws before a split counts as empty; a split with a tenth of the questions survives with odds of 1 in 10^91."""

CARRY_IMPORTANCE = 2.0
"""Importance of a result that needs a carry or borrow, relative to 1 for the others."""

_START = re.compile(r"Start with ([0-9]{1,18})\.")
_INSTRUCTION = re.compile(r" Step ([0-9]+): (add|subtract) ([0-9]{1,18})\.")
_WRITTEN_STEP = re.compile(r"Step ([0-9]+): ([0-9]+) ([+-]) ([0-9]+) = ([0-9]+)")
_WRITTEN_ANSWER = re.compile(r"\\boxed\{([0-9]+)\}\s*")
_VERBS = {"+": "add", "-": "subtract"}
_SIGNS = {verb: sign for sign, verb in _VERBS.items()}


class ArithmeticDifficulty(BaseModel):
    """How hard the running sums are; totals never leave [0, max_total]."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    min_steps: int = Field(default=4, ge=1)
    """Fewest steps of a question."""
    max_steps: int = Field(default=6, ge=1)
    """Most steps of a question."""
    min_operand: int = Field(default=2, ge=1)
    """Smallest number that is added or subtracted."""
    max_operand: int = Field(default=19, ge=1)
    """Largest number that is added or subtracted."""
    max_total: int = Field(default=99, ge=1)
    """Largest running total."""
    max_start: int = Field(default=29, ge=1)
    """Largest first number; the smallest is 1."""

    @model_validator(mode="after")
    def _check_ranges(self) -> ArithmeticDifficulty:
        for low, high in (("min_steps", "max_steps"), ("min_operand", "max_operand"), ("max_start", "max_total")):
            low_value, high_value = getattr(self, low), getattr(self, high)
            if low_value > high_value:
                raise ConfigError(f"{low}={low_value} exceeds {high}={high_value}: raise {high} or lower {low}.")
        needed = 2 * self.max_operand - 1
        if self.max_total < needed:
            raise ConfigError(
                f"max_total={self.max_total} leaves totals from which {self.max_operand} can be neither added nor "
                f"subtracted: set max_total to at least 2 * max_operand - 1 = {needed}, or lower max_operand."
            )
        return self


class Step(NamedTuple):
    """One operation on the running total."""

    left: int
    sign: str
    operand: int
    result: int

    @property
    def has_carry(self) -> bool:
        """Whether some decimal column carries (+) or borrows (-).

        Adding x and y carries exactly when digit_sum(x) + digit_sum(y) != digit_sum(x + y); a difference borrows
        exactly when the sum that undoes it carries.
        """
        low, high = (self.left, self.result) if self.sign == "+" else (self.result, self.left)
        return _digit_sum(low) + _digit_sum(self.operand) != _digit_sum(high)


class FirstError(NamedTuple):
    """The first wrong piece of a completion: text[char_start:char_end], on the 0-based line `line`."""

    line: int
    char_start: int
    char_end: int
    kind: ErrorKind


def apply(left: int, sign: str, operand: int) -> Step:
    """The step that is computed without error."""
    return Step(left, sign, operand, left + operand if sign == "+" else left - operand)


def question_at(difficulty: ArithmeticDifficulty, seed: int, split: Split, index: int) -> Prompt:
    """The question at a data position, with answer and worked solution.

    Raises:
        DataError: the difficulty leaves (next to) no question for this split.
    """
    for attempt in range(MAX_DRAWS):
        rng = random.Random(f"arithmetic/{seed}/{split}/{index}/{attempt}")
        steps = _draw_steps(difficulty, rng)
        question = write_question(steps)
        if split_of(question) == split:
            return Prompt(
                prompt_id=f"arithmetic/{split}/{index}",
                question=question,
                answer=str(steps[-1].result),
                solution=write_solution(steps),
                metadata={"task": "arithmetic", "num_steps": str(len(steps))},
            )
    raise DataError(
        f"No {split} question was found for {difficulty!r} in {MAX_DRAWS} draws: "
        "the question space is too small, widen the ranges of steps or operands."
    )


def split_of(question: str) -> Split:
    """The split that owns a question, by a hash of its text."""
    digest = hashlib.sha256(question.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_FRACTION_INVERSE == 0 else "train"


def write_question(steps: Sequence[Step]) -> str:
    """The question whose correct steps are `steps`."""
    instructions = (f" Step {i}: {_VERBS[step.sign]} {step.operand}." for i, step in enumerate(steps, start=1))
    return f"Start with {steps[0].left}." + "".join(instructions)


def parse_question(question: str) -> tuple[Step, ...]:
    """The correct steps of a question.

    Raises:
        DataError: the text is not a question of this task.
    """
    start = _START.match(question)
    instructions = list(_INSTRUCTION.finditer(question, start.end())) if start else []
    if start is None or not instructions or start.group() + "".join(m.group() for m in instructions) != question:
        raise DataError(
            f"The question {question[:80]!r} is not a running sum ('Start with 47. Step 1: add 38.'): "
            "use the arithmetic rule only with questions of trace_rl.tasks.arithmetic."
        )
    total, steps = int(start.group(1)), []
    for match in instructions:
        steps.append(apply(total, _SIGNS[match.group(2)], int(match.group(3))))
        total = steps[-1].result
    return tuple(steps)


def write_step(number: int, step: Step) -> str:
    """One line of a completion; `number` counts from 1."""
    return f"Step {number}: {step.left} {step.sign} {step.operand} = {step.result}"


def write_answer(answer: int) -> str:
    """The last line of a completion."""
    return f"\\boxed{{{answer}}}"


def write_solution(steps: Sequence[Step]) -> str:
    """The completion that writes `steps` and boxes the last total."""
    lines = [write_step(i, step) for i, step in enumerate(steps, start=1)]
    return "\n".join([*lines, write_answer(steps[-1].result)])


def first_error(prompt: Prompt, text: str) -> FirstError | None:
    """The first piece of `text` that differs from the correct completion; None where there is no such piece.

    Within a line the pieces are checked in the order of reading: form, copied total, operation, result. Text after
    the boxed answer is not judged.

    Raises:
        DataError: the prompt is not a question of this task (never because of `text`).
    """
    steps = parse_question(prompt.question)
    lines = text.split("\n")
    start = 0
    for index, step in enumerate(steps):
        line = lines[index] if index < len(lines) else ""
        start = min(start, len(text))
        error = _step_error(index, step, line, start)
        if error is not None:
            return error
        start += len(line) + 1
    line = lines[len(steps)] if len(steps) < len(lines) else ""
    start = min(start, len(text))
    boxed = _WRITTEN_ANSWER.fullmatch(line)
    if boxed is None:
        return FirstError(len(steps), start, start + len(line), "final")
    if not _is_number(boxed.group(1), steps[-1].result):
        return FirstError(len(steps), start + boxed.start(1), start + boxed.end(1), "final")
    return None


class ArithmeticRule:
    """Where a completion decides the answer and where it first goes wrong (implements `ErrorRule`)."""

    types: Mapping[str, str] = ERROR_TYPES

    def key_spans(self, prompt: Prompt, text: str) -> Sequence[tuple[int, int, str, float]]:
        """The computed results up to the first error; those that carry or borrow count more."""
        steps = parse_question(prompt.question)
        error = first_error(prompt, text)
        spans, start = [], 0
        for index, line in enumerate(text.split("\n")[: len(steps)]):
            written = _WRITTEN_STEP.fullmatch(line)
            if written is None or (error is not None and index >= error.line):
                break
            importance = CARRY_IMPORTANCE if steps[index].has_carry else 1.0
            spans.append((start + written.start(5), start + written.end(5), "arith", importance))
            start += len(line) + 1
        return spans

    def error_spans(self, prompt: Prompt, text: str) -> Sequence[tuple[int, int, str, float]]:
        """The first wrong piece; none where only the form failed or where nothing was written."""
        error = first_error(prompt, text)
        if error is None or error.kind == "format" or error.char_start == error.char_end:
            return []
        return [(error.char_start, error.char_end, error.kind, 1.0)]


def base_model_path() -> Path:
    """Folder of the shipped base model, in the layout of `transformers.from_pretrained`.

    Raises:
        ModelError: the folder is not part of the installation.
    """
    path = Path(str(resources.files("trace_rl.tasks"))) / "arithmetic_base"
    if not (path / "config.json").is_file():
        raise ModelError(
            f"The base model of the arithmetic task is missing at {path}: "
            "reinstall trace-rl, or make it with `python -m trace_rl.launch.arithmetic_base`."
        )
    return path


def _draw_steps(difficulty: ArithmeticDifficulty, rng: random.Random) -> tuple[Step, ...]:
    total = _draw(rng, 1, difficulty.max_start)
    steps = []
    for _ in range(_draw(rng, difficulty.min_steps, difficulty.max_steps)):
        operand = _draw(rng, difficulty.min_operand, difficulty.max_operand)
        signs = [
            sign
            for sign, is_open in (("+", total + operand <= difficulty.max_total), ("-", total >= operand))
            if is_open
        ]
        steps.append(apply(total, signs[_draw(rng, 0, len(signs) - 1)], operand))
        total = steps[-1].result
    return tuple(steps)


def _draw(rng: random.Random, low: int, high: int) -> int:
    """An integer in [low, high]; only `random()` is promised to give the same stream in every Python version."""
    return low + int(rng.random() * (high - low + 1))


def _step_error(index: int, step: Step, line: str, start: int) -> FirstError | None:
    """What is wrong with the line that should write `step`; `start` is the line's offset in the text."""
    written = _WRITTEN_STEP.fullmatch(line)
    if written is None:
        kind: ErrorKind = "final" if _WRITTEN_ANSWER.fullmatch(line) else "format"
        return FirstError(index, start, start + len(line), kind)
    if not _is_number(written.group(1), index + 1):
        return FirstError(index, start + written.start(1), start + written.end(1), "format")
    if not _is_number(written.group(2), step.left):
        return FirstError(index, start + written.start(2), start + written.end(2), "copy")
    if written.group(3) != step.sign or not _is_number(written.group(4), step.operand):
        return FirstError(index, *_wrong_operation(written, step, start), "operand")
    if not _is_number(written.group(5), step.result):
        return FirstError(index, start + written.start(5), start + written.end(5), "arith")
    return None


def _wrong_operation(written: re.Match[str], step: Step, start: int) -> tuple[int, int]:
    """From the first wrong of (sign, number) to the last wrong one, as offsets in the text."""
    first = 3 if written.group(3) != step.sign else 4
    last = 4 if not _is_number(written.group(4), step.operand) else 3
    return start + written.start(first), start + written.end(last)


def _is_number(written: str, value: int) -> bool:
    """Compares as text: int() refuses numbers of more than 4,300 digits, and a model can write those."""
    return (written.lstrip("0") or "0") == str(value)


def _digit_sum(number: int) -> int:
    return sum(int(digit) for digit in str(number))
