"""Annotates recorded rollouts without a run: to try an annotator, compare two, record one, or know a run's cost.

Works on the rollouts that a run has kept, with the same actor, cache and limits as in a run.
"""

from __future__ import annotations

import math
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trace_rl.annotators import Api, Backend, Frozen, Inverted, Random, Replay, SelfAnnotation
from trace_rl.batch import GradedRollout, SpanClass
from trace_rl.config.run import RunConfig
from trace_rl.errors import DataError
from trace_rl.launch.annotation_cost import estimate, with_verdict
from trace_rl.launch.annotation_report import Outcome, agreement_table, audit_table, cost_lines, num_answers
from trace_rl.launch.annotator_checks import check_annotator
from trace_rl.launch.annotators import (
    AnnotatorSetting,
    start_annotator,
    start_chat_engine,
    surroundings_of,
)
from trace_rl.launch.cluster import ray_session
from trace_rl.launch.model_files import load_tokenizer, resolve_model
from trace_rl.launch.placement import ANNOTATOR, ENGINE_OF_POLICY, plan_annotation
from trace_rl.launch.prompt_sources import annotation_types, error_rule
from trace_rl.launch.rollout_dump import dump_files, read_dump, run_folder_of
from trace_rl.launch.run_folder import RunFolder
from trace_rl.launch.seats import Seats, take_seats
from trace_rl.workers.annotator import RayAnnotator
from trace_rl.workers.revival import wait_until_ready
from trace_rl.workers.token_reader import reader_of

_BOTH: frozenset[SpanClass] = frozenset({"key", "error"})


@dataclass(frozen=True)
class Recorded:
    """Rollouts that were read back, and where."""

    path: Path
    rollouts: Sequence[GradedRollout]

    @classmethod
    def read(cls, path: Path, limit: int) -> Recorded:
        """At most `limit` of the rollouts that have a verdict; 0: all of them.

        Raises:
            DataError: there is none, or a line cannot be read.
        """
        graded = with_verdict([item.graded for item in read_dump(dump_files(path))])
        return cls(path, graded[:limit] if limit else graded)

    @property
    def folder(self) -> Path:
        """Where the answers of models are stored: the run folder, so that a run's own answers are found again."""
        return run_folder_of(self.path)


def annotate(configs: Sequence[RunConfig], recorded: Recorded, out: Path | None, console: Console) -> list[Outcome]:
    """Annotate the rollouts with each configuration's annotator; print what each is worth, and how they agree.

    Args:
        configs: differ in their annotator only; the first one is compared with the others.
        out: new file that the first annotator's replies are recorded in, for annotator.backend=replay.

    Raises:
        TraceError: with one sentence for the user; answers of models that came before it are stored.
    """
    configs = [_resolved(config, recorded) for config in configs]
    for config in configs:
        check_annotator(config)
    if out is not None:
        configs[0] = _recording(configs[0], out)
    with tempfile.TemporaryDirectory() as logs, ray_session(configs[0], Path(logs)):
        outcomes = [_run(config, recorded, console) for config in configs]
    first = outcomes[0]
    console.print(audit_table(outcomes))
    for other in outcomes[1:]:
        console.print(agreement_table(first, other))
    if out is not None:
        text = (
            f"The replies of {first.name} are in {out}; to use them: annotator.backend=replay "
            f"annotator.backend.path={shlex.quote(str(out))}"
        )
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if answers := num_answers(first.metrics):
        print_cost(configs[0], recorded, console, first.metrics["annotation/completion_tokens"] / answers)
    return outcomes


def print_cost(config: RunConfig, recorded: Recorded, console: Console, completion_tokens: float | None = None) -> None:
    """Print what a run of this configuration would ask of its annotator.

    Args:
        completion_tokens: of a measured answer, on average.
    """
    config = _resolved(config, recorded)
    setting = _setting(config, recorded)
    cost = estimate(
        config, recorded.rollouts, reader_of(setting.tokenizer), surroundings_of(setting), completion_tokens
    )
    lines = cost_lines(config, cost, len(recorded.rollouts))
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _resolved(config: RunConfig, recorded: Recorded) -> RunConfig:
    """The configuration with the model in its place, which for self-annotation is the run's newest checkpoint."""
    model = resolve_model(config.model)
    checkpoints = RunFolder(recorded.folder).complete_checkpoints()
    if isinstance(config.annotator.backend.model, SelfAnnotation) and checkpoints:
        model = model.model_copy(update={"path": str(checkpoints[-1][1] / "hf")})
    # there is no step that waits, and the run's own recording is not added to
    annotator = config.annotator.model_copy(update={"step_wait_s": math.inf, "record_path": None})
    return config.model_copy(update={"model": model, "annotator": annotator})


def _recording(config: RunConfig, out: Path) -> RunConfig:
    if out.exists():
        raise DataError(f"{out} exists already, and a recording may have cost money; give --out another name")
    if not out.absolute().parent.is_dir():
        raise DataError(f"the folder of --out {out} does not exist; make it, or give a file in another one")
    annotator = config.annotator.model_copy(update={"record_path": str(out.resolve())})
    return config.model_copy(update={"annotator": annotator})


def _run(config: RunConfig, recorded: Recorded, console: Console) -> Outcome:
    name = _name(config.annotator.backend)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{name}: starting", total=len(recorded.rollouts))
        seats = take_seats(plan_annotation(config), config.placement)
        started = _start(config, recorded, seats)
        annotator = RayAnnotator(started[ANNOTATOR], config.annotator)
        progress.update(task, description=f"{name}: annotating")
        began = time.monotonic()
        annotated = list(progress.track(annotator.annotate(recorded.rollouts, _BOTH), task_id=task))
        duration_s = time.monotonic() - began
        metrics = annotator.metrics()
        _stop(started, seats)
    place = {id(item): number for number, item in enumerate(recorded.rollouts)}
    return Outcome(name, sorted(annotated, key=lambda item: place[id(item.graded)]), metrics, duration_s)


def _start(config: RunConfig, recorded: Recorded, seats: Seats) -> dict[str, Any]:
    """The annotator's actor and its engine, ready."""
    policy = _start_policy(config, seats)
    started = {**policy, **start_annotator(_setting(config, recorded), list(policy.values()), seats)}
    for role, actor in started.items():
        wait_until_ready(actor, role, config.placement.start_timeout_s)
    return started


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
    """How an annotator is called in tables: its kind, and what tells it apart from others of its kind."""
    if isinstance(backend, Random | Inverted):
        return f"{backend.type} of {_name(backend.of)}"
    if isinstance(backend, Api):
        return f"{backend.type} {backend.name}"
    if isinstance(backend, Frozen | Replay):
        return f"{backend.type} {Path(backend.path).name}"
    return backend.type


def _start_policy(config: RunConfig, seats: Seats) -> dict[str, Any]:
    """The engine of a policy that annotates itself."""
    settings = config.annotator.backend.model
    if not isinstance(settings, SelfAnnotation):
        return {}
    place = seats.place(ENGINE_OF_POLICY, {})
    engine = start_chat_engine(config, 0, config.model, config.generator, settings.context_tokens, place)
    return {ENGINE_OF_POLICY: engine}


def _stop(started: Mapping[str, Any], seats: Seats) -> None:
    """End the actors and give their seats back, so that the next annotator has them."""
    import ray

    for actor in started.values():
        ray.kill(actor)
    seats.give_back()
