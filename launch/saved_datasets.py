"""Opens a data set that datasets.save_to_disk has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_rl.errors import DataError, first_line


def open_saved(folder: Path, split: str, setting: str, instead: str) -> Any:
    """The split of the data set in a folder, or all of it where it has no splits.

    Args:
        setting: which one says the split.
        instead: what else may be given.

    Raises:
        DataError: the folder holds no such data set, or not this split.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(
            f"folder {folder} is not a data set written by datasets.save_to_disk ({first_line(error)}); give {instead} "
            "instead"
        ) from error
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise DataError(f"{folder} has no split {split!r}, only {', '.join(dataset)}; set {setting}")
    return dataset[split]
