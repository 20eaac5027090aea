"""YAML files, `extends`, overlays and dotted overrides -> one RunConfig, or one clear sentence.

Other files with a schema of their own (a sweep's) are read by the same rules for keys and lines, without `extends`.

Rules: files are merged left to right; mappings merge key by key, everything else (lists too) is replaced;
`!replace {...}` replaces a mapping as a whole, `{}` empties it; `null` goes back to the default. A file may name the
files it builds on under `extends` (paths beside it). Dotted overrides `a.b=value` come last; the value is read as YAML.
Duplicate keys are errors with a line number, as is every key and type that RunConfig does not accept.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from trace_rl.config.base import Kind
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, first_line, short_repr
from trace_rl.secrecy import Redactor, literal_secret_in
from trace_rl.yaml_files import Replaced, read_mapping, read_value

Path_ = tuple[str, ...]
PlaceOf = Callable[[Mapping[str, Any], str], str]
"""Where a key of a mapping was given."""
Schema = TypeVar("Schema", bound=BaseModel)

_MAX_LEVELS = 64
"""Of a dotted key; settings are a handful of levels deep."""


@dataclass
class Layers:
    """The merged tree and, for every key, the place that set it last."""

    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[Path_, str] = field(default_factory=dict)
    schema: type[BaseModel] = RunConfig

    def add_file(self, file: Path) -> None:
        """Lay a file, and before it what it extends, over what is there."""
        _add_file(self, file, ())

    def add_override(self, override: str) -> None:
        """Lay one `a.b=value` over what is there."""
        _add_override(self, override)

    def add_setting(self, dotted: str, value: Any, place_of: PlaceOf) -> None:
        """Lay one setting, whose value is read already, over what is there."""
        _add_setting(self, dotted, value, place_of)

    def run_config(self) -> RunConfig:
        """What the layers say together.

        Raises:
            ConfigError: with one line per problem: place, what was found, what was expected, a suggestion.
        """
        _import_plugins(self)
        return _validated(RunConfig, self)


@dataclass(frozen=True)
class Document:
    """One file with a schema of its own, and where its keys stand."""

    file: Path
    tree: dict[str, Any]
    lines: Mapping[int, Mapping[str, int]]
    """Of the mappings of the tree by `id`: key -> line."""

    def places(self) -> dict[Path_, str]:
        """FILE:LINE of every key that is not below a list."""
        found: dict[Path_, str] = {}
        self._collect(self.tree, (), found)
        return found

    def validated(self, schema: type[Schema]) -> Schema:
        """The file as its schema reads it.

        Raises:
            ConfigError: with one line per problem, each with its place.
        """
        return _validated(schema, Layers(self.tree, self.places(), schema))

    def _collect(self, mapping: Mapping[str, Any], path: Path_, found: dict[Path_, str]) -> None:
        for key, value in mapping.items():
            here = (*path, str(key))
            found[here] = f"{self.file}:{self.lines.get(id(mapping), {}).get(str(key), '?')}"
            if isinstance(value, dict):
                self._collect(value, here, found)


def read_document(file: Path) -> Document:
    """Read a file that is no part of a run's configuration.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has a key twice; names the line.
    """
    file = file.resolve()
    return Document(file, *read_mapping(file))


def load_config(files: Sequence[Path], overrides: Iterable[str] = ()) -> RunConfig:
    """Merge `files` left to right and `overrides` (`a.b=value`) on top, and validate.

    Raises:
        ConfigError: with one line per problem: place, what was found, what was expected, a suggestion.
    """
    layers = Layers()
    for file in files:
        layers.add_file(file)
    for override in overrides:
        layers.add_override(override)
    return layers.run_config()


def load_as(schema: type[Schema], files: Sequence[Path], overrides: Iterable[str] = ()) -> Schema:
    """As `load_config`, for a configuration that is no run's and knows no plugins.

    Raises:
        ConfigError: with one line per problem: place, what was found, what was expected, a suggestion.
    """
    layers = Layers(schema=schema)
    for file in files:
        layers.add_file(file)
    for override in overrides:
        layers.add_override(override)
    return _validated(schema, layers)


def dump_config(config: BaseModel) -> str:
    """A resolved configuration as YAML, which is read back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json", serialize_as_any=True), sort_keys=False, allow_unicode=True)


