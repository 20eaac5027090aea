"""The folder that a job brings to a cluster: the code, the resolved configuration and the plugins beside it.

    config.yaml   trace_rl/...   my_plugin.py

It is a folder, never a wheel: Ray caches a wheel under its file name and would run the old code of the same version
again, while a folder is addressed by its content. The staged `trace_rl` is a regular package (it has an `__init__.py`),
so that it hides a copy in the image, whichever comes first on the path, where two namespace packages would be merged.

This module must not know how a job is submitted.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError
from trace_rl.launch.job import own_code
from trace_rl.overlays import dump_config

CONFIG_NAME = "config.yaml"
_PACKAGE = "trace_rl"


@dataclass(frozen=True)
class Stage:
    """A folder that is ready to be shipped."""

    folder: Path
    digest: str
    """Of the code, as the job will log it."""
    plugins: tuple[str, ...]
    """Modules and packages of the working folder that go with it."""


def stage(config: RunConfig, working_folder: Path, folder: Path) -> Stage:
    """Fill an empty folder with all that the job needs of this machine.

    Args:
        working_folder: where the modules under `plugins` were looked for.

    Raises:
        ConfigError: a path of the configuration means a file of this machine.
    """
    check_paths(config, working_folder)
    files = own_code.package_files()
    for name, source in files.items():
        target = folder / _PACKAGE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (folder / _PACKAGE / "__init__.py").touch()
    plugins = tuple(sorted(_local_modules(working_folder)))
    for name in plugins:
        _copy_module(working_folder, name, folder)
    (folder / CONFIG_NAME).write_text(dump_config(config), encoding="utf-8")
    return Stage(folder, own_code.digest_of(files), plugins)


def check_paths(config: RunConfig, working_folder: Path) -> None:
    """Refuse paths that mean nothing on the cluster.

    Raises:
        ConfigError: the run folder is relative, or another relative path exists here and would not exist there.
    """
    folder = config.run.folder
    if not Path(folder).expanduser().is_absolute():
        raise ConfigError(
            f"run.folder is {folder!r}, which on a cluster would lie in Ray's own copy of the code and be removed with "
            "it; give an absolute path that all nodes share, for example run.folder=/shared/runs/{name}"
        )
    for setting, value in _paths_of(config.model_dump(mode="json", serialize_as_any=True)):
        if not Path(value).expanduser().is_absolute() and (working_folder / value).exists():
            raise ConfigError(
                f"{setting} is {value!r}, a relative path of this machine, which the job would look for in its copy of "
                "the code; give the absolute path under which the cluster's nodes see it"
            )


def _paths_of(tree: Any, setting: str = "") -> Iterator[tuple[str, str]]:
    """(setting, value) of everything in the configuration that names a file or folder."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _paths_of(value, f"{setting}.{key}" if setting else str(key))
    elif isinstance(tree, str) and setting.endswith(("path", "folder")):
        yield setting, tree


def _local_modules(working_folder: Path) -> set[str]:
    """Top names of the imported modules that lie in the working folder: the plugins and what they import.

    A module counts only where its name says so: an environment below the working folder holds modules too.
    """
    found = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        top = name.partition(".")[0]
        if not file or top in ("__main__", _PACKAGE):
            continue
        stem = working_folder / Path(*name.split("."))
        if Path(file) in (stem.with_suffix(".py"), stem / "__init__.py"):
            found.add(top)
    return found


def _copy_module(working_folder: Path, name: str, folder: Path) -> None:
    package = working_folder / name
    if package.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        shutil.copytree(package, folder / name, ignore=ignored)
    else:
        shutil.copyfile(package.with_suffix(".py"), folder / f"{name}.py")
