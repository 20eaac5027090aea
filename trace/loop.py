"""The loop: prompts -> rollouts -> rewards -> annotations -> routes -> teacher -> learner -> weight sync -> journal.

Each line of `_step` turns one typed value into the next; the streaming stages are lazy iterators, so a rollout is
graded and annotated while others are still being generated, and prompts that are complete go to the teacher. The
loop talks to the Protocols of `trace_rl.protocols` and knows no Ray, no engine, no clock and no method: what a step
does follows from the configuration's routes.

Asynchronous training is the same loop: `trace_rl.rollout_supply` decides how far sampling is ahead of it.

Invariants: no token that step k trains on was written by weights older than version k - scheduling.max_staleness, and
every version was proven to be the learner's before a prompt was sent to it; a checkpoint of step k is everything that
step k depends on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from trace_rl.absent import AbsentLedger
from trace_rl.batch import GradedRollout, Prompt, RoutedRollout, TokenFigures, TrainingBatch
from trace_rl.collapse import CollapseDetector
from trace_rl.config.run import RunConfig
from trace_rl.diagnostics import Exposure, measured_step
from trace_rl.errors import PreemptedError, TrainingError, WeightSyncError
from trace_rl.flops import TeacherCost, TransformerShape
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import (
    Annotator,
    Checkpoints,
    Decoding,
    Drawn,
    Generator,
    Grader,
    Journal,
    Learner,
    Metrics,
    PromptLedger,
    PromptSource,
    Teacher,
    Utilisation,
    WeightSync,
    is_evaluation,
)
from trace_rl.rollout_supply import RolloutSupply
from trace_rl.routing import keep_top_tokens, route_rollouts
from trace_rl.step_metrics import learner_work, rollout_metrics, route_metrics, staleness_metrics
from trace_rl.teacher_scoring import TeacherScoring
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
    teacher_cost: TeacherCost
    """Of the teacher's models, by which its work is counted; empty where the run has no teacher."""
    learner: Learner
    policy_shape: TransformerShape
    """Of the model that is trained, by which the learner's work is counted."""
    weight_sync: WeightSync
    utilisation: Utilisation
    journal: Journal
    checkpoints: Checkpoints
    ledger: PromptLedger = field(default_factory=AbsentLedger)
    evaluation_sets: Mapping[str, Sequence[Prompt]] = field(default_factory=dict)
    """Name -> questions that are evaluated beside the held-out ones, as eval/NAME."""


def train(
    config: RunConfig,
    roles: Roles,
    start_step: int = 0,
    history: Sequence[Mapping[str, float]] = (),
    pending: Sequence[Drawn] = (),
    is_told_to_end: Callable[[], bool] = lambda: False,
) -> None:
    """Run steps `start_step` to `config.run.steps`, with evaluations and checkpoints on their way.

    Args:
        history: recorded metrics of the steps before `start_step`.
        pending: prompts that those steps had drawn and not trained on.
        is_told_to_end: whether the run has to leave its place; asked while a step waits for rollouts, and after it.

    Raises:
        TrainingError: the run collapsed under its teacher and watch.action is stop; a checkpoint was written.
        PreemptedError: the run was told to end; a checkpoint was written.
    """
    detector = CollapseDetector(config.watch)
    detector.feed(history)
    exposure = Exposure(config.logging.diagnostics_every, history)
    supply = RolloutSupply(config, roles, pending, is_told_to_end)
    roles.weight_sync.sync(start_step)
    if not any(is_evaluation(record) and record["step"] == start_step for record in history):
        _evaluate_if_due(config, roles, detector, start_step)
    kept = start_step
    for step in range(start_step, config.run.steps):
        try:
            metrics = _step(config, roles, supply, step)
        except PreemptedError:
            if step > kept:  # otherwise there is nothing new since that checkpoint
                _checkpoint(roles, supply, step)
            raise
        detector.observe_step(step, metrics)
        roles.journal.log_step(step, {**metrics, **exposure.add(metrics), **detector.metrics()})
        done = step + 1
        must_end = done < config.run.steps and is_told_to_end()
        collapse = "" if must_end else _evaluate_if_due(config, roles, detector, done)
        is_last = done == config.run.steps or bool(collapse)
        if is_last or must_end or (config.run.checkpoint_every and done % config.run.checkpoint_every == 0):
            _checkpoint(roles, supply, done)
            kept = done
        if is_last:
            supply.close(done)
            roles.ledger.mark("ended", done)
        roles.ledger.settle()
        if must_end:
            raise PreemptedError(f"the run was told to end after {done} steps, of which it has a checkpoint")
        if collapse:
            raise TrainingError(f"{collapse} The run was stopped (watch.action) with a checkpoint")


