"""The `trace-rl` command. Errors that a user can act on are printed as their sentence, without a stack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from trace_rl.errors import TraceError
from trace_rl.overlays import dump_config, load_config
from trace_rl.workers import environment

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
        config = load_config(*split_arguments(arguments))
        environment.apply(config.generator.kv_cache_gib)  # before torch, vLLM, DeepSpeed or Ray is imported
        if config.placement.ray_address == "local":
            environment.protect_private_ray()
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
        typer.echo(dump_config(load_config(*split_arguments(arguments))), nl=False)
    except TraceError as error:
        _fail(error)


def split_arguments(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """(files, overrides): an override is what holds a `=` and is no existing file."""
    overrides = [text for text in arguments if "=" in text and not Path(text).exists()]
    return [Path(text) for text in arguments if text not in overrides], overrides


def _fail(error: TraceError | str) -> NoReturn:
    Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
