"""Opens the problems of an evaluation set: a file, a data set from disk or hub, or a procedural task.

Decides what of a row becomes question, answer and id. Must not know how problems are sampled or graded.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_rl.batch import Prompt
from trace_rl.config.evaluation import ARITHMETIC, BUILT_IN, FILE_SUFFIXES, GYM, HUB, EvalSet, definition
from trace_rl.data import ArithmeticSource, read_jsonl
from trace_rl.errors import DataError, first_line
from trace_rl.launch.saved_datasets import open_saved, without_media
from trace_rl.plain_answers import lettered

Row = Mapping[str, Any]

_PROCEDURAL_PROBLEMS = 256
_UNIQUE_ANSWERS = frozenset(
    {
        "chain_sum",
        "circuit_logic",
        "decimal_chain_sum",
        "family_relationships",
        "gsm_symbolic",
        "letter_jumble",
        "needle_haystack",
        "path_star",
        "products",
        "rectangle_count",
        "self_reference",
        "spell_backward",
        "zebra_puzzles",
    }
)
"""Tasks of reasoning-gym whose scorer only adds partial credit or takes other spellings of the one right answer."""


def open_set(settings: EvalSet) -> list[Prompt]:
    """The problems of a set, in its own order, with distinct ids.

    Raises:
        DataError: there is no such data, or a row lacks what it needs; names the place and tells what to do.
    """
    count = settings.num_problems or None
    if settings.path == ARITHMETIC:
        problems = ArithmeticSource(settings.difficulty, 0).heldout(count or _PROCEDURAL_PROBLEMS)
    elif settings.path.startswith(GYM):
        problems = _gym(settings, count or _PROCEDURAL_PROBLEMS)
    else:
        rows = _rows(settings)[:count]
        problems = [_problem(settings, index, row) for index, row in enumerate(rows)]
    _check_ids(settings, problems)
    return problems


def _check_ids(settings: EvalSet, problems: Sequence[Prompt]) -> None:
    if not problems:
        raise DataError(f"set {settings.name} has no problems in {settings.path}; give a file with at least one row")
    seen: set[str] = set()
    for problem in problems:
        if problem.prompt_id in seen:
            raise DataError(
                f"set {settings.name} has the id {problem.prompt_id!r} twice in {settings.path}; make ids unique, or "
                "set id_columns to [] so that problems are numbered"
            )
        seen.add(problem.prompt_id)


def _problem(settings: EvalSet, index: int, row: Row) -> Prompt:
    question = _column(settings, index, row, "question_columns", settings.question_columns)
    answer = _column(settings, index, row, "answer_columns", settings.answer_columns)
    named = next((row[name] for name in settings.id_columns if row.get(name) not in (None, "")), index)
    if settings.answer_form == "letter":
        wrong = [_column(settings, index, row, "wrong_columns", (name,)) for name in settings.wrong_columns]
        question, answer = lettered(question, answer, wrong, settings.data_seed, str(named))
    return Prompt(prompt_id=str(named), question=question + settings.question_suffix, answer=answer)


def _column(settings: EvalSet, index: int, row: Row, setting: str, names: Sequence[str]) -> str:
    """The text of the first of these columns that a row has."""
    value = next((row[name] for name in names if row.get(name) not in (None, "")), None)
    if value is None:
        raise DataError(
            f"row {index} of set {settings.name} ({settings.path}) has none of the columns {', '.join(names)}, only "
            f"{', '.join(map(str, row)) or 'none'}; name the right one in {setting} of the set"
        )
    return str(value)


def _rows(settings: EvalSet) -> Sequence[Row]:
    if settings.path.startswith(HUB):
        return _from_hub(settings)
    path = Path(settings.path).expanduser()
    if path.is_dir():
        return _from_folder(settings, path)
    if path.suffix not in FILE_SUFFIXES:
        raise DataError(
            f"set {settings.name} names {settings.path}, which is no folder and has none of the endings "
            f"{', '.join(FILE_SUFFIXES)}; give such a file, or hf:NAME for a data set of the hub"
        )
    if not path.is_file():
        advice = _how_to_get(settings) if settings.name in BUILT_IN else ""
        raise DataError(f"set {settings.name}: the file {path} does not exist; check its path{advice}")
    readers: Mapping[str, Callable[[Path], Sequence[Row]]] = {
        ".jsonl": lambda file: [row for _, row in read_jsonl(file)],
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"set {settings.name}: {path} cannot be read ({first_line(error)}); is it complete?") from error


def _read_json(file: Path) -> Sequence[Row]:
    """A list of objects, also one that stands alone under some key."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    lists = [tree] if isinstance(tree, list) else [value for value in tree.values() if isinstance(value, list)]
    if len(lists) != 1 or not all(isinstance(row, dict) for row in lists[0]):
        raise ValueError("it does not hold one list of objects")
    rows: Sequence[Row] = lists[0]
    return rows