def _validated(schema: type[Schema], layers: Layers) -> Schema:
    try:
        found = schema.model_validate(layers.tree)
    except ValidationError as error:
        problems = (line for problem in error.errors() for line in _explain(problem, layers))
        raise ConfigError(*map(Redactor({}).redact, problems)) from None
    _refuse_literal_secrets(layers.tree, (), layers)
    return found


def _refuse_literal_secrets(value: Any, keys: Path_, layers: Layers) -> None:
    if isinstance(value, Mapping):
        for key, below in value.items():
            _refuse_literal_secrets(below, (*keys, str(key)), layers)
    elif isinstance(value, list | tuple):
        for below in value:
            _refuse_literal_secrets(below, keys, layers)
    elif isinstance(value, str) and (held := literal_secret_in(value)):
        raise ConfigError(
            f"{_place(keys, layers)}{'.'.join(keys)} holds {held}, and configurations are written to files that others "
            "read; put the secret into an environment variable, where its service looks for it or api_key_env names it"
        )


def _place(keys: Path_, layers: Layers) -> str:
    """Where a setting or the nearest one above it was given, as the beginning of a message."""
    place = next((layers.places[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in layers.places), "")
    return f"{place}: " if place else ""


def _import_plugins(layers: Layers) -> None:
    """Import the modules under `plugins`, so that the kinds they define are known when the rest is read."""
    names = layers.tree.get("plugins", ())
    if not isinstance(names, str | list | tuple):
        return  # the schema will refuse it
    for name in [names] if isinstance(names, str) else names:
        try:
            importlib.import_module(str(name))
        except Exception as error:  # a module may raise anything while it is imported
            raise ConfigError(
                f"{layers.places['plugins',]}: plugins names {short_repr(name)}, which cannot be imported "
                f"({first_line(error)}); give a module that is installed, or start in the folder that holds it"
            ) from error


def _add_file(layers: Layers, file: Path, chain: tuple[Path, ...]) -> None:
    try:
        file = file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a null byte, or links in a circle
        asked = f", which {chain[-1]} extends," if chain else ""
        raise ConfigError(f"config file {str(file)!r}{asked} is no path ({first_line(error)}); correct it") from None
    if file in chain:
        raise ConfigError(f"{file} extends itself through {' -> '.join(str(each) for each in (*chain, file))}")
    tree, lines = read_mapping(file, chain[-1] if chain else None)
    extends = tree.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        place = f"{file}:{lines[id(tree)]['extends']}"
        raise ConfigError(
            f"{place}: extends is {short_repr(extends)}; expected a path or a list of paths beside this file"
        )
    for parent in parents:
        _add_file(layers, file.parent / parent, (*chain, file))
    _merge(layers, layers.tree, tree, (), lambda mapping, key: f"{file}:{lines.get(id(mapping), {}).get(key, '?')}")


def _add_override(layers: Layers, override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not separator or not all(keys):
        given = short_repr(override)
        raise ConfigError(f"override {given} is not of the form section.key=value, for example run.steps=100")
    try:
        value = read_value(text)
    except RecursionError:
        raise ConfigError(f"override {dotted.strip()} has a value that is nested too deeply to be read") from None
    # the place is the key alone: a value may be a secret that was given where none belongs
    _add_setting(layers, dotted.strip(), value, lambda mapping, key: f"override {dotted.strip()}")


def _add_setting(layers: Layers, dotted: str, value: Any, place_of: PlaceOf) -> None:
    *above, last = dotted.split(".")
    if len(above) >= _MAX_LEVELS:
        raise ConfigError(f"{dotted} names {len(above) + 1} levels; settings are a handful of levels deep")
    tree: dict[str, Any] = {last: value}
    for key in reversed(above):
        tree = {key: tree}
    _merge(layers, layers.tree, tree, (), place_of)


def _merge(layers: Layers, into: dict[str, Any], tree: Mapping[str, Any], path: Path_, place_of: PlaceOf) -> None:
    for key, value in tree.items():
        here = (*path, str(key))
        layers.places[here] = place_of(tree, str(key))
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict):
            below = into.get(key)
            if isinstance(value, Replaced) or not value or not isinstance(below, dict):
                is_addition = bool(value) and not isinstance(value, Replaced)
                into[key] = _named_kind(layers.schema, here, below) if is_addition else {}
            _merge(layers, into[key], value, here, place_of)
        else:
            into[key] = value


def _explain(problem: Any, layers: Layers) -> list[str]:
    """One sentence for one pydantic problem; one for each setting that a missing section needs."""
    keys = tuple(str(part) for part in problem["loc"])
    dotted = ".".join(keys) or "the configuration"
    if problem["type"] == "missing":
        is_run = layers.schema is RunConfig
        return [
            f"{name} is not set; give it in "
            + (f"a YAML file or as an override {name}=VALUE" if is_run else "the file that describes the whole")
            for name in _required(layers.schema, keys)
        ]
    return [f"{_place(keys, layers)}{_what_is_wrong(problem, keys, dotted, layers)}"]


def _what_is_wrong(problem: Any, keys: Path_, dotted: str, layers: Layers) -> str:
    if problem["type"] == "extra_forbidden":
        known = _known_keys(layers.schema, keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(sorted(known))}"
        return f"unknown key {dotted}; {hint}"
    if problem["type"] in ("unknown_kind", "no_kind"):
        return f"{dotted} has {problem['msg']}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{dotted} is {short_repr(problem['input'])}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _known_keys(schema: type[BaseModel], keys: Path_) -> list[str]:
    """Field names of the section at `keys`; union members are pooled."""
    return [name for model in _models_at(schema, keys) for name in model.model_fields]


def _required(schema: type[BaseModel], keys: Path_) -> list[str]:
    """What has to be given for `keys`: the key itself, or the required keys of the section that it names."""
    annotations = _annotations(_models_at(schema, keys[:-1]), keys[-1])
    sections = [nested for each in annotations if isinstance(each, type) for nested in _models_in(each)]
    names = [name for model in sections[:1] for name, field in model.model_fields.items() if field.is_required()]
    return [".".join((*keys, name)) for name in names] or [".".join(keys)]


def _models_at(schema: type[BaseModel], keys: Path_) -> list[type[BaseModel]]:
    models = [schema]
    for key in keys:
        models = _models_below(models, key) or models  # a name inside a mapping of sections, for example a route's
    return models


def _named_kind(schema: type[BaseModel], keys: Path_, given: Any) -> dict[str, str]:
    """What settings of the kind at `keys` are added to: the kind that was given by its name, or else the default."""
    if isinstance(given, str):
        return {"type": given} if any(issubclass(model, Kind) for model in _models_at(schema, keys)) else {}
    fields = [model.model_fields[keys[-1]] for model in _models_at(schema, keys[:-1]) if keys[-1] in model.model_fields]
    return next(({"type": field.default.type} for field in fields if isinstance(field.default, Kind)), {})


def _models_below(models: Iterable[type[BaseModel]], key: str) -> list[type[BaseModel]]:
    return [nested for annotation in _annotations(models, key) for nested in _models_in(annotation)]


def _annotations(models: Iterable[type[BaseModel]], key: str) -> list[Any]:
    return [model.model_fields[key].annotation for model in models if key in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Kind) and annotation.is_open():
        return [kind for kind in annotation.kinds.values() if issubclass(kind, annotation)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [nested for argument in get_args(annotation) for nested in _models_in(argument)]
