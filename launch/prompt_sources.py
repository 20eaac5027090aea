"""Opens what `data.path` names: the embedded task, a JSONL file, or a Hugging Face data set from disk or hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_rl.batch import Prompt, SpanClass
from trace_rl.config.annotator import TypeLists
from trace_rl.config.run import RunConfig
from trace_rl.data import ArithmeticSource, RowSource, read_jsonl, split_heldout, to_prompts
from trace_rl.errors import DataError, first_line
from trace_rl.launch.model_files import EMBEDDED
from trace_rl.launch.saved_datasets import open_saved, without_media
from trace_rl.protocols import ErrorRule, PromptSource
from trace_rl.tasks.arithmetic import ArithmeticRule
from trace_rl.tasks.equations import EquationRule

_HUB_PREFIX = "hf:"


def open_source(config: RunConfig) -> PromptSource:
    """The training and held-out prompts of a run.

    Raises:
        DataError: a file is missing or malformed, or a row lacks its question or answer; names file and line.
    """
    data = config.data
    if data.path == EMBEDDED:
        return ArithmeticSource(data.task, config.run.seed)
    prompts = to_prompts(_rows(data.path, data.split), data.question_suffix)
    if data.heldout_path is None:
        train, heldout = split_heldout(prompts, data.heldout_rows)
    else:
        train, heldout = prompts, to_prompts(_rows(data.heldout_path, data.split), data.question_suffix)
        _refuse_overlap(train, heldout, "data.heldout_path", "leave data.heldout_path out to have rows set aside")
    return RowSource(train, heldout, config.run.seed)


def open_evaluation_sets(config: RunConfig, train: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """The prompts of evaluation.sets by name, at most evaluation.num_prompts of each.

    Args:
        train: known training prompts, none of which may be among them.

    Raises:
        DataError: as for `open_source`.
    """
    data, most = config.data, config.evaluation.num_prompts
    opened: dict[str, list[Prompt]] = {}
    for name, settings in config.evaluation.sets.items():
        if settings.task is not None:
            prompts = ArithmeticSource(settings.task, config.run.seed).heldout(most)
        else:
            prompts = to_prompts(_rows(str(settings.path), data.split), data.question_suffix)[:most]
            _refuse_overlap(train, prompts, f"evaluation.sets.{name}.path", f"leave the set {name} out")
        opened[name] = prompts
    return opened


def _refuse_overlap(train: Sequence[Prompt], heldout: Sequence[Prompt], setting: str, way_out: str) -> None:
    questions = {prompt.question for prompt in train}
    shared = [prompt.prompt_id for prompt in heldout if prompt.question in questions]
    if shared:
        raise DataError(
            f"{len(shared)} of {len(heldout)} questions in {setting} are training questions too (first: {shared[0]}); "
            f"remove them from one of the two, or {way_out}"
        )


def error_rule(config: RunConfig) -> ErrorRule:
    """The rule of the oracle annotator: the task's own, or the equation rule for other data."""
    return ArithmeticRule() if config.data.path == EMBEDDED else EquationRule()


def annotation_types(config: RunConfig) -> dict[SpanClass, Mapping[str, str]]:
    """The closed lists of types by class: the rule's where only rules annotate, else those that the run gives, the
    task's own, or the general ones, in this order."""
    settings, rule = config.annotator, error_rule(config).types
    is_rule = settings.backend.model is None and not settings.backend.recording
    if is_rule or (settings.types is None and config.data.path == EMBEDDED):
        return {"key": rule, "error": rule}
    lists = settings.types or TypeLists()
    return {"key": lists.key, "error": lists.error}


def peek(source: PromptSource, count: int) -> list[Prompt]:
    """The next training prompts, without moving the position."""
    position = source.position()
    prompts = list(source.take(count))
    source.seek(position)
    return prompts


def _rows(path: str, split: str) -> list[tuple[str, Mapping[str, Any]]]:
    if path.startswith(_HUB_PREFIX):
        return _dataset_rows(path, _load_from_hub(path.removeprefix(_HUB_PREFIX), split))
    try:
        folder = Path(path).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, the home of nobody
        raise DataError(f"data path {path!r} cannot be looked up ({first_line(error)}); correct it") from error
    if is_folder:
        return _dataset_rows(path, open_saved(folder, split, "data.split", "a JSONL file"))
    return read_jsonl(folder)


def _dataset_rows(path: str, dataset: Any) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f"{path}[{index}]", row) for index, row in enumerate(dataset)]


def _load_from_hub(name: str, split: str) -> Any:
    from datasets import load_dataset

    try:
        return without_media(load_dataset(name, split=split))
    except (OSError, ValueError) as error:
        raise DataError(
            f"data set {name!r} (split {split!r}) does not load from the hub ({first_line(error)}); without network "
            "access, download it elsewhere, save it with datasets.save_to_disk and give that folder in data.path"
        ) from error
