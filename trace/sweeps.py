"""A sweep's file -> its cells, each with the whole configuration of one run, or one clear sentence for every mistake.

All cells are made and validated before anything runs. A mistake is told with the line of the sweep's file (or of the
configuration file) that holds it, and once, however many cells share it.

This module must not know how cells are run, or what has become of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from trace_rl.config.run import RunConfig
from trace_rl.config.sweep import Overlay, Point, SweepConfig
from trace_rl.errors import ConfigError
from trace_rl.overlays import Document, Layers, Path_, read_document

SET_BY_SWEEP: Mapping[str, str] = {
    "run.name": "runs are named by their axes and seed",
    "run.folder": "give `folder`",
    "run.seed": "give `seeds`",
    "run.resume": "a cell always goes on from its newest checkpoint",
}
"""Settings that a sweep's file cannot give, with what to do instead."""
_MAX_NAME = 200
"""Characters; file systems take 255 bytes, and logs and configurations add an ending."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    group: str
    """Its name without the seed."""
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """Of the run and of its folder below the sweep's."""
        return self.config.run.name

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder.format(name=self.name))


@dataclass(frozen=True)
class Sweep:
    settings: SweepConfig
    folder: Path
    """Absolute."""
    cells: tuple[Cell, ...]
    """By group, in the order of the axes, and in each group by seed."""

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.group for cell in self.cells))


class _Place(NamedTuple):
    """A point and the axis that it lies on."""

    axis: str
    point: Point


def load_sweep(file: Path, overrides: Iterable[str] = (), folder: str = "") -> Sweep:
    """Read a sweep's file and make all of its cells.

    Args:
        overrides: `a.b=value`, laid over every cell.
        folder: in place of the file's own, where it is given.

    Raises:
        ConfigError: with one line per problem: place, what was found, what was expected, a suggestion.
    """
    document = read_document(file)
    settings = document.validated(SweepConfig)
    where = _folder(settings, document, folder or settings.folder.format(name=settings.name))
    maker = _CellMaker(document, settings, where, tuple(overrides))
    problems: dict[str, None] = {}
    cells: list[Cell] = []
    for places in product(*([_Place(name, point) for point in axis.points()] for name, axis in settings.axes.items())):
        try:
            cells += maker.cells(places)
        except ConfigError as error:
            problems |= dict.fromkeys(error.args)
    if problems:
        raise ConfigError(*problems)
    sweep = Sweep(settings, where, tuple(cells))
    _check_names(sweep, document)
    return sweep


@dataclass(frozen=True)
class _CellMaker:
    document: Document
    settings: SweepConfig
    folder: Path
    extra: Sequence[str]

    def cells(self, places: Sequence[_Place]) -> Iterator[Cell]:
        """The cells of one combination of points: one a seed."""
        layers = Layers()
        self._lay(layers, self.settings.base, ("base",), ("base", "overrides"))
        for axis, point in places:
            self._lay(layers, point.overlay, ("axes", axis, *point.keys[:-1]), ("axes", axis, *point.keys))
        for override in self.extra:
            name = override.partition("=")[0].strip()
            _refuse_own(f"override {name}", name)
            layers.add_override(override)
        if self.settings.address:
            layers.add_setting("placement.ray_address", "auto", lambda mapping, key: "a sweep with an address")
        config = layers.run_config()
        group = "_".join(point.label for _, point in places) or self.settings.name
        for seed in self.settings.seeds:
            name = f"{group}_seed-{seed}"
            folder = str(self.folder / name).replace("{", "{{").replace("}", "}}")
            update = {"name": name, "folder": folder, "seed": seed, "resume": "auto"}
            yield Cell(group, seed, config.model_copy(update={"run": config.run.model_copy(update=update)}))

    def _lay(self, layers: Layers, overlay: Overlay, files_at: Path_, overrides_at: Path_) -> None:
        for name in overlay.files:
            path = self.document.file.parent / name
            if not path.is_file():
                place = self._place((*files_at, "files"))
                raise ConfigError(f"{place}: files names {name!r}, but {path.resolve()} is no file; check the path")
            layers.add_file(path)
        for dotted, value in overlay.overrides.items():
            place = self._place((*overrides_at, dotted))
            _refuse_own(place, dotted, value)
            layers.add_setting(dotted, value, self._places_below(place))

    def _place(self, keys: Path_) -> str:
        """FILE:LINE of a key, or of the nearest one above it that has a line."""
        places = self.document.places()
        return next(places[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in places)

    def _places_below(self, place: str) -> Any:
        def place_of(mapping: Mapping[str, Any], key: str) -> str:
            line = self.document.lines.get(id(mapping), {}).get(key)
            return place if line is None else f"{self.document.file}:{line}"

        return place_of


def _refuse_own(place: str, dotted: str, value: Any = None) -> None:
    names = [f"{dotted}.{key}" for key in value] if isinstance(value, dict) else []
    for name in (dotted, *names):
        if name in SET_BY_SWEEP:
            raise ConfigError(f"{place}: {name} is set by the sweep; {SET_BY_SWEEP[name]}")


def _folder(settings: SweepConfig, document: Document, given: str) -> Path:
    """Where the sweep lies, absolute."""
    folder = Path(given).expanduser()
    if settings.address and not folder.is_absolute():
        raise ConfigError(
            f"{document.file}: address is given, so that cells are jobs of a cluster, but folder is "
            f"{given!r}, which each node would look for elsewhere; give an absolute path that all "
            "nodes and this machine share"
        )
    return folder.resolve()


def _check_names(sweep: Sweep, document: Document) -> None:
    """Refuse two cells in one folder, folders that no file system takes, and a reference that is no group."""
    seen: set[str] = set()
    for cell in sweep.cells:
        if cell.name in seen:
            raise ConfigError(
                f"{document.file}: two cells would be called {cell.name}, because their settings look alike in a name; "
                "use an axis of type list, whose variants you name"
            )
        if len(cell.name) > _MAX_NAME:
            raise ConfigError(
                f"{document.file}: the cell {cell.name[:60]}... would have a name of {len(cell.name)} characters, more "
                f"than {_MAX_NAME}; use an axis of type list, whose variants you name"
            )
        seen.add(cell.name)
    reference, groups = sweep.settings.report.reference, sweep.groups
    if reference and reference not in groups:
        place = document.places()["report", "reference"]
        raise ConfigError(f"{place}: report.reference is {reference!r}; expected a group, one of {', '.join(groups)}")
