"""What the samples of an evaluation say: one record a sample, and the metrics of a set with their intervals.

Decides what is stored of a sample, which answers count as the same vote, and over what metrics are taken: problems are
the units, whatever the number of samples. Must not know files, engines or tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from jaxtyping import Float

from trace_rl.batch import FinishReason, GradeCause, GradedRollout, RolloutRequest
from trace_rl.config.evaluation import EvalSet
from trace_rl.plain_answers import chosen_letter
from trace_rl.rewards import extract_answer
from trace_rl.statistics import Interval, avg_at_k, bootstrap_mean, maj_at_k, pass_at_k, powers_of_two

_SPACING = re.compile(r"\s+|\\[,;:! ]|\$")
_FRACTION = re.compile(r"\\[dt]frac")
_VOTE_CHARS = 200


@dataclass(frozen=True)
class Sample:
    """One graded response as it is stored."""

    prompt_id: str
    sample: int
    asked: str
    """Digest of what was asked and expected, by which a stored sample is known to belong to today's problem."""
    seed: int
    reward: float
    cause: GradeCause
    answer: str
    """What the response ends on; empty where nothing looks like an answer."""
    expected: str
    num_tokens: int
    finish_reason: FinishReason
    text: str


@dataclass(frozen=True)
class SetScore:
    """The metrics of one set."""

    name: str
    num_problems: int
    k: int
    """Samples of every problem."""
    rewards: Float[np.ndarray, " problem"]
    """avg@k of each problem, in the order of their ids: what two checkpoints are compared by."""
    metrics: Mapping[str, Interval]
    """By name: avg@k, pass@1, pass@2, ..., maj@k, length_mean_tokens, truncated_frac."""
    num_failures: int
    """Samples whose grading failed (deadline or error); they count as wrong."""


def digest(request: RolloutRequest) -> str:
    """Of a request's prompt and expected answer."""
    text = f"{request.prompt_token_ids}\x1f{request.prompt.answer}"
    return blake2b(text.encode(), digest_size=8).hexdigest()


def to_sample(graded: GradedRollout, request: RolloutRequest, settings: EvalSet) -> Sample:
    """What is stored of a graded response to a request of a set."""
    rollout = graded.rollout
    answer = chosen_letter(rollout.text) if settings.answer_form == "letter" else extract_answer(rollout.text)
    return Sample(
        prompt_id=rollout.prompt.prompt_id,
        sample=rollout.sample,
        asked=digest(request),
        seed=request.seed,
        reward=graded.reward,
        cause=graded.cause,
        answer=(answer or "")[:_VOTE_CHARS],
        expected=rollout.prompt.answer,
        num_tokens=len(rollout.token_ids),
        finish_reason=rollout.finish_reason,
        text=rollout.text,
    )


def vote(sample: Sample) -> str:
    """The answer that a sample votes for; empty for none.

    All correct answers are one, however they are written. Wrong answers are the same where their text is, up to spaces
    and the size of fractions; wrong answers that are only equal in value split their votes, which favours maj@k a
    little. A truncated response has no answer.
    """
    if sample.cause == "truncated":
        return ""
    if sample.reward >= 0.5:
        return "the expected answer"
    return _FRACTION.sub(r"\\frac", _SPACING.sub("", sample.answer)).rstrip(".")


def score(settings: EvalSet, samples: Sequence[Sample], seed: int = 0) -> SetScore:
    """The metrics of a set of which every problem has equally many samples, numbered from 0.

    Args:
        seed: of the intervals' resampling.

    Raises:
        ValueError: a problem lacks a sample.
    """
    problems = sorted({sample.prompt_id for sample in samples})
    by_key = {(sample.prompt_id, sample.sample): sample for sample in samples}
    k = len(by_key) // len(problems)
    try:
        rows = [[by_key[problem, number] for number in range(k)] for problem in problems]
    except KeyError as error:
        raise ValueError(f"set {settings.name} lacks sample {error}; finish the evaluation first") from None
    if len(by_key) != k * len(problems):
        raise ValueError(f"set {settings.name} has not equally many samples of every problem; finish it first")
    rewards = np.array([[sample.reward for sample in row] for row in rows])
    per_problem = _per_problem(rows, rewards, k)
    return SetScore(
        name=settings.name,
        num_problems=len(problems),
        k=k,
        rewards=avg_at_k(rewards),
        metrics={name: bootstrap_mean(values, seed) for name, values in per_problem.items()},
        num_failures=sum(sample.cause in ("timeout", "error") for sample in samples),
    )


def _per_problem(
    rows: Sequence[Sequence[Sample]], rewards: Float[np.ndarray, "problem sample"], k: int
) -> dict[str, Float[np.ndarray, " problem"]]:
    """Each metric of each problem."""
    num_correct = (rewards >= 0.5).sum(axis=1)
    votes = [[vote(sample) for sample in row] for row in rows]
    majority = [maj_at_k(given, list(earned)) for given, earned in zip(votes, rewards, strict=True)]
    lengths = np.array([[sample.num_tokens for sample in row] for row in rows], dtype=np.float64)
    truncated = np.array([[sample.finish_reason == "length" for sample in row] for row in rows], dtype=np.float64)
    return {
        f"avg@{k}": avg_at_k(rewards),
        **{f"pass@{power}": pass_at_k(num_correct, k, power) for power in powers_of_two(k)},
        f"maj@{k}": np.array(majority),
        "length_mean_tokens": lengths.mean(axis=1),
        "truncated_frac": truncated.mean(axis=1),
    }
