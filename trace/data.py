"""Prompt sources: a reproducible order over prompts with a position that can be saved.

Rows need a question (`prompt` or `question`) and an `answer`; `solution` and `id` are optional. Held-out questions are
never trained on: a source sets them aside by a hash of the question, so the choice depends on neither the order
of the rows nor the seed of the run. This module must not know where rows come from beyond JSONL files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from trace_rl.batch import Prompt
from trace_rl.errors import DataError
from trace_rl.prompts import derive_seed
from trace_rl.tasks.arithmetic import ArithmeticDifficulty, question_at

_QUESTION_KEYS = ("question", "prompt")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def read_jsonl(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (place, row) for every non-empty line; the place names file and line for error messages."""
    if not path.is_file():
        raise DataError(f"data file {path} does not exist; give an existing JSONL file in data.path")
    rows: list[tuple[str, Mapping[str, Any]]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append((f"{path}:{number}", _to_row(f"{path}:{number}", line)))
    except OSError as error:
        raise DataError(f"data file {path} cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data file {path} is not UTF-8 text ({error}); convert it to UTF-8") from None
    if not rows:
        raise DataError(f"data file {path} has no rows; expected one JSON object a line with question and answer")
    return rows


def _to_row(place: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of too many digits is no JSONDecodeError
        raise DataError(f"{place} is not valid JSON ({error}); each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise DataError(f"{place} holds a {type(row).__name__}; each line must be one JSON object")
    return row


def to_prompts(rows: Sequence[tuple[str, Mapping[str, Any]]], question_suffix: str = "") -> list[Prompt]:
    """Turn rows into prompts; raises DataError naming the first row that lacks a question or an answer."""
    prompts = [_to_prompt(place, row, question_suffix) for place, row in rows]
    seen: dict[str, str] = {}
    for prompt, (place, _) in zip(prompts, rows, strict=True):
        if prompt.prompt_id in seen:
            raise DataError(f"{place} has the id {prompt.prompt_id!r} of {seen[prompt.prompt_id]}; ids must be unique")
        seen[prompt.prompt_id] = place
    return prompts


def _to_prompt(place: str, row: Mapping[str, Any], question_suffix: str) -> Prompt:
    question = next((row[key] for key in _QUESTION_KEYS if row.get(key)), None)
    if not isinstance(question, str):
        raise DataError(
            f"{place} has no question text (columns: {', '.join(row) or 'none'}); "
            "put it as a string under 'question' or 'prompt'"
        )
    answer = row.get("answer")
    if answer is None or str(answer).strip() == "":
        raise DataError(f"{place} has no answer (columns: {', '.join(row)}); put the expected result under 'answer'")
    if "####" in str(answer):
        raise DataError(
            f"{place} has a worked solution under 'answer' (it holds '####'); put what stands behind '####' under "
            "'answer' and the whole under 'solution', or no response can ever be graded as correct"
        )
    prompt_id = row.get("id")
    prompt = Prompt(
        # seeds depend on the id: moving a file must not change a run, so the folder does not count
        prompt_id=Path(place).name if prompt_id is None else str(prompt_id),
        question=question + question_suffix,
        answer=str(answer),
        solution=str(row.get("solution") or ""),
    )
    if any(map(_HALF_CHARACTER.search, (prompt.prompt_id, prompt.question, prompt.answer, prompt.solution))):
        raise DataError(
            f"{place} holds half a character (an escape such as \\ud83d without its second half), which no tokenizer "
            "or file can hold; correct the text"
        )
    return prompt


def split_heldout(prompts: Sequence[Prompt], num_heldout: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return (train, held-out); equal questions always fall on the same side."""
    if num_heldout == 0:
        return list(prompts), []
    by_hash = sorted(prompts, key=lambda prompt: (_hash(prompt.question), prompt.prompt_id))
    heldout = by_hash[:num_heldout]
    questions = {prompt.question for prompt in heldout}
    train = [prompt for prompt in prompts if prompt.question not in questions]
    if not train:
        raise DataError(
            f"the data has {len(prompts)} rows and data.heldout_rows sets {num_heldout} aside, which leaves nothing to "
            "train on; lower data.heldout_rows or give data.heldout_path"
        )
    return train, heldout


def _hash(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


class RowSource:
    """Prompts in an order that is shuffled anew every epoch.

    A step never spans two epochs: when fewer than `count` prompts are left, they are skipped, so that one step cannot
    hold the same prompt twice.
    """

    def __init__(self, train: Sequence[Prompt], heldout: Sequence[Prompt], seed: int) -> None:
        self._train = list(train)
        self._heldout = list(heldout)
        self._seed = seed
        self._epoch = 0
        self._offset = 0

    @property
    def train_prompts(self) -> Sequence[Prompt]:
        """Every prompt that may be trained on."""
        return self._train

    def take(self, count: int) -> list[Prompt]:
        """Return the next `count` distinct prompts."""
        if count > len(self._train):
            raise DataError(
                f"sampling.prompts_per_step is {count}, but the data has {len(self._train)} training rows; "
                "lower the former or give more rows"
            )
        if self._offset + count > len(self._train):
            self._epoch, self._offset = self._epoch + 1, 0
        order = np.random.default_rng(derive_seed(self._seed, "epoch", self._epoch)).permutation(len(self._train))
        chosen = order[self._offset : self._offset + count]
        self._offset += count
        return [self._train[index] for index in chosen]

    def heldout(self, count: int) -> list[Prompt]:
        """Return up to `count` held-out prompts, always the same ones."""
        return self._heldout[:count]

    def position(self) -> dict[str, int]:
        return {"epoch": self._epoch, "offset": self._offset}

    def seek(self, position: Mapping[str, int]) -> None:
        """Go on at a position of this kind of source; KeyError for one of another kind."""
        self._epoch, self._offset = position["epoch"], position["offset"]


class ArithmeticSource:
    """The embedded task: an endless stream of questions, each a function of (seed, index)."""

    HELDOUT_SEED = 0  # the same held-out questions for every run, so that runs can be compared

    def __init__(self, difficulty: ArithmeticDifficulty, seed: int) -> None:
        self._difficulty = difficulty
        self._seed = seed
        self._index = 0

    def take(self, count: int) -> list[Prompt]:
        first, self._index = self._index, self._index + count
        return [question_at(self._difficulty, self._seed, "train", index) for index in range(first, self._index)]

    def heldout(self, count: int) -> list[Prompt]:
        return [question_at(self._difficulty, self.HELDOUT_SEED, "heldout", index) for index in range(count)]

    def position(self) -> dict[str, int]:
        return {"index": self._index}

    def seek(self, position: Mapping[str, int]) -> None:
        """Go on at a position of this kind of source; KeyError for one of another kind."""
        self._index = position["index"]
