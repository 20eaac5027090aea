"""Settings of an evaluation of checkpoints: which sets, how they are asked, sampled and graded, and on what.

Decides what a set is, and the built-in definitions of the sets that papers report. Must not know how rows are opened
(`trace_rl.launch.evaluate.sets`) or who samples. What a run evaluates on its way is `trace_rl.config.roles.Evaluation`.

Invariant: `sets` holds whole definitions once it is read, so that a stored configuration says all that was done.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from trace_rl.config.base import Section, check_fields, check_folder_name
from trace_rl.config.placement import Placement
from trace_rl.config.roles import GeneratorSettings, Rewarder
from trace_rl.tasks.arithmetic import ArithmeticDifficulty

ARITHMETIC = "task:arithmetic"
GYM = "reasoning_gym:"
HUB = "hf:"
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_LETTER = "\n\nPlease reason step by step, and put the letter of your choice within \\boxed{}."


class EvalSet(Section):
    """Problems, how they are asked, and how answers are sampled and graded."""

    name: str
    """Of the set; seeds of its samples are derived from it."""
    path: str
    """A .jsonl, .json, .csv or .parquet file, a folder written by datasets.save_to_disk, `hf:NAME` on the hub,
    `task:arithmetic` or `reasoning_gym:TASK`."""
    subset: str = ""
    """Configuration of a data set on the hub, where it has several."""
    split: str = "test"
    """Split of a Hugging Face data set."""
    question_columns: tuple[str, ...] = ("question", "problem", "prompt", "Question")
    """Of a row, the first one that is there is read; so for the other columns."""
    answer_columns: tuple[str, ...] = ("answer", "Answer", "Correct Answer")
    """The expected result; of multiple choice the text of the right option."""
    id_columns: tuple[str, ...] = ("id", "ID", "unique_id", "Record ID")
    """What names a problem; without any, its place in the file."""
    wrong_columns: tuple[str, ...] = ()
    """Texts of the wrong options of multiple choice; all of them are read."""
    answer_form: Literal["math", "text", "letter"] = "math"
    """`math`: the boxed result, compared by math-verify. `text`: compared as text, up to case and spaces, and numbers
    by value. `letter`: options are lettered in an order that is drawn for each problem, the same for all of its samples
    and all models, and the chosen letter counts."""
    question_suffix: str = _BOXED
    """Appended to every question."""
    num_problems: int = Field(0, ge=0)
    """The first so many problems; 0: all of them (of an endless source 256)."""
    samples_per_problem: int = Field(1, ge=1)
    """k of avg@k; more may be added to an evaluation that is done."""
    temperature: float = Field(0.6, ge=0, le=2)
    """0: greedy, for a single sample."""
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(20, ge=0)
    """0: all tokens."""
    max_response_tokens: int = Field(32768, ge=1)
    """A response that reaches it is truncated and graded 0."""
    thinking: Literal["template", "on", "off"] = "template"
    """Passed to the chat template as `enable_thinking`; `template` leaves it to the template."""
    data_seed: int = 0
    """Of the problems of a procedural source and of the order of options; not of the samples."""
    difficulty: ArithmeticDifficulty = ArithmeticDifficulty()
    """Of the embedded task; read only when `path` is `task:arithmetic`."""

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template is told for this set."""
        return {} if self.thinking == "template" else {"enable_thinking": self.thinking == "on"}

    @model_validator(mode="after")
    def _form_has_what_it_needs(self) -> Self:
        if self.answer_form == "letter" and not self.wrong_columns:
            raise ValueError(
                f"set {self.name} has answer_form letter, but no wrong_columns; name the columns of the wrong options"
            )
        if not self.temperature and self.samples_per_problem > 1:
            raise ValueError(
                f"set {self.name} has temperature 0, where all of its {self.samples_per_problem} samples of a problem "
                "would be the same; set samples_per_problem to 1 or raise the temperature"
            )
        if not self.name or not set(self.name) <= _NAME_CHARS:
            raise ValueError(f"set name {self.name!r} must consist of letters, digits and . _ - : for its folder")
        check_folder_name("set name", self.name)
        return self


_NAME_CHARS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:")

