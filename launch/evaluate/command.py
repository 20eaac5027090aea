"""`trace-rl eval` from its arguments to its tables: everything is checked before anything is started.

FOLDER/config.yaml  the evaluation's configuration, with whole definitions of its sets
FOLDER/SET/         samples.jsonl and settings.json (`store`)
FOLDER/results.json, results.md
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from trace_rl.batch import Prompt
from trace_rl.config.evaluation import EvalConfig, EvalSet
from trace_rl.errors import ConfigError
from trace_rl.evaluation import SetScore, score
from trace_rl.launch.cluster import ray_session
from trace_rl.launch.evaluate.engines import crew_of
from trace_rl.launch.evaluate.sampling import Asked, collect, prepare
from trace_rl.launch.evaluate.sets import open_set
from trace_rl.launch.evaluate.store import SampleStore, settings_of
from trace_rl.launch.evaluate.subjects import Subject, find_subjects
from trace_rl.launch.evaluate.tables import result_tables, to_json
from trace_rl.overlays import dump_config


def evaluate(config: EvalConfig, checkpoints: Sequence[str], step: int, console: Console) -> dict[str, list[SetScore]]:
    """Evaluate checkpoints one after another on all sets; go on where an evaluation stopped.

    Args:
        checkpoints: folders, run folders or hub names.
        step: of run folders; `subjects.NEWEST` or a number.

    Returns:
        The scores of each checkpoint by its label, in the order of the sets.

    Raises:
        TraceError: with one sentence for the user; samples that are stored stay.
    """
    subjects = find_subjects(checkpoints, step, config)
    if len(subjects) > 1 and "{model}" not in config.folder:
        raise ConfigError(
            f"folder is {config.folder!r}, but {len(subjects)} checkpoints are evaluated; put {{model}} into it, which "
            "is replaced by the name of each"
        )
    problems = [open_set(settings) for settings in config.sets]
    with ExitStack() as stack:
        asked = [_prepare(subject, config, problems, stack) for subject in subjects]
        _sample_what_is_missing(config, subjects, asked, console)
        scores = {
            subject.label: [score(item.settings, item.samples()) for item in items]
            for subject, items in zip(subjects, asked, strict=True)
        }
    tables = result_tables(scores, seed=0)
    for subject in subjects:
        _write(_folder(config, subject), config, scores[subject.label])
    for table in tables:
        if console.is_terminal:
            console.print(table.rich())
        else:
            console.print(table.markdown(), markup=False, highlight=False, soft_wrap=True)
    where = ", ".join(str(_folder(config, subject)) for subject in subjects)
    console.print(f"Samples and metrics are in {where}", markup=False, highlight=False, soft_wrap=True)
    return scores


def _folder(config: EvalConfig, subject: Subject) -> Path:
    return Path(config.folder.format(model=subject.label)).expanduser()


def _prepare(
    subject: Subject, config: EvalConfig, problems: Sequence[Sequence[Prompt]], stack: ExitStack
) -> list[Asked]:
    def open_store(subject: Subject, settings: EvalSet) -> SampleStore:
        decided = settings_of(
            settings,
            model=subject.fingerprint,
            dtype=subject.model.dtype,
            seed=config.seed,
            chat_template_kwargs=subject.model.chat_template_kwargs,
        )
        return stack.enter_context(SampleStore(_folder(config, subject) / settings.name, decided))

    return prepare(subject, config, problems, open_store)


def _sample_what_is_missing(
    config: EvalConfig, subjects: Sequence[Subject], asked: Sequence[Sequence[Asked]], console: Console
) -> None:
    open_work = [
        (subject, items)
        for subject, items in zip(subjects, asked, strict=True)
        if any(item.store.missing(item.requests) for item in items)
    ]
    if not open_work:
        console.print("All samples are stored already; nothing is drawn.")
        return
    with tempfile.TemporaryDirectory() as logs, ray_session(config, Path(logs)):
        for subject, items in open_work:
            with crew_of(subject, config, max(item.max_model_len for item in items)) as crew, _bar(console) as bar:
                tasks: dict[str, TaskID] = {
                    item.settings.name: bar.add_task(f"{subject.label}: {item.settings.name}") for item in items
                }

                def tell(settings: EvalSet, done: int, total: int, bar: Progress = bar, tasks: dict = tasks) -> None:
                    bar.update(tasks[settings.name], completed=done, total=total)

                collect(items, crew.generate, crew.grader, tell)
            _say_done(console, subject, items)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _say_done(console: Console, subject: Subject, items: Sequence[Asked]) -> None:
    told = ", ".join(f"{item.settings.name} ({len(item.requests)} samples)" for item in items)
    console.print(f"{subject.label}: {told}", markup=False, highlight=False, soft_wrap=True)


def _write(folder: Path, config: EvalConfig, of_sets: list[SetScore]) -> None:
    """What one checkpoint's folder says of its own; comparisons with others are printed only."""
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(to_json(of_sets), indent=2) + "\n", encoding="utf-8")
    tables = result_tables({folder.name: of_sets}, seed=0)
    (folder / "results.md").write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")
