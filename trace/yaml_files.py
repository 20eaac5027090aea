"""One YAML file -> its mapping and the line of every key, or one clear sentence with the line that is wrong.

Stricter than PyYAML's SafeLoader: keys are given once and are names, a scalar is what it looks like, and a number that
Python refuses to print is none. It knows nothing of what the settings mean.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from trace_rl.errors import ConfigError, short_repr

_MERGE_TAG = "tag:yaml.org,2002:merge"
_MAX_BITS = 256
"""Of a whole number; what is longer is no setting, and Python refuses to print it."""


class Replaced(dict[str, Any]):
    """A mapping tagged `!replace`."""


class _Values(yaml.SafeLoader):
    """SafeLoader that refuses every scalar which is not what it looks like, a date of month 99 say, with its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.rpartition(":")[2]
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            problem = f"{node.value[:60]!r} is no valid {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            problem = f"a number of {value.bit_length()} bits is no setting"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


class _Document(_Values):
    """Refuses duplicate keys as well, and remembers the line of each key."""

    lines: dict[int, dict[str, int]]

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # of a tag, such as !replace, on something else
            found = "sequence" if isinstance(node, yaml.SequenceNode) else "scalar"
            problem = f"a {found} stands where a mapping should be"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG:
                continue
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self.name}:{line}: a {key_node.id} stands where a key should be; give a name")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(
                    f"{self.name}:{line}: key {short_repr(key)} was given at line {seen[key]} already; "
                    "keep one of the two"
                )
            seen[key] = line
        mapping = super().construct_mapping(node, deep=True)  # also resolves merge keys; what they bring comes first
        self.lines[id(mapping)] = {str(key_node.value): key_node.start_mark.line + 1 for key_node, _ in node.value}
        self.keep.append(mapping)
        return mapping

    keep: list[Any]


def _construct_map(loader: _Values, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)  # refuses a mapping that holds itself


def _construct_replace(loader: _Document, node: yaml.MappingNode) -> Replaced:
    mapping = loader.construct_mapping(node, deep=True)
    replaced = Replaced(mapping)
    loader.lines[id(replaced)] = loader.lines[id(mapping)]
    loader.keep.append(replaced)
    return replaced


_Values.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_map)
_Document.add_constructor("!replace", _construct_replace)


def read_mapping(file: Path, asked_by: Path | None = None) -> tuple[dict[str, Any], dict[int, dict[str, int]]]:
    """The file's mapping, and for each mapping in it, by `id`, the line of each key.

    Raises:
        ConfigError: it cannot be read, is not YAML, has a key twice, or holds something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        asked = f", which {asked_by} extends," if asked_by else ""
        near = difflib.get_close_matches(file.name, [each.name for each in file.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; check the path"
        raise ConfigError(f"config file {file}{asked} does not exist or cannot be read{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {file} is not UTF-8 text ({error}); convert it to UTF-8") from None
    try:
        loader = _Document(text)
        loader.name, loader.lines, loader.keep = str(file), {}, []
        tree = loader.get_single_data() or {}
        loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        problem = (getattr(error, "problem", None) or str(error)).splitlines()[0]
        raise ConfigError(f"{place}: not valid YAML ({problem})") from None
    except RecursionError:
        raise ConfigError(f"{file} is nested too deeply to be read; settings are a handful of levels deep") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} holds a {type(tree).__name__}; expected a mapping of sections such as model and data"
        )
    return tree, loader.lines


def read_value(text: str) -> Any:
    """A single value, as it stands in a file; text that is no YAML is itself.

    Raises:
        RecursionError: it is nested too deeply.
    """
    try:
        return yaml.load(text, _Values) if text else None
    except yaml.YAMLError:
        return text
