"""The loop: prompts -> rollouts -> rewards -> annotations -> routes -> teacher -> learner -> weight sync -> journal.

Each line of `_step` turns one typed value into the next; the streaming stages are lazy iterators, so a rollout is
graded and annotated while others are still being generated. The loop talks to the Protocols of `trace_rl.protocols`
and knows no Ray, no engine, no clock and no method: what a step does follows from the configuration's routes.

Invariants: rollouts of step k are written by weights of version k, which were proven to be the learner's before the
first prompt of the step was sent; a checkpoint of step k is everything that step k depends on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trace_rl.batch import AnnotatedRollout, GradedRollout, Prompt, RoutedRollout, TrainingBatch
from trace_rl.collapse import CollapseDetector
from trace_rl.config.run import RunConfig
from trace_rl.diagnostics import Exposure, measured_step
from trace_rl.errors import TrainingError
from trace_rl.flops import TransformerShape
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import (
    Annotator,
    Checkpoints,
    Decoding,
    Generator,
    Grader,
    Journal,
    Learner,
    Metrics,
    PromptSource,
    Teacher,
    WeightSync,
)
from trace_rl.routing import active_span_classes, keep_top_tokens, route_rollouts, teacher_views
from trace_rl.step_metrics import rollout_metrics, route_metrics, teacher_metrics
from trace_rl.text_metrics import text_metrics
from trace_rl.training_batch import Evidence, scored_tokens, training_batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Roles:
    """Everyone who takes part in a run."""

    prompts: PromptSource
    encoder: PromptEncoder
    generator: Generator
    """Samples from the policy."""
    sampler: Generator
    """Gives the completions that are trained on: the policy's, or those of sampling.source."""
    grader: Grader
    annotator: Annotator
    teacher: Teacher
    teacher_shapes: Sequence[TransformerShape]
    """Of the teacher's models, by which its work is counted; empty where the run has no teacher."""
    learner: Learner
    weight_sync: WeightSync
    journal: Journal
    checkpoints: Checkpoints


def train(config: RunConfig, roles: Roles, start_step: int = 0, history: Sequence[Mapping[str, float]] = ()) -> None:
    """Run steps `start_step` to `config.run.steps`, with evaluations and checkpoints on their way.

    Args:
        history: recorded metrics of the steps before `start_step`.

    Raises:
        TrainingError: the run collapsed under its teacher and watch.action is stop; a checkpoint was written.
    """
    detector = CollapseDetector(config.watch)
    detector.feed(history)
    exposure = Exposure(config.logging.diagnostics_every, history)
    roles.weight_sync.sync(start_step)
    if start_step == 0:
        _evaluate_if_due(config, roles, detector, step=0)
    for step in range(start_step, config.run.steps):
        metrics = _step(config, roles, step)
        detector.observe_step(step, metrics)
        roles.journal.log_step(step, {**metrics, **exposure.add(metrics), **detector.metrics()})
        done = step + 1
        collapse = _evaluate_if_due(config, roles, detector, done)
        is_last = done == config.run.steps or bool(collapse)
        if is_last or (config.run.checkpoint_every and done % config.run.checkpoint_every == 0):
            roles.checkpoints.save(done, roles.prompts.position())
        if collapse:
            raise TrainingError(f"{collapse} The run was stopped (watch.action) with a checkpoint")


def _step(config: RunConfig, roles: Roles, step: int) -> dict[str, float]:
    """One training step: from prompts to proven new weights."""
    algorithm, journal = config.algorithm, roles.journal
    sampled: list[GradedRollout] = []
    with journal.stage("rollout"):
        candidates = route_rollouts(_annotated(config, roles, step, sampled), config, step)
    with journal.stage("teacher"):
        evidence, teacher_cost = _ask_teacher(config, roles, candidates, step)
    with journal.stage("learner"):
        routed, batch = _rank_and_weigh(config, roles, candidates, evidence, step)
        learner_metrics = _train_on(config, roles, batch)
    with journal.stage("sync"):
        sync_metrics = roles.weight_sync.sync(step + 1)
    journal.log_rollouts(step, routed, batch)
    return {
        **rollout_metrics(sampled, len(routed)),
        **route_metrics(routed, algorithm, step),
        **text_metrics(sampled, roles.encoder.types),
        **roles.grader.metrics(),
        **roles.annotator.metrics(),
        **teacher_cost,
        **learner_metrics,
        **sync_metrics,
    }


def _annotated(config: RunConfig, roles: Roles, step: int, sampled: list[GradedRollout]) -> Iterator[AnnotatedRollout]:
    """The step's rollouts as they are done, in as many rounds as algorithm.dynamic_sampling asks for.

    Args:
        sampled: receives everything that is sampled on the way, kept or not.
    """
    is_routed = any(route.is_active(step) for route in config.algorithm.routes.values())
    rounds = 1 if is_routed else config.algorithm.dynamic_sampling.max_rounds
    if rounds == 1:
        graded: Iterator[GradedRollout] = _graded(config, roles, _next_prompts(config, roles), step, sampled)
    else:
        graded = iter(_with_mixed_rewards(config, roles, step, sampled, rounds))
    return roles.annotator.annotate(graded, active_span_classes(config, step))


def _next_prompts(config: RunConfig, roles: Roles) -> Sequence[Prompt]:
    return roles.prompts.take(config.sampling.prompts_per_step)