_OF_ARITHMETIC: dict[str, Any] = {
    "path": ARITHMETIC,
    "question_suffix": "",
    "samples_per_problem": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "max_response_tokens": 192,
}
BUILT_IN: Mapping[str, Mapping[str, Any]] = {
    "MATH-500": {"path": "hf:HuggingFaceH4/MATH-500", "samples_per_problem": 4},
    "AIME24": {"path": "hf:HuggingFaceH4/aime_2024", "split": "train", "samples_per_problem": 16},
    "AIME25": {"path": "hf:math-ai/aime25", "samples_per_problem": 16},
    "AMC23": {"path": "hf:math-ai/amc23", "samples_per_problem": 16},
    "GPQA-Diamond": {
        "path": "hf:Idavidrein/gpqa",
        "subset": "gpqa_diamond",
        "split": "train",
        "wrong_columns": ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        "answer_columns": ("Correct Answer",),
        "answer_form": "letter",
        "question_suffix": _LETTER,
        "samples_per_problem": 8,
    },
    "arithmetic": _OF_ARITHMETIC,
    "arithmetic-longer": {**_OF_ARITHMETIC, "difficulty": {"min_steps": 7, "max_steps": 9}, "max_response_tokens": 256},
    "arithmetic-larger": {**_OF_ARITHMETIC, "difficulty": {"min_operand": 30, "max_operand": 49}},
}
"""Definitions by name. k of AIME and GPQA follows from the granularity of the paper's numbers (multiples of 1 / 480 and
1 / 1584), decoding from a secondary source; k of MATH-500 and AMC23 and the length budget are ours. The last three are
the embedded task: its own difficulty, and two outside of it."""


class EvalConfig(Section):
    """Everything that decides an evaluation but the checkpoints."""

    sets: tuple[EvalSet, ...] = Field(min_length=1)
    """Definitions, or names: of a built-in set, `reasoning_gym:TASK`, a file, or `NAME=FILE`, which reads the built-in
    set of that name from a file of one's own. A mapping with the name of a built-in set is laid over that."""
    all_sets: dict[str, Any] = {}
    """Settings that are laid over every set, for example {thinking: on, max_response_tokens: 8192}."""
    seed: int = 0
    """Samples depend on it, on the set's name, the problem's id and their own number, and on no order."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: that of the run, or else float32 where the checkpoint's config.json says so and bfloat16 elsewhere."""
    trust_remote_code: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    """On top of those of the run; `thinking` of a set is on top of both."""
    folder: str = "evaluations/{model}"
    """Where a checkpoint's samples and metrics are written; {model} is replaced."""
    timeout_s: float = Field(7 * 24 * 3600.0, gt=0)
    """Deadline of all sets of one checkpoint."""
    generator: GeneratorSettings = GeneratorSettings()
    rewarder: Rewarder = Rewarder()
    placement: Placement = Placement()
    """Of generator and rewarder; other roles are not started."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_sets(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("sets"), str | list | tuple):
            return values
        given = values["sets"].split(",") if isinstance(values["sets"], str) else values["sets"]
        over = values.get("all_sets") or {}
        sets = [item if isinstance(item, EvalSet) else {**definition(item), **over} for item in given]
        return {**values, "sets": sets}

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        check_fields("folder", self.folder, {"model"})
        names = [item.name for item in self.sets]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sets holds {name} {names.count(name)} times; give each its own name")
        return self

    @property
    def cpus_for_roles(self) -> int:
        """Logical CPUs that the roles ask Ray for together, rounded up."""
        engines = self.placement.generator.num_cpus * self.generator.tensor_parallel * self.generator.num_engines
        return max(1, -int(-(engines + self.placement.rewarder.num_cpus) // 1))


def definition(item: Any) -> dict[str, Any]:
    """The settings of a set that was given by name, or by a mapping with a name.

    Raises:
        ValueError: no set has this name; tells which have one like it.
    """
    if isinstance(item, Mapping):
        name = str(item.get("name", ""))
        return {**BUILT_IN.get(name, {}), **item}
    if not isinstance(item, str):
        raise ValueError(f"sets holds {item!r}; expected a name or a mapping with name and path")
    text = item.strip()
    if text in BUILT_IN:
        return {"name": text, **BUILT_IN[text]}
    if text.startswith(GYM):
        return {"name": text.removeprefix(GYM), "path": text, "answer_form": "text"}
    name, separator, path = text.partition("=")
    if separator and name in BUILT_IN:
        return {"name": name, **BUILT_IN[name], "path": path}
    if text.endswith(FILE_SUFFIXES):
        return {"name": PurePath(text).stem, "path": text}
    near = difflib.get_close_matches(text, BUILT_IN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"built in are {', '.join(BUILT_IN)}."
    raise ValueError(
        f"no set has the name {text!r}; {hint} A file needs one of the endings {', '.join(FILE_SUFFIXES)}, and a task "
        f"of reasoning-gym the prefix {GYM}"
    )
