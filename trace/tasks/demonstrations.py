"""Written completions that a base model of the arithmetic task is taught from, slips included.

This module decides what a slip of each kind looks like and how a reference that must be read is made. A slip is
carried on: later lines compute from the wrong total, as a model does that went wrong. It must not know how the
texts are tokenised or trained on. All randomness comes from the caller's generator.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from trace_rl.tasks.arithmetic import ErrorKind, Step, apply, write_answer, write_solution, write_step


@dataclass(frozen=True)
class SlipRates:
    """Probability of each kind of slip: per line, and for `final` per completion."""

    arith_carry: float = 0.16
    """A wrong result where a column carries or borrows."""
    arith_plain: float = 0.05
    """A wrong result elsewhere."""
    copy: float = 0.02
    operand: float = 0.02
    format: float = 0.005
    final: float = 0.02

    def scaled(self, factor: float) -> SlipRates:
        """All rates times `factor`."""
        return SlipRates(**{name: rate * factor for name, rate in asdict(self).items()})


def demonstrate(steps: Sequence[Step], rates: SlipRates, free_of: Collection[str], rng: random.Random) -> str:
    """A completion for the question of `steps` with slips at the given rates, but none of the kinds in `free_of`."""

    def slips(kind: ErrorKind, rate: float) -> bool:
        # The draw is made in any case, so that a label changes its own kind of slip and nothing else.
        return rng.random() < rate and kind not in free_of

    total, lines = steps[0].left, []
    for number, correct in enumerate(steps, start=1):
        if slips("format", rates.format):
            lines.append(f"Step {number}: {total} {correct.sign} = {total}")
            continue
        left = near_miss(total, rng) if slips("copy", rates.copy) else total
        sign, operand = correct.sign, correct.operand
        if slips("operand", rates.operand):
            sign, operand = misread(sign, operand, rng)
        step = computed(left, sign, operand)
        if slips("arith", rates.arith_carry if step.has_carry else rates.arith_plain):
            step = step._replace(result=wrong_result(step, rng))
        lines.append(write_step(number, step))
        total = step.result
    answer = near_miss(total, rng) if slips("final", rates.final) else total
    return "\n".join([*lines, write_answer(answer)])


def counterfactual_solution(steps: Sequence[Step], max_total: int, rate: float, rng: random.Random) -> str:
    """A solution in which each result is replaced with probability `rate` and then carried on.

    Whoever reproduces it has read it: it cannot be computed from the question.
    """
    total, written = steps[0].left, []
    for correct in steps:
        step = computed(total, correct.sign, correct.operand)
        if rng.random() < rate:
            step = step._replace(result=rng.randint(0, max_total))
        written.append(step)
        total = step.result
    return write_solution(written)


def computed(left: int, sign: str, operand: int) -> Step:
    """The step without a slip; after an earlier slip a difference may pass zero, and then stays at zero."""
    step = apply(left, sign, operand)
    return step._replace(result=max(0, step.result))


def near_miss(value: int, rng: random.Random) -> int:
    """Another number that differs in one digit or by a neighbouring value."""
    return rng.choice([other for delta in (-10, -1, 1, 10) if (other := value + delta) >= 0])


def misread(sign: str, operand: int, rng: random.Random) -> tuple[str, int]:
    """The other operation, or another number."""
    if rng.random() < 0.5:
        return ("-" if sign == "+" else "+"), operand
    return sign, near_miss(operand, rng)


def wrong_result(step: Step, rng: random.Random) -> int:
    """A carry or borrow that was forgotten, or else a near miss."""
    forgotten = step.result - 10 if step.sign == "+" else step.result + 10
    if step.has_carry and forgotten >= 0 and rng.random() < 0.5:
        return forgotten
    return near_miss(step.result, rng)
