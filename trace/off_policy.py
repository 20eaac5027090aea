"""Completions that the policy has not sampled: written by the data's reference solutions or by a teacher.

Each source is a `trace_rl.protocols.Generator`, so the loop does not know whose completions it trains on. Their
log-probs are NaN and their version is NOT_THE_POLICY: nothing that compares with the sampler may use them.

Must not know what is trained on the completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np

from trace_rl.batch import NOT_THE_POLICY, Rollout, RolloutKey, RolloutRequest
from trace_rl.errors import DataError
from trace_rl.prompts import derive_seed
from trace_rl.protocols import Decoding, Generator


class TextEncoder(Protocol):
    """The part of a Hugging Face tokenizer that written completions need."""

    eos_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class SolutionGenerator:
    """The reference solution of each prompt as if the policy had written it: its tokens, and end-of-sequence."""

    tokenizer: TextEncoder
    max_tokens: int
    """Longer solutions are cut there and count as truncated."""

    def generate(self, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        """One rollout per request; all samples of a prompt are the same, and `decoding` does not matter.

        The text is the whole solution, also where the tokens are cut: a truncated completion is graded 0 unread.

        Raises:
            DataError: a prompt has no solution.
        """
        for request in requests:
            text = request.prompt.solution
            if not text:
                raise DataError(
                    f"prompt {request.prompt.prompt_id} has no reference solution to train on, which sampling.source = "
                    "solutions asks for; add `solution` to the row, or set sampling.source=policy"
                )
            ids = (*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id)
            is_cut = len(ids) > self.max_tokens
            yield Rollout(
                prompt=request.prompt,
                sample=request.sample,
                prompt_token_ids=request.prompt_token_ids,
                token_ids=tuple(map(int, ids[: self.max_tokens])),
                rollout_logprobs=np.full(min(len(ids), self.max_tokens), np.nan, dtype=np.float32),
                finish_reason="length" if is_cut else "stop",
                token_versions=np.full(min(len(ids), self.max_tokens), NOT_THE_POLICY),
                text=text,
            )

    def cancel(self, keys: Sequence[RolloutKey]) -> None:
        """Nothing is left to give up: all were there at once."""


@dataclass(frozen=True)
class TeacherGenerator:
    """What another model samples of the student's prompts (sequence-level distillation, arXiv:1606.07947)."""

    generator: Generator
    """Samples from engines that hold the other model's weights."""

    def generate(self, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        """Submit everything now; iterate to receive."""
        return map(_as_off_policy, self.generator.generate(requests, decoding))

    def cancel(self, keys: Sequence[RolloutKey]) -> None:
        """Give up completions of open calls."""
        self.generator.cancel(keys)


@dataclass(frozen=True)
class MixedGenerator:
    """Some prompts are answered by the policy, the others by a source; all completions of a prompt by one of them."""

    policy: Generator
    source: Generator
    source_frac: float
    """Probability that a prompt falls to the source, 1 - lambda of arXiv:2306.13649, algorithm 1; drawn anew at each
    step."""

    def generate(self, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        """Submit to both sides now; iterate to receive.

        `requests` must hold all samples of a prompt, since the first one decides for them.
        """
        chosen = self._chosen(requests)
        of_source = [request for request in requests if request.prompt.prompt_id in chosen]
        of_policy = [request for request in requests if request.prompt.prompt_id not in chosen]
        # solutions are there at once, so they come first: they are graded while the policy samples
        parts = [part for part in ((self.source, of_source), (self.policy, of_policy)) if part[1]]
        return chain.from_iterable([generator.generate(mine, decoding) for generator, mine in parts])

    def cancel(self, keys: Sequence[RolloutKey]) -> None:
        """Give up completions of open calls, on whichever side they are."""
        self.policy.cancel(keys)
        self.source.cancel(keys)

    def _chosen(self, requests: Sequence[RolloutRequest]) -> set[str]:
        """Prompts of the source: decided by the seed of their first sample, which holds the run's seed and the step."""
        first: dict[str, RolloutRequest] = {}
        for request in requests:
            kept = first.setdefault(request.prompt.prompt_id, request)
            if request.sample < kept.sample:
                first[request.prompt.prompt_id] = request
        return {
            name
            for name, request in first.items()
            if np.random.default_rng(derive_seed("source", request.seed)).random() < self.source_frac
        }


def _as_off_policy(rollout: Rollout) -> Rollout:
    time = len(rollout.token_ids)
    unknown = np.full(time, np.nan, dtype=np.float32)
    return replace(rollout, rollout_logprobs=unknown, token_versions=np.full(time, NOT_THE_POLICY))
