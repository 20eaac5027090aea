"""Settings of a sweep: what its runs have in common, the axes along which they differ, and when one is ended early.

A sweep is base x axes x seeds. Every axis is a list of points, each a name and settings to add; the cells of the sweep
are all combinations of one point of each axis. This module decides what an axis may be; it must not know how cells
become configurations (`trace_rl.sweeps`) or how they are run (`trace_rl.launch.sweep`).
"""

from __future__ import annotations

import json
import math
import random
import re
from abc import abstractmethod
from collections.abc import Mapping
from itertools import product
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from trace_rl.config.base import Kind, Section, check_fields

_DIGITS = 4
"""Of a number that is drawn: so that it is exactly what the name of its cell says."""
_UNSAFE = re.compile(r"[^A-Za-z0-9.+-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


class Overlay(Section):
    """Settings that are laid over others: whole files first, single settings on top."""

    files: tuple[str, ...] = ()
    """Configuration files, by their paths beside the sweep's file, merged left to right."""
    overrides: dict[str, Any] = {}
    """Settings by their dotted names, for example {run.steps: 60}; a mapping as value is merged key by key."""


class Point(NamedTuple):
    """One place on an axis."""

    label: str
    """Its part of the names of cells."""
    overlay: Overlay
    keys: tuple[str, ...]
    """Where the overrides stand in the axis, to name the line of a mistake."""


class Axis(Kind):
    """One way in which cells differ: grid, zip, list or random."""

    @abstractmethod
    def points(self) -> list[Point]:
        """All of its points, always in the same order."""


class Grid(Axis):
    """Every combination of the values of its settings."""

    type: Literal["grid"] = "grid"
    values: dict[str, list[Any]] = Field(min_length=1)
    """Dotted name -> values to try."""

    def points(self) -> list[Point]:
        return [_point(dict(zip(self.values, chosen, strict=True))) for chosen in product(*self.values.values())]


class Zip(Axis):
    """The first values of its settings together, then the second ones, and so on."""

    type: Literal["zip"] = "zip"
    values: dict[str, list[Any]] = Field(min_length=1)
    """Dotted name -> values; all lists are of one length."""

    @model_validator(mode="after")
    def _lists_are_of_one_length(self) -> Zip:
        lengths = {name: len(values) for name, values in self.values.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise ValueError(f"the lists of an axis zip have different lengths ({found}); give as many values to each")
        return self

    def points(self) -> list[Point]:
        return [
            _point(dict(zip(self.values, chosen, strict=True))) for chosen in zip(*self.values.values(), strict=True)
        ]


class Variants(Axis):
    """Named variants, each with files and settings of its own."""

    type: Literal["list"] = "list"
    variants: dict[str, Overlay] = Field(min_length=1)
    """Name -> what it adds; the name becomes that of its cells."""

    @field_validator("variants")
    @classmethod
    def _names_are_plain(cls, variants: dict[str, Overlay]) -> dict[str, Overlay]:
        for name in variants:
            _check_name("the variant", name)
        return variants

    def points(self) -> list[Point]:
        return [Point(name, overlay, ("variants", name, "overrides")) for name, overlay in self.variants.items()]


class Draw(Kind):
    """A distribution of one setting: uniform, log_uniform, integers or choice."""

    @abstractmethod
    def at(self, share: float) -> Any:
        """The value below which `share` in [0, 1) of the distribution lies."""


class _Range(Draw):
    low: float
    high: float

    @model_validator(mode="after")
    def _low_is_below_high(self) -> _Range:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}; swap or change them")
        return self


class Uniform(_Range):
    """A number in [low, high)."""

    type: Literal["uniform"] = "uniform"

    def at(self, share: float) -> float:
        return _rounded(self.low + share * (self.high - self.low))


class LogUniform(_Range):
    """A number in [low, high) whose logarithm is uniform."""

    type: Literal["log_uniform"] = "log_uniform"
    low: float = Field(gt=0)

    def at(self, share: float) -> float:
        return _rounded(self.low * math.exp(share * math.log(self.high / self.low)))


class Integers(_Range):
    """A whole number from low to high, both included."""

    type: Literal["integers"] = "integers"
    low: int
    high: int

    def at(self, share: float) -> int:
        return self.low + int(share * (self.high - self.low + 1))


class Choice(Draw):
    """One of several values, all equally likely."""

    type: Literal["choice"] = "choice"
    of: list[Any] = Field(min_length=1)

    def at(self, share: float) -> Any:
        return self.of[int(share * len(self.of))]


class RandomAxis(Axis):
    """Settings that are drawn independently; the same ones for the same seed."""

    type: Literal["random"] = "random"
    num: int = Field(ge=1)
    """Points to draw."""
    seed: int = 0
    values: dict[str, Draw] = Field(min_length=1)
    """Dotted name -> what it is drawn from."""

    def points(self) -> list[Point]:
        drawn = []
        for index in range(self.num):
            settings = {}
            for name, distribution in self.values.items():
                # a stream for each setting: one that is added leaves the others as they are
                settings[name] = distribution.at(random.Random(f"sweep/{self.seed}/{name}/{index}").random())
            point = _point(settings)
            drawn.append(point._replace(label=f"draw{index}_{point.label}"))
        return drawn


class StopRule(Section):
    """A cell is ended early where a metric is on the wrong side of a threshold."""

    metric: str
    """As it is called in metrics.jsonl."""
    at_step: int = Field(ge=0)
    """The first value recorded at this step or later decides; later ones do not."""
    below: float | None = None
    above: float | None = None

    @model_validator(mode="after")
    def _has_one_threshold(self) -> StopRule:
        if (self.below is None) == (self.above is None):
            raise ValueError(
                f"the stop rule on {self.metric} has {'no' if self.below is None else 'two'} thresholds; give one of "
                "`below` and `above`"
            )
        return self

    def verdict(self, step: int, value: float) -> str:
        """What is wrong with the value that decides; empty where nothing is."""
        if self.below is not None and value < self.below:
            return f"{self.metric} is {value:.4g} at step {step}, below {self.below:g}"
        if self.above is not None and value > self.above:
            return f"{self.metric} is {value:.4g} at step {step}, above {self.above:g}"
        return ""


class SweepReport(Section):
    metrics: tuple[str, ...] = Field(("heldout/pass_at_1",), min_length=1)
    """What `sweep report` compares at the end of the runs."""
    last_steps: int = Field(1, ge=1)
    """A metric's value in a run is its mean over this many last steps, which smooths what is measured at each step."""
    reference: str = ""
    """The group of cells that all others are compared with: its name without the seed. Empty: no comparison."""


class SweepConfig(Section):
    """A file under configs/sweeps."""

    name: str
    folder: str = "runs/{name}"
    """Where the sweep and its runs lie; {name} is replaced."""
    base: Overlay
    """What all cells have in common."""
    axes: dict[str, Axis] = {}
    """Name -> axis. The name is for the reader; settings of a later axis win over those of an earlier one."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Every combination is run once with each, as run.seed."""
    stop: tuple[StopRule, ...] = ()
    parallel: int = Field(1, ge=1)
    """Cells that run at a time."""
    address: str = ""
    """Dashboard of a Ray cluster, http://HEAD:8265: cells are jobs there, and `folder` is one that all its nodes and
    this machine share. Empty: cells are processes of this machine."""
    cell_timeout_s: float = Field(86400.0, gt=0)
    """A cell that takes longer is ended and counts as broken."""
    report: SweepReport = SweepReport()

    @model_validator(mode="after")
    def _names_make_a_folder(self) -> SweepConfig:
        _check_name("the sweep's name", self.name)
        check_fields("folder", self.folder, {"name"})
        return self

    @model_validator(mode="after")
    def _seeds_differ(self) -> SweepConfig:
        twice = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        if twice:
            raise ValueError(f"seeds holds {twice[0]} twice; two runs of one seed are one run, keep one of them")
        return self


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} {name!r} becomes the name of a folder; use letters, digits, _ . + and - only, a letter or a digit "
            "first"
        )


def _point(settings: Mapping[str, Any]) -> Point:
    """A point that is called by its settings: learning_rate-0.0002_steps-60."""
    label = "_".join(f"{name.rpartition('.')[2]}-{_written(value)}" for name, value in settings.items())
    return Point(label, Overlay(overrides=dict(settings)), ("values",))


def _written(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    return _UNSAFE.sub("-", text).strip("-") or "none"


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
