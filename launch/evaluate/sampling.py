"""From problems to stored samples: what is asked, what is missing, and the stream from engines to the store.

Must not know Ray: generators and graders are `trace_rl.protocols`, so tests drive it with fakes that behave.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trace_rl.batch import Prompt, Rollout, RolloutRequest
from trace_rl.config.evaluation import EvalConfig, EvalSet
from trace_rl.errors import DataError
from trace_rl.evaluation import Sample, to_sample
from trace_rl.launch.evaluate.store import SampleStore
from trace_rl.launch.evaluate.subjects import Subject
from trace_rl.launch.model_files import load_tokenizer, max_positions
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import Decoding, Grader

logger = logging.getLogger(__name__)

Generate = Callable[[EvalSet, Sequence[RolloutRequest], Decoding], Iterator[Rollout]]
"""Submits all requests of a set at once; iterate to receive."""


@dataclass(frozen=True)
class Asked:
    """One checkpoint on one set."""

    settings: EvalSet
    requests: Sequence[RolloutRequest]
    """Of all samples, by problem and number."""
    store: SampleStore

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus response, in tokens."""
        longest = max(len(request.prompt_token_ids) for request in self.requests)
        return longest + self.settings.max_response_tokens

    def samples(self) -> list[Sample]:
        return self.store.samples(self.requests)


def requests_of(
    encoder: PromptEncoder, settings: EvalSet, problems: Sequence[Prompt], seed: int
) -> list[RolloutRequest]:
    """All requests of a set; seeds depend on (seed, set, problem, sample) and on no order."""
    asking = encoder.with_template_kwargs(settings.template_kwargs)
    return asking.requests(problems, settings.samples_per_problem, seed, settings.name)


def encoder_of(subject: Subject) -> PromptEncoder:
    """How a checkpoint is asked.

    Raises:
        ModelError: it has no tokenizer, or that has no chat template.
    """
    tokenizer = load_tokenizer(subject.model, f"the checkpoint {subject.label}")
    return PromptEncoder(tokenizer, subject.system_prompt, subject.model.chat_template_kwargs)


def warn_of_idle_thinking(encoder: PromptEncoder, settings: EvalSet, problem: Prompt) -> None:
    """Say where a chat template makes the same prompt with thinking on and off, although the set asks for one."""
    if settings.thinking == "template":
        return
    both = [encoder.with_template_kwargs({"enable_thinking": flag}).student_ids(problem) for flag in (True, False)]
    if both[0] == both[1]:
        logger.warning(
            "set %s has thinking %s, but the checkpoint's chat template makes the same prompt either way",
            settings.name,
            settings.thinking,
        )


def check_lengths(subject: Subject, settings: EvalSet, requests: Sequence[RolloutRequest]) -> None:
    """Refuse a set whose responses would not fit into the model.

    Raises:
        DataError: prompt and response budget together are longer than the model's positions.
    """
    limit = max_positions(subject.model)
    longest = max(len(request.prompt_token_ids) for request in requests)
    if limit is not None and longest + settings.max_response_tokens > limit:
        raise DataError(
            f"set {settings.name} has prompts of up to {longest} tokens and a budget of {settings.max_response_tokens} "
            f"tokens for a response (max_response_tokens), but {subject.label} was made for sequences of {limit}; set "
            f"all_sets.max_response_tokens to at most {max(1, limit - longest)}"
        )


def collect(
    asked: Sequence[Asked],
    generate: Generate,
    grader_of: Callable[[EvalSet], Grader],
    tell: Callable[[EvalSet, int, int], None] = lambda settings, done, total: None,
) -> None:
    """Draw, grade and store what is missing. All sets are submitted at once, and are stored one after another.

    Args:
        tell: is told after each sample how many of a set are stored, and of how many.
    """
    missing = [item.store.missing(item.requests) for item in asked]
    streams = [_stream(item.settings, wanted, generate) for item, wanted in zip(asked, missing, strict=True)]
    for item, wanted, rollouts in zip(asked, missing, streams, strict=True):
        total = len(item.requests)
        done = total - len(wanted)
        tell(item.settings, done, total)
        if not wanted:
            continue
        by_key = {(request.prompt.prompt_id, request.sample): request for request in wanted}
        for graded in grader_of(item.settings).grade(rollouts):
            item.store.add(to_sample(graded, by_key[graded.rollout.key], item.settings))
            done += 1
            tell(item.settings, done, total)


def _stream(settings: EvalSet, wanted: Sequence[RolloutRequest], generate: Generate) -> Iterator[Rollout]:
    if not wanted:
        return iter(())
    return generate(settings, wanted, Decoding(settings.temperature, settings.top_p, settings.top_k))


def prepare(
    subject: Subject, config: EvalConfig, problems: Sequence[Sequence[Prompt]], open_store: Callable[..., SampleStore]
) -> list[Asked]:
    """What a checkpoint is asked on all sets.

    Args:
        problems: of each set.
        open_store: makes the open store of a set.

    Raises:
        DataError, ModelError: the checkpoint cannot be asked this, or its folder holds another evaluation.
    """
    encoder = encoder_of(subject)
    asked = []
    for settings, of_set in zip(config.sets, problems, strict=True):
        requests = requests_of(encoder, settings, of_set, config.seed)
        check_lengths(subject, settings, requests)
        warn_of_idle_thinking(encoder, settings, of_set[0])
        asked.append(Asked(settings, requests, open_store(subject, settings)))
    return asked