def _checkpoint(roles: Roles, supply: RolloutSupply, step: int) -> None:
    roles.checkpoints.save(step, roles.prompts.position(), supply.pending())
    roles.ledger.mark("checkpoint", step)
    roles.ledger.settle()


def _step(config: RunConfig, roles: Roles, supply: RolloutSupply, step: int) -> dict[str, float]:
    """One training step: from prompts to proven new weights."""
    algorithm, journal = config.algorithm, roles.journal
    with TeacherScoring(config, roles, step) as scoring:
        with journal.stage("rollout"):
            taken = supply.take(step, scoring.add)
            candidates = route_rollouts(taken.annotated, config, step, scoring.routes)
        with journal.stage("teacher"):
            evidence, teacher_cost = scoring.finish(candidates)
    with journal.stage("learner"):
        routed, batch = _rank_and_weigh(config, roles, candidates, evidence, step)
        figures = _inspected(config, roles, batch)
        learner_metrics = _train_on(config, roles, batch)
        roles.ledger.note("trained", step, taken.prompts)
    with journal.stage("sync"):
        supply.settle()
        sync_metrics = roles.weight_sync.sync(step + 1)
    journal.log_rollouts(step, routed, batch, figures)
    return {
        **rollout_metrics(taken.sampled, len(routed)),
        **staleness_metrics(batch, config.scheduling.max_staleness),
        **supply.metrics(),
        **route_metrics(routed, algorithm, step),
        **text_metrics(taken.sampled, roles.encoder.types),
        **roles.annotator.metrics(),
        **teacher_cost,
        **learner_metrics,
        **learner_work(batch, roles.policy_shape, config),
        **sync_metrics,
        **roles.utilisation.metrics(),
    }


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


def _inspected(config: RunConfig, roles: Roles, batch: TrainingBatch) -> Sequence[TokenFigures]:
    """What can be shown of the rollouts that are stored at this step, under the weights that wrote them."""
    stored = batch.sequences[: config.logging.num_rollouts_at(batch.step)]
    if not stored or config.logging.token_figures == "known":
        return ()
    return roles.learner.inspect(TrainingBatch(batch.step, stored))


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
    metrics = _evaluate_on(config, roles, roles.prompts.heldout(config.evaluation.num_prompts), "heldout")
    for name, prompts in roles.evaluation_sets.items():
        metrics |= _evaluate_on(config, roles, prompts, f"eval/{name}")
    return metrics


def _evaluate_on(config: RunConfig, roles: Roles, prompts: Sequence[Prompt], area: str) -> dict[str, float]:
    settings = config.evaluation
    encoder = roles.encoder.with_template_kwargs(settings.chat_template_kwargs)
    requests = encoder.requests(prompts, settings.samples_per_prompt, config.run.seed, area)
    decoding = Decoding(settings.temperature, goes_first=True)
    graded = list(roles.grader.grade(roles.generator.generate(requests, decoding)))
    versions = sorted({v for item in graded for v in (item.rollout.oldest_version, item.rollout.newest_version)})
    if len(versions) > 1:
        raise WeightSyncError(
            f"the completions of an evaluation were written by weights of versions {versions}, expected one; the "
            "engines are not in step, stop the run and look at their logs"
        )
    return {f"{area}/{name}": value for name, value in evaluation_metrics(graded).items()}


def evaluation_metrics(graded: Sequence[GradedRollout]) -> dict[str, float]:
    """pass@1 (mean reward over all samples), length and truncation."""
    count = len(graded)
    return {
        "pass_at_1": sum(item.reward for item in graded) / count,
        "samples": float(count),
        "length_mean_tokens": sum(len(item.rollout.token_ids) for item in graded) / count,
        "truncated_frac": sum(item.rollout.finish_reason == "length" for item in graded) / count,
        "grading_failures": float(sum(item.cause in ("timeout", "error") for item in graded)),
    }
