"""Opens a data set that datasets.save_to_disk has written, and leaves out what of a data set is no text."""

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
        return without_media(dataset)
    if split not in dataset:
        raise DataError(f"{folder} has no split {split!r}, only {', '.join(dataset)}; set {setting}")
    return without_media(dataset[split])


def without_media(dataset: Any) -> Any:
    """A data set without its columns of images, sounds and the like.

    Reading a row would decode them, by opening whatever file or address the data name, on this machine.
    """
    from datasets.features.features import require_decoding

    media = [name for name, feature in (dataset.features or {}).items() if require_decoding(feature)]
    return dataset.remove_columns(media)
