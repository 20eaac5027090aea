"""Configurations near to real ones, and their reading: files of the package with something changed, and overrides.

Values and keys are such that YAML, Python or a schema could stumble over them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import trace_rl.configs
from trace_rl.config.run import RunConfig
from trace_rl.overlays import load_config

_CONFIGS = Path(trace_rl.configs.__path__[0])
_KEYED = re.compile(r"^(\s*)([\w.-]+):(.*)$")
_VALUES = (
    *r"""
~ | true | no | 0 | 1 | -1 | 3.5 | 1e400 | .inf | .nan | 1e308 | 1e-320 | 1:99:99 | 0b_ | 0o9 | 2001-99-99
2001-12-14t21:59:43.10-99:99 | !!int x | !!int '' | !!bool x | !!float x | !!timestamp x | !!null x | !!binary é
!!str [1] | !!map [1] | !!set [a] | !!omap [a] | !!pairs [a] | !!python/object/apply:os.getcwd [] | !unknown x
!replace 5 | !replace [1] | !replace {a: 1} | {} | [] | [1, [2, {a: 3}]] | {a: 1, a: 2} | {[a]: 1} | {? [a] : 1}
{1: 2} | {null: 1} | {true: 2} | {<<: 3} | {<<: [1]} | {<<: {a: 1}} | &a [*a] | &a {b: *a} | &a {<<: *a} | *nobody
{type: [a]} | {type: } | {type: {a: 1}} | {type: 7} | {type: constant} | ' | " | "\0" | "\ud800" | "\uD83D\uDE00" | >-
- a | ? a | %TAG | @ | ` | a: b: c | constant | fkl | group | none | oracle | task:arithmetic | (a+)+ | [ | {x} | {name
a{99999999999999999999} | rows.jsonl | hf:
""".replace("\n", " | ").split(" | "),
    *("\t", "|", "5" * 5000, "0x" + "f" * 5000, "'" + "long " * 900 + "'", "[" * 2000, "{a: " * 400 + "1" + "}" * 400),
)
_KEYS = (
    *(
        "",
        "a",
        ".",
        "a..b",
        "1",
        "no.such.key",
        "a." * 2000 + "a",
        "extends",
        "extends.x",
        "plugins",
        "plugins.x",
        "type",
    ),
    *("model", "model.path", "data.path", "run", "run.steps", "run.folder", "watch", "generator", "algorithm.routes"),
    *("algorithm.routes.new", "algorithm.routes.new.action", "algorithm.policy_gradient.type", "annotator.backend"),
    *("annotator.segmentation.boundary", "annotator.types.key.x", "learner.optimizer.betas", "learner.world_size"),
    *("placement.learner.num_cpus", "placement.ray_cpus", "evaluation.sets", "evaluation.sets.s.path", "sync.folder"),
)
_NAMES = (
    "../demo.yaml",
    "../base.yaml",
    "../methods/trace_fkl.yaml",
    "nowhere.yaml",
    "0.yaml",
    "1.yaml",
    "",
    "/",
    "a\0b",
    "~",
)


@cache
def _config_texts() -> tuple[str, ...]:
    files = sorted(file for file in _CONFIGS.rglob("*.yaml") if file.parent.name in ("configs", "methods", "recipes"))
    return tuple(file.read_text(encoding="utf-8") for file in files)


@cache
def _known_keys() -> tuple[str, ...]:
    """Every dotted key of the resolved demo."""
    found: list[str] = []

    def collect(tree: Mapping[str, Any], above: str) -> None:
        for key, value in tree.items():
            found.append(above + key)
            if isinstance(value, dict):
                collect(value, f"{above}{key}.")

    collect(base_config().model_dump(mode="json", serialize_as_any=True), "")
    return tuple(found)


@cache
def base_config() -> RunConfig:
    return load_config([_CONFIGS / "demo.yaml"])


def _changed(text: str, place: int, change: str, value: str, key: str) -> str:
    """A configuration with one thing changed at a line."""
    lines = text.splitlines()
    number = place % len(lines)
    keyed = _KEYED.match(lines[number])
    indent, name = (keyed[1], keyed[2]) if keyed else ("", key)
    if change == "value":
        lines[number] = f"{indent}{name}: {value}"
    elif change == "key":
        lines[number] = f"{indent}{key}: {value}"
    elif change == "insert":
        lines.insert(number, f"{indent}{key or name}: {value}")
    elif change == "repeat":
        lines.insert(number, lines[number])
    elif change == "indent":
        lines[number] = f"  {lines[number]}"
    elif change == "cut":
        return text[: place % (len(text) + 1)]
    else:
        at = place % (len(text) + 1)
        return text[:at] + value[:20] + text[at:]
    return "\n".join(lines) + "\n"


_values = st.one_of(st.sampled_from(_VALUES), st.text(max_size=8))
_keys = st.one_of(st.sampled_from(_KEYS), st.text(max_size=4))
_changes = st.sampled_from(("value", "value", "value", "key", "insert", "repeat", "indent", "cut", "characters"))
_config_text = st.deferred(lambda: st.sampled_from(_config_texts()))
_changed_text = st.builds(_changed, _config_text, st.integers(0, 4000), _changes, _values, _keys)
_small_text = st.lists(st.builds(lambda key, value: f"{key}: {value}\n", _keys, _values), max_size=4).map("".join)
_extending = st.lists(st.sampled_from(_NAMES), max_size=3).map(lambda names: f"extends: {json.dumps(names)}\n")
_file = st.one_of(
    _changed_text.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.one_of(_small_text, _extending).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=40),
)
_override = st.one_of(st.builds(lambda key, value: f"{key}={value}", _keys, _values), st.text(max_size=12))
_known_override = st.builds(
    "{}={}".format,
    st.deferred(lambda: st.sampled_from(_known_keys())),
    st.one_of(st.integers(-1, 4), st.sampled_from(_VALUES)),
)
CONFIGS = st.tuples(
    st.sampled_from((True, True, True, False)),
    st.lists(_file, max_size=1) | st.lists(_file, max_size=2),
    st.lists(st.one_of(_override, _known_override, _known_override), max_size=3),
)


def read_config(given: tuple[bool, list[bytes], list[str]], folder: Path) -> object:
    is_complete, contents, overrides = given
    copy = folder / "configs"
    if not copy.is_dir():
        shutil.copytree(_CONFIGS, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        (copy / "fuzzed").mkdir()
    files = [copy / "fuzzed" / f"{number}.yaml" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    return load_config([*[copy / "demo.yaml"] * is_complete, *files], overrides)
