"""Annotates recorded rollouts without a run: to try an annotator, compare two, record one, or know a run's cost.

Works on the rollouts that a run has kept, with the same actor, cache and limits as in a run.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from trace_rl.annotators import Backend, SelfAnnotation
from trace_rl.batch import GradedRollout, SpanClass
from trace_rl.config.run import RunConfig
from trace_rl.launch.annotation_cost import estimate
from trace_rl.launch.annotation_report import Outcome, agreement_table, audit_table, cost_lines
from trace_rl.launch.annotators import ANNOTATOR, AnnotatorSetting, check_annotator, start_annotator, surroundings_of
from trace_rl.launch.cluster import actor_of, ray_session
from trace_rl.launch.model_files import load_tokenizer, resolve_model
from trace_rl.launch.prompt_sources import annotation_types, error_rule
from trace_rl.launch.rollout_dump import DumpedRollout, dump_files, read_dump
from trace_rl.launch.run_folder import RunFolder
from trace_rl.workers.annotator import RayAnnotator, is_wanted
from trace_rl.workers.generator_engine import ENGINE_THREADS, GeneratorEngine
from trace_rl.workers.token_reader import reader_of
from trace_rl.workers.waiting import wait_for
from trace_rl.workers.weight_sender import transfer_backend

_BOTH: frozenset[SpanClass] = frozenset({"key", "error"})


@dataclass(frozen=True)
class Recorded:
    """Rollouts that were read back, and where."""

    path: Path
    rollouts: Sequence[GradedRollout]

    @classmethod
    def read(cls, path: Path, limit: int) -> Recorded:
        """At most `limit` of the rollouts that have a verdict; 0: all of them."""
        dumped: list[DumpedRollout] = read_dump(dump_files(path))
        graded = [item.graded for item in dumped if is_wanted(item.graded, _BOTH)]
        return cls(path, graded[:limit] if limit else graded)

    @property
    def folder(self) -> Path:
        """Where the answers of models are stored: the run folder, so that a run's own answers are found again."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return (folder.parent if folder.name == "rollouts" else folder).resolve()


def annotate(configs: Sequence[RunConfig], recorded: Recorded, out: Path | None, console: Console) -> list[Outcome]:
    """Annotate the rollouts with each configuration's annotator; print what each is worth, and how they agree.

    Args:
        configs: differ in their annotator only; the first one is compared with the others.
        out: file that the first annotator's replies are recorded in, for annotator.backend=replay.
    """
    configs = [_resolved(config, recorded) for config in configs]
    for config in configs:
        check_annotator(config)
    if out is not None:
        out.unlink(missing_ok=True)
        configs[0] = _recording(configs[0], out)
    with tempfile.TemporaryDirectory() as logs, ray_session(configs[0], Path(logs)):
        outcomes = [_run(config, recorded) for config in configs]
    first = outcomes[0]
    console.print(audit_table(outcomes))
    for other in outcomes[1:]:
        console.print(agreement_table(first, other))
    if out is not None:
        text = f"The replies of {first.name} are in {out}: annotator.backend='{{type: replay, path: {out}}}'"
        console.print(text, highlight=False, soft_wrap=True)
    num_answers = first.metrics.get("annotation/requests", 0.0)
    if num_answers:
        print_cost(configs[0], recorded, console, first.metrics["annotation/completion_tokens"] / num_answers)
    return outcomes


def print_cost(config: RunConfig, recorded: Recorded, console: Console, completion_tokens: float | None = None) -> None:
    """Print what a run of this configuration would ask of its annotator.

    Args:
        completion_tokens: of a measured answer, on average.
    """
    config = _resolved(config, recorded)
    reader = reader_of(load_tokenizer(config.model))
    cost = estimate(config, recorded.rollouts, reader, surroundings_of(_setting(config, recorded)), completion_tokens)
    console.print("\n".join(cost_lines(config, cost, len(recorded.rollouts))), highlight=False, soft_wrap=True)


def _resolved(config: RunConfig, recorded: Recorded) -> RunConfig:
    """The configuration with the model in its place, which for self-annotation is the run's newest checkpoint."""
    model = resolve_model(config.model)
    checkpoints = RunFolder(recorded.folder).complete_checkpoints()
    if isinstance(config.annotator.backend.model, SelfAnnotation) and checkpoints:
        model = model.model_copy(update={"path": str(checkpoints[-1][1] / "hf")})
    # there is no step that waits
    annotator = config.annotator.model_copy(update={"step_wait_s": math.inf})
    return config.model_copy(update={"model": model, "annotator": annotator})


def _recording(config: RunConfig, out: Path) -> RunConfig:
    annotator = config.annotator.model_copy(update={"record_path": str(out.resolve())})
    return config.model_copy(update={"annotator": annotator})


def _run(config: RunConfig, recorded: Recorded) -> Outcome:
    policy = _start_policy(config)
    started = {**policy, **start_annotator(_setting(config, recorded), list(policy.values()))}
    for role, actor in started.items():
        wait_for(actor.ready.remote(), config.placement.start_timeout_s, role, "starting")
    annotator = RayAnnotator(started[ANNOTATOR], config.annotator)
    began = time.monotonic()
    annotated = list(annotator.annotate(recorded.rollouts, _BOTH))
    duration_s = time.monotonic() - began
    metrics = annotator.metrics()
    _stop(started)
    place = {id(item): number for number, item in enumerate(recorded.rollouts)}
    return Outcome(
        _name(config.annotator.backend), sorted(annotated, key=lambda item: place[id(item.graded)]), metrics, duration_s
    )


def _setting(config: RunConfig, recorded: Recorded) -> AnnotatorSetting:
    return AnnotatorSetting(
        config,
        load_tokenizer(config.model),
        error_rule(config),
        annotation_types(config),
        recorded.folder,
        purpose=f"trace-rl annotate with {config.model.path} of",
    )


def _name(backend: Backend) -> str:
    """How an annotator is called in tables: its kind, and what it is a control for or which model it asks."""
    return " of ".join(part for part in (backend.type, getattr(getattr(backend, "of", None), "type", "")) if part)


def _start_policy(config: RunConfig) -> dict[str, Any]:
    """The engine of a policy that annotates itself."""
    settings = config.annotator.backend.model
    if not isinstance(settings, SelfAnnotation):
        return {}
    engine = actor_of(GeneratorEngine, config.placement.generator, max_concurrency=ENGINE_THREADS).remote(
        index=0,
        model=config.model,
        settings=config.generator,
        max_model_len=settings.max_prompt_tokens + settings.max_reply_tokens,
        backend=transfer_backend(config.sync, config.placement),
        loaded_version=0,
    )
    return {"the engine of the policy": engine}


def _stop(started: Mapping[str, Any]) -> None:
    """End the actors, so that the next annotator has their memory."""
    import ray

    for actor in started.values():
        ray.kill(actor)
