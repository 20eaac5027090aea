"""The loop: prompts -> rollouts -> rewards -> annotations -> routes -> teacher -> learner -> weight sync -> journal.

Each line of `_step` turns one typed value into the next; the streaming stages are lazy iterators, so a rollout is
graded and annotated while others are still being generated. The loop talks to the Protocols of `trace_rl.protocols`
and knows no Ray, no engine and no clock.

Invariants: rollouts of step k are written by weights of version k, which were proven to be the learner's before the
first prompt of the step was sent; a checkpoint of step k is everything that step k depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trace_rl.batch import GradedRollout
from trace_rl.config.run import RunConfig
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import (
    Annotator,
    Checkpoints,
    Generator,
    Grader,
    Journal,
    Learner,
    Metrics,
    PromptSource,
    Teacher,
    WeightSync,
)
from trace_rl.routing import active_span_classes, route_rollouts, routing_metrics, training_batch


@dataclass(frozen=True)
class Roles:
    """Everyone who takes part in a run."""

    prompts: PromptSource
    encoder: PromptEncoder
    generator: Generator
    grader: Grader
    annotator: Annotator
    teacher: Teacher
    learner: Learner
    weight_sync: WeightSync
    journal: Journal
    checkpoints: Checkpoints


def train(config: RunConfig, roles: Roles, start_step: int = 0) -> None:
    """Run steps `start_step` to `config.run.steps`, with evaluations and checkpoints on their way."""
    roles.weight_sync.sync(start_step)
    if start_step == 0:
        _evaluate_if_due(config, roles, step=0)
    for step in range(start_step, config.run.steps):
        metrics = _step(config, roles, step)
        roles.journal.log_step(step, metrics)
        done = step + 1
        _evaluate_if_due(config, roles, done)
        if done == config.run.steps or (config.run.checkpoint_every and done % config.run.checkpoint_every == 0):
            roles.checkpoints.save(done, roles.prompts.position())


def _step(config: RunConfig, roles: Roles, step: int) -> dict[str, float]:
    """One training step: from prompts to proven new weights."""
    algorithm, sampling, journal = config.algorithm, config.sampling, roles.journal
    prompts = roles.prompts.take(sampling.prompts_per_step)
    requests = roles.encoder.requests(prompts, sampling.samples_per_prompt, config.run.seed, "train", step)
    with journal.stage("rollout"):
        rollouts = roles.generator.generate(requests, sampling.temperature)
        graded = roles.grader.grade(rollouts)
        annotated = roles.annotator.annotate(graded, active_span_classes(algorithm, step))
        routed = route_rollouts(annotated, algorithm, step)
    with journal.stage("teacher"):
        teacher_requests = roles.encoder.teacher_requests(routed)
        if active_span_classes(algorithm, step):
            roles.teacher.refresh(step)
        rows = {item.key: item for item in roles.teacher.score(teacher_requests)}
    with journal.stage("learner"):
        batch = training_batch(routed, rows, algorithm, step, policy_version=step)
        learner_metrics = roles.learner.train_step(batch)
    with journal.stage("sync"):
        sync_metrics = roles.weight_sync.sync(step + 1)
    journal.log_rollouts(step, routed)
    return {
        **routing_metrics(routed, algorithm, step),
        **roles.grader.metrics(),
        **roles.annotator.metrics(),
        **learner_metrics,
        **sync_metrics,
    }


def _evaluate_if_due(config: RunConfig, roles: Roles, step: int) -> None:
    every = config.evaluation.every
    if every and (step % every == 0 or step == config.run.steps):
        with roles.journal.stage("evaluation"):
            metrics = evaluate(config, roles)
        roles.journal.log_evaluation(step, metrics)


def evaluate(config: RunConfig, roles: Roles) -> Metrics:
    """Sample held-out prompts with the generator's present weights; seeds are the same at every evaluation."""
    settings = config.evaluation
    prompts = roles.prompts.heldout(settings.num_prompts)
    requests = roles.encoder.requests(prompts, settings.samples_per_prompt, config.run.seed, "heldout")
    graded = list(roles.grader.grade(roles.generator.generate(requests, settings.temperature)))
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
