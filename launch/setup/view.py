"""Builds build/view: `trace_rl` as plain folders, for the tools that cannot follow the editable install's import hook.

`build/view/trace_rl` holds a symlink per child of `trace/`, plus `workers`, `launch` and `configs`. Beside it lies
`.importlinter`, the floors as contracts: they name every room of `trace/`, so they are written from the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VIEW = ROOT / "build" / "view"
FLOORS = ("workers", "launch", "configs")
HTTP = ("httpx", "requests", "aiohttp", "openai", "anthropic")
NOT_IN_TRACE = ("ray", "vllm", "deepspeed", "transformers", "datasets", *HTTP)
# Libraries that only some modules of workers/ may import directly, by file name.
WORKERS_MAY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vllm": (("vllm",), ("generator*", "weight_*")),
    "deepspeed": (("deepspeed",), ("learner*", "batch_runner", "deepspeed_*", "checkpoint*")),
    "http": (HTTP, ("api_annotator*",)),
}


def children(folder: Path) -> list[Path]:
    """Modules and folders of a floor, without caches and hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__pycache__")))


def rooms(folder: Path) -> list[str]:
    """Importable names directly below a floor."""
    modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    packages = [path.parent.name for path in folder.glob("*/__init__.py")]
    return sorted(modules + packages)


def link_tree() -> None:
    """Remake the view from nothing, so that no renamed module stays behind."""
    package = VIEW / "trace_rl"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for target in [*children(ROOT / "trace"), *(ROOT / floor for floor in FLOORS)]:
        (package / target.name).symlink_to(target, target_is_directory=target.is_dir())
    (package / "__init__.py").touch()  # the view only: grimp wants a root package, `trace/` must not be one


def forbidden(name: str, sources: Iterable[str], targets: Iterable[str], indirect: bool) -> str:
    lines = [f"[importlinter:contract:{name}]", f"name = {name.replace('-', ' ')}", "type = forbidden"]
    lines += ["source_modules =", *(f"    trace_rl.{source}" for source in sources)]
    lines += ["forbidden_modules =", *(f"    {target}" for target in targets)]
    lines += [f"allow_indirect_imports = {not indirect}"]
    return "\n".join(lines)


def contracts() -> str:
    """The contracts of the floors in import-linter's own format."""
    trace, workers = rooms(ROOT / "trace"), rooms(ROOT / "workers")
    layers = ["trace_rl.launch", "trace_rl.workers", " : ".join(f"trace_rl.{room}" for room in trace)]
    floors = "[importlinter:contract:floors]\nname = launch over workers over trace\ntype = layers\nlayers ="
    parts = ["[importlinter]\nroot_package = trace_rl\ninclude_external_packages = True"]
    parts.append("\n    ".join([floors, *layers]))
    parts.append(forbidden("trace-knows-the-method-only", trace, NOT_IN_TRACE, indirect=True))
    for name, (libraries, patterns) in WORKERS_MAY.items():
        others = [f"workers.{room}" for room in workers if not any(fnmatch(room, pattern) for pattern in patterns)]
        parts.append(forbidden(f"workers-keep-{name}-in-its-place", others, libraries, indirect=False))
    parts.append(forbidden("launch-leaves-engines-to-workers", ["launch"], ["vllm", "deepspeed"], indirect=False))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    link_tree()
    (VIEW / ".importlinter").write_text(contracts(), encoding="utf-8")


if __name__ == "__main__":
    main()
