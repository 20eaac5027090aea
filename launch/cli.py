"""The `trace-rl` command. Errors that a user can act on are printed as their sentence, without a stack."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from trace_rl.errors import TraceError
from trace_rl.workers import environment

if TYPE_CHECKING:
    from trace_rl.config.run import RunConfig

app = typer.Typer(
    help="Train language models with TRACE, GRPO and their relatives on Ray, vLLM and DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Arguments = Annotated[
    list[str],
    typer.Argument(metavar="FILE... [KEY=VALUE]...", help="YAML files, merged left to right, then dotted overrides."),
]


@app.command()
def train(arguments: Arguments) -> None:
    """Train: trace-rl train configs/demo.yaml configs/methods/grpo.yaml run.steps=20"""
    console = Console()
    try:
        config = _load(arguments)
        _protect_ray(config)
        from trace_rl.launch.train import run

        run(config, console)
    except TraceError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail("interrupted; run.resume=auto goes on from the last checkpoint")


@app.command("config")
def show_config(arguments: Arguments) -> None:
    """Print the resolved configuration as YAML."""
    try:
        config = _load(arguments)
        from trace_rl.overlays import dump_config

        typer.echo(dump_config(config), nl=False)
    except TraceError as error:
        _fail(error)


@app.command()
def annotate(
    rollouts: Annotated[Path, typer.Argument(help="Run folder, its folder rollouts/, or one JSONL file of it.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]... [KEY=VALUE]...", help="As for train; by default the run's own config.yaml."),
    ] = None,
    against: Annotated[
        list[str] | None, typer.Option(metavar="BACKEND", help="Another annotator.backend to compare with, as YAML.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Record the replies in a new file, for annotator.backend=replay.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Annotate so many rollouts at most; 0: all of them.")] = 0,
    estimate: Annotated[bool, typer.Option(help="Ask nothing; tell what a whole run would take.")] = False,
) -> None:
    """Annotate recorded rollouts: trace-rl annotate runs/demo annotator.backend=random --against oracle"""
    console = Console()
    try:
        files, overrides = split_arguments(arguments or [])
        given = [*map(str, files or [_config_beside(rollouts)]), *overrides]
        # nothing of the run's own backend goes into another one
        others = [[*given, "annotator.backend=", f"annotator.backend={other}"] for other in against or []]
        configs = [_load(each) for each in (given, *others)]
        _protect_ray(configs[0])
        from trace_rl.launch import annotate as offline

        recorded = offline.Recorded.read(rollouts, limit)
        if estimate:
            offline.print_cost(configs[0], recorded, console)
        else:
            offline.annotate(configs, recorded, out, console)
    except TraceError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail("interrupted; answers that models have given are stored, and are not asked for again")


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """(files, overrides): an override is what holds a `=` and is no existing file."""
    overrides = [text for text in arguments if "=" in text and not Path(text).exists()]
    return [Path(text) for text in arguments if text not in overrides], overrides


def _load(arguments: list[str]) -> RunConfig:
    """Read the configuration; `plugins` are looked for in the working folder too."""
    environment.apply()  # before torch, vLLM, DeepSpeed or Ray is imported
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # last, so that no file there can hide an installed module
    from trace_rl.overlays import load_config

    return load_config(*split_arguments(arguments))


def _config_beside(rollouts: Path) -> Path:
    environment.apply()  # before numpy is imported
    from trace_rl.launch.rollout_dump import config_of

    return config_of(rollouts)


def _protect_ray(config: RunConfig) -> None:
    """Before Ray is imported; a cluster that is joined has a token of its own."""
    if config.placement.ray_address == "local":
        environment.protect_private_ray()


def _fail(error: TraceError | str) -> NoReturn:
    Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
