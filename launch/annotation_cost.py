"""What an annotator that is asked over a whole run will take: requests, tokens, money and time, before any is spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trace_rl.annotation_prompts import render
from trace_rl.annotators import LanguageModel
from trace_rl.batch import GradedRollout, SpanClass
from trace_rl.config.run import RunConfig
from trace_rl.errors import DataError
from trace_rl.routing import active_span_classes
from trace_rl.segments import read_tokens
from trace_rl.workers.annotator import is_wanted
from trace_rl.workers.span_annotator import AnnotationTask, Surroundings, annotation_request
from trace_rl.workers.token_reader import TokenReader

_BOTH: frozenset[SpanClass] = frozenset({"key", "error"})


@dataclass(frozen=True)
class Cost:
    """What a run will ask of its annotator, as the recorded rollouts suggest."""

    steps: int
    """Steps at which the annotator is asked."""
    requests: float
    prompt_tokens: float
    completion_tokens: float
    """At most, by max_reply_tokens; as measured where answers were counted."""
    is_measured: bool
    money: float
    minutes_at_rate: float
    """What the rate limit alone takes; 0 where there is none."""


def with_verdict(rollouts: Sequence[GradedRollout]) -> list[GradedRollout]:
    """The rollouts that can be annotated.

    Raises:
        DataError: there is none.
    """
    graded = [item for item in rollouts if is_wanted(item, _BOTH)]
    if not graded:
        raise DataError(
            f"none of the {len(rollouts)} recorded rollouts has tokens and a verdict, so there is nothing to annotate; "
            "give those of other steps, or of another run"
        )
    return graded


def estimate(
    config: RunConfig,
    rollouts: Sequence[GradedRollout],
    reader: TokenReader,
    surroundings: Surroundings,
    completion_tokens: float | None = None,
) -> Cost:
    """The cost of a run whose rollouts are like the recorded ones, cached answers and repairs left out.

    Args:
        completion_tokens: of a measured answer, on average.

    Raises:
        DataError: no language model is asked, or no recorded rollout has a verdict.
    """
    model = config.annotator.backend.model
    if model is None:
        raise DataError(
            f"annotator.backend is {config.annotator.backend.type}, which asks no model and costs nothing; set it to "
            "api, self, static or frozen to have its cost estimated"
        )
    graded = with_verdict(rollouts)
    counts: Counter[SpanClass] = Counter()
    tokens: Counter[SpanClass] = Counter()
    for item in graded:
        task = AnnotationTask.of(item)
        counts[task.span_class] += 1
        tokens[task.span_class] += _prompt_tokens(task, config, model, reader, surroundings)
    steps = [classes for step in range(config.run.steps) if (classes := active_span_classes(config, step))]
    per_step = config.sampling.prompts_per_step * config.sampling.samples_per_prompt / len(graded)
    requests = sum(per_step * counts[each] for classes in steps for each in classes)
    prompt_tokens = sum(per_step * tokens[each] for classes in steps for each in classes)
    replies = requests * (model.max_reply_tokens if completion_tokens is None else completion_tokens)
    budget, rate = model.budget, model.limits.requests_per_minute
    return Cost(
        steps=len(steps),
        requests=requests,
        prompt_tokens=prompt_tokens,
        completion_tokens=replies,
        is_measured=completion_tokens is not None,
        money=budget.cost(prompt_tokens, replies),
        minutes_at_rate=requests / rate if rate else 0.0,
    )


def _prompt_tokens(
    task: AnnotationTask,
    config: RunConfig,
    model: LanguageModel,
    reader: TokenReader,
    surroundings: Surroundings,
) -> int:
    token_text = read_tokens(reader, task.token_ids[: task.num_text_tokens])
    request = annotation_request(task, token_text, config.annotator, surroundings)
    shown = render(
        request,
        model.max_spans,
        config.annotator.privileges,
        model.max_prompt_tokens,
        reader.count,
        reader.special_tokens(),
    )
    return sum(reader.count(message.content) for message in shown.messages)