def _read_csv(file: Path) -> Sequence[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines))


def _read_parquet(file: Path) -> Sequence[Row]:
    import pyarrow.parquet as parquet

    rows: Sequence[Row] = parquet.read_table(file).to_pylist()
    return rows


def _from_folder(settings: EvalSet, folder: Path) -> Sequence[Row]:
    instead = f"one of its files, with an ending of {', '.join(FILE_SUFFIXES)},"
    try:
        return list(open_saved(folder, settings.split, "split of the set", instead))
    except DataError as error:
        raise DataError(f"set {settings.name}: {error}") from error


def _from_hub(settings: EvalSet) -> Sequence[Row]:
    from datasets import load_dataset

    name = settings.path.removeprefix(HUB)
    try:
        return list(without_media(load_dataset(name, settings.subset or None, split=settings.split)))
    except Exception as error:  # the hub's client raises errors of several libraries
        raise DataError(
            f"set {settings.name}: the data set {name} does not load from the hub ({first_line(error)})"
            f"{_how_to_get(settings)}"
        ) from error


def _how_to_get(settings: EvalSet) -> str:
    """What to do without network access, for a set that the hub has; empty for others."""
    source = settings if settings.path.startswith(HUB) else EvalSet(**definition(settings.name))
    name = source.path.removeprefix(HUB)
    file = f"{settings.name.lower()}.jsonl"
    arguments = ", ".join(repr(text) for text in (name, source.subset) if text)
    return (
        "; on a machine with network access (and, where the set asks for it, after `hf auth login`) run python -c "
        f'"import datasets; datasets.load_dataset({arguments}, split={source.split!r}).to_json({file!r})", put the '
        f"file here, and evaluate with --sets {settings.name}={file}"
    )


def _gym(settings: EvalSet, count: int) -> list[Prompt]:
    """Problems of a task of reasoning-gym; its own scorers are not used: some of them evaluate what a model wrote."""
    task = settings.path.removeprefix(GYM)
    try:
        import reasoning_gym
        from reasoning_gym.dataset import ProceduralDataset
    except ImportError as error:
        raise DataError(
            f"set {settings.name} is a task of reasoning-gym, which is not installed; pip install reasoning-gym"
        ) from error
    try:
        found = reasoning_gym.create_dataset(task, size=count, seed=settings.data_seed)
    except ValueError as error:
        raise DataError(f"reasoning-gym has no task {task!r} ({first_line(error)}); see its gallery") from error
    is_plain = type(found).score_answer is ProceduralDataset.score_answer
    if not is_plain and task not in _UNIQUE_ANSWERS:
        raise DataError(
            f"the task {task!r} of reasoning-gym takes several answers as right, which only its own scorer can tell, "
            "and scorers are not run on what models write because some evaluate it; choose a task with one right answer"
        )
    return [
        Prompt(f"{task}/{index}", str(entry["question"]) + settings.question_suffix, str(entry["answer"]))
        for index, entry in enumerate(found)
    ]