def _graded(
    config: RunConfig, roles: Roles, prompts: Sequence[Prompt], step: int, sampled: list[GradedRollout]
) -> Iterator[GradedRollout]:
    sampling = config.sampling
    requests = roles.encoder.requests(prompts, sampling.samples_per_prompt, config.run.seed, "train", step)
    decoding = Decoding(sampling.temperature, sampling.top_p, sampling.top_k)
    for item in roles.grader.grade(roles.sampler.generate(requests, decoding)):
        sampled.append(item)
        yield item


def _with_mixed_rewards(
    config: RunConfig, roles: Roles, step: int, sampled: list[GradedRollout], max_rounds: int
) -> list[GradedRollout]:
    """Rollouts of prompts whose completions earn different rewards, refilled from further prompts.

    Of more than are wanted the first in the order of the source are kept. Where none at all was found those of the last
    round are kept whatever they earn, so that a step is never empty.
    """
    wanted = config.sampling.prompts_per_step
    kept: list[list[GradedRollout]] = []
    for _ in range(max_rounds):
        prompts = _next_prompts(config, roles)
        # in the order of the source: that of arrival is the engine's, and the choice must not depend on it
        groups: dict[str, list[GradedRollout]] = {prompt.prompt_id: [] for prompt in prompts}
        for item in _graded(config, roles, prompts, step, sampled):
            groups[item.rollout.prompt.prompt_id].append(item)
        kept += [group for group in groups.values() if len({item.reward for item in group}) > 1]
        if len(kept) >= wanted:
            break
    return [item for group in kept[:wanted] or groups.values() for item in group]


def _ask_teacher(
    config: RunConfig, roles: Roles, routed: Sequence[RoutedRollout], step: int
) -> tuple[Evidence, Metrics]:
    """What the teacher says of the routed tokens, and what that took."""
    views = teacher_views(config, step)
    if views:
        roles.teacher.refresh(step)
    requests = roles.encoder.teacher_requests(routed, views)
    rows = roles.teacher.score(requests)
    cost = teacher_metrics(routed, requests, rows, len(views), roles.teacher_shapes)
    return Evidence(views, {(item.key, item.view): item for item in rows}), cost


def _rank_and_weigh(
    config: RunConfig, roles: Roles, routed: Sequence[RoutedRollout], evidence: Evidence, step: int
) -> tuple[Sequence[RoutedRollout], TrainingBatch]:
    """The batch, after routes with a token score were thinned out to their highest-scoring tokens."""
    routes = list(config.algorithm.routes.values())
    scored = scored_tokens(routed, evidence, config)
    if any(routes[index].score for index in scored):
        candidates = training_batch(routed, scored, evidence, config, step)
        found = {(item.key, item.route): item for item in roles.learner.score(candidates)}
        evidence = Evidence(evidence.views, evidence.teacher_rows, found)
        scored = scored_tokens(routed, evidence, config)
        routed = keep_top_tokens(routed, {i: items for i, items in scored.items() if routes[i].score}, config)
        # what was measured of the candidates belongs to other positions now
        evidence = Evidence(evidence.views, evidence.teacher_rows)
        scored = scored_tokens(routed, evidence, config)
    return routed, training_batch(routed, scored, evidence, config, step)


def _train_on(config: RunConfig, roles: Roles, batch: TrainingBatch) -> Metrics:
    """One learner step; none where every completion was masked."""
    every = config.logging.diagnostics_every
    if not batch.sequences:
        logger.warning("Step %d trains on nothing: every completion was empty or masked as overlong", batch.step)
        return {"learner/skipped_steps": 1.0}
    has_rows = any(len(sequence.route_positions) for sequence in batch.sequences)
    if every and batch.step % every == 0 and has_rows:
        return measured_step(roles.learner, batch, list(config.algorithm.routes))
    return roles.learner.train_step(batch)


def _evaluate_if_due(config: RunConfig, roles: Roles, detector: CollapseDetector, step: int) -> str:
    """Evaluate where it is due; returns the sentence on a collapse that has to end the run, else an empty one."""
    every = config.evaluation.every
    if not every or (step % every and step != config.run.steps):
        return ""
    with roles.journal.stage("evaluation"):
        metrics = evaluate(config, roles)
    verdict = detector.observe_evaluation(step, metrics)
    roles.journal.log_evaluation(step, metrics)
    if not verdict.is_collapse or config.watch.action == "off":
        return ""
    logger.warning("%s", verdict.sentence)
    return verdict.sentence if config.watch.action == "stop" else ""


def evaluate(config: RunConfig, roles: Roles) -> Metrics:
    """Sample held-out prompts with the generator's present weights; seeds are the same at every evaluation."""
    settings = config.evaluation
    prompts = roles.prompts.heldout(settings.num_prompts)
    encoder = roles.encoder.with_template_kwargs(settings.chat_template_kwargs)
    requests = encoder.requests(prompts, settings.samples_per_prompt, config.run.seed, "heldout")
    graded = list(roles.grader.grade(roles.generator.generate(requests, Decoding(settings.temperature))))
    roles.grader.metrics()  # the counters of the next step are its own
    return evaluation_metrics(graded)


def evaluation_metrics(graded: Sequence[GradedRollout]) -> Metrics:
    """pass@1 (mean reward over all samples), length and truncation."""
    count = len(graded)
    return {
        "heldout/pass_at_1": sum(item.reward for item in graded) / count,
        "heldout/samples": float(count),
        "heldout/length_mean_tokens": sum(len(item.rollout.token_ids) for item in graded) / count,
        "heldout/truncated_frac": sum(item.rollout.finish_reason == "length" for item in graded) / count,
        "heldout/grading_failures": float(sum(item.cause in ("timeout", "error") for item in graded)),
    }
