"""What a step is expected to hold: how long prompts and responses are, and what the routes take of them.

A configuration gives bounds only, so without anything else every sequence is as long as it may be, and every rollout
has as many routed tokens as it may have. `--expect` replaces that by what a run was seen to do; the metrics of a run
folder have most of it. Must not know hardware or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pydantic import Field

from trace_rl.config.base import Section
from trace_rl.config.run import RunConfig
from trace_rl.overlays import load_as
from trace_rl.selectors import ErrorSpans, Inverted, KeySpans, Random, TokenSelector

_PARTS = 64
"""Lengths that stand for a distribution."""


class Expected(Section):
    """What is expected of a run; 0 in a field that has a bound: that bound."""

    prompt_tokens: float = Field(0.0, ge=0)
    """Mean length of a prompt; 0: sampling.max_prompt_tokens."""
    response_tokens: float = Field(0.0, ge=0)
    """Mean length of a response before the budget cuts it (response/length_mean_tokens where little is truncated);
    0: sampling.max_response_tokens."""
    response_spread: float = Field(1.0, ge=0, le=3)
    """Sigma of log-normal lengths around that mean: at 1 the 99th percentile is 10 times the median, as in
    arXiv:2509.21009 and arXiv:2510.12633."""
    context_tokens: float = Field(0.0, ge=0)
    """By how much the teacher's prompt is longer than the student's."""
    routed_rollouts_frac: float = Field(1.0, ge=0, le=1)
    """Share of rollouts with a routed token, at steps with routes (route/rollouts_frac)."""
    routed_tokens_frac: float = Field(0.0, ge=0, le=1)
    """Share of all response tokens that is routed (route/token_frac); 0: as many as the caps let through."""
    routed_reach_frac: float = Field(1.0, gt=0, le=1)
    """Where in a response its last routed token is; the teacher reads no further."""
    annotation_s: float = Field(0.0, ge=0)
    """What the annotator's model takes for one reply, in seconds."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the responses of a step, in tokens."""

    quantiles: tuple[float, ...]
    """Equally likely lengths, ascending: they stand for the distribution, or are all there are."""
    longest: float
    """Of the step; not less than any quantile has to be, since a step of many responses reaches further."""

    @staticmethod
    def log_normal(mean: float, sigma: float, cut: float, count: int) -> Lengths:
        """log R ~ N(log(mean) - sigma^2 / 2, sigma^2), cut off at `cut`; the longest of `count` is their quantile
        count / (count + 1)."""
        normal = NormalDist(math.log(mean) - sigma**2 / 2, sigma) if sigma else None

        def at(share: float) -> float:
            return min(cut, math.exp(normal.inv_cdf(share)) if normal else mean)

        return Lengths(tuple(at((part + 0.5) / _PARTS) for part in range(_PARTS)), at(count / (count + 1)))

    @staticmethod
    def of(lengths: Sequence[int]) -> Lengths:
        """Those that were counted."""
        return Lengths(tuple(sorted(float(each) for each in lengths)), float(max(lengths)))

    @property
    def mean(self) -> float:
        return sum(self.quantiles) / len(self.quantiles)

    @property
    def mean_square(self) -> float:
        return sum(each**2 for each in self.quantiles) / len(self.quantiles)


@dataclass(frozen=True)
class Workload:
    """One step, as far as its cost depends on what is sampled."""

    prompts: int
    samples: int
    prompt_tokens: float
    responses: Lengths
    context_tokens: float
    """By how much the teacher's prompts are longer; below 0 where samples share a prompt that is computed once."""
    routed_rollouts_frac: float
    routed_tokens_frac: float
    """Of all response tokens."""
    routed_reach_frac: float
    annotation_s: float
    """0 where no model is asked, or it is not known."""
    is_at_full_length: bool

    @property
    def num_rollouts(self) -> int:
        return self.prompts * self.samples


def expected(settings: Sequence[str]) -> Expected:
    """What `--expect KEY=VALUE ...` says.

    Raises:
        ConfigError: a key is not known, or its value is out of range.
    """
    return load_as(Expected, [], settings)


def workload(config: RunConfig, given: Expected) -> Workload:
    """A step with active routes."""
    sampling = config.sampling
    cut, count = sampling.max_response_tokens, sampling.prompts_per_step * sampling.samples_per_prompt
    mean = given.response_tokens
    responses = Lengths.log_normal(mean, given.response_spread, cut, count) if mean else Lengths((float(cut),), cut)
    return Workload(
        prompts=sampling.prompts_per_step,
        samples=sampling.samples_per_prompt,
        prompt_tokens=min(given.prompt_tokens or sampling.max_prompt_tokens, sampling.max_prompt_tokens),
        responses=responses,
        context_tokens=given.context_tokens,
        routed_rollouts_frac=given.routed_rollouts_frac,
        routed_tokens_frac=given.routed_tokens_frac or routed_tokens_at_most(config) * given.routed_rollouts_frac,
        routed_reach_frac=given.routed_reach_frac,
        annotation_s=given.annotation_s,
        is_at_full_length=not mean,
    )


def routed_tokens_at_most(config: RunConfig) -> float:
    """Largest share of a response that routes may take together, given that it is either correct or wrong."""

    def of(kind: str, other: str) -> float:
        return sum(
            min(route.selector.max_coverage, _bound(route.selector.tokens, config.annotator.coverage_cap))
            for route in config.algorithm.routes.values()
            if route.reads and not any(other in each for each in route.selector.rollouts)
        )

    return min(1.0, max(of("correct", "wrong"), of("wrong", "correct")))


def _bound(tokens: TokenSelector, cap: float) -> float:
    """Largest share of a response that a selector takes; of ranked tokens all are candidates, which are asked for."""
    if isinstance(tokens, Random | Inverted):
        return tokens.frac or cap
    return cap if isinstance(tokens, KeySpans | ErrorSpans) else 1.0


def busy_steps(config: RunConfig) -> list[int]:
    """Steps at which a route reads a teacher."""
    routes = [route for route in config.algorithm.routes.values() if route.reads]
    return [step for step in range(config.run.steps) if any(route.is_active(step) for route in routes)]
