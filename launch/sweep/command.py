"""The commands `trace-rl sweep plan | run | status | report`; each refuses a mistake in the sweep's file."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from trace_rl.errors import ConfigError
from trace_rl.launch.command_line import explained, fail, prepare_imports

if TYPE_CHECKING:
    from trace_rl.launch.sweep.record import Kind, SweepRecord
    from trace_rl.launch.sweep.schedule import Runner
    from trace_rl.sweeps import Sweep

app = typer.Typer(help="Many runs from one file: base x axes x seeds (docs/sweeps.md).", no_args_is_help=True)

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A sweep's YAML, such as configs/sweeps/trace_controls.yaml")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted settings, laid over every cell.")
]
Folder = Annotated[str, typer.Option(help="In place of the sweep's own folder, for example for a smoke test.")]
_COPY = "sweep.yaml"


@app.command()
def plan(file: File, overrides: Overrides = None, folder: Folder = "") -> None:
    """Print the cells and what they take in all; start nothing."""
    with explained():
        sweep = _load(file, overrides, folder)
        from trace_rl.launch.sweep.tables import plan_table, plan_totals

        console = Console()
        console.print(plan_table(sweep))
        console.print(plan_totals(sweep), markup=False, highlight=False, soft_wrap=True)


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    folder: Folder = "",
    retry_failed: Annotated[bool, typer.Option(help="Also try cells again that have failed for good.")] = False,
) -> None:
    """Run what is not finished yet; go on after a kill by giving the same command again."""
    with explained():
        sweep = _load(file, overrides, folder)
        _check_unchanged(sweep)
        from trace_rl.launch.sweep.record import SweepRecord, only_sweep_in, read_states
        from trace_rl.launch.sweep.tables import count_states

        console = Console()
        with only_sweep_in(sweep.folder):
            shutil.copyfile(file, sweep.folder / _COPY)
            record = SweepRecord(sweep.folder, _teller(console))
            _run(sweep, record, retry_failed)
        states = read_states(sweep.folder)
        console.print(count_states(sweep, states), highlight=False)
        if any(states[cell.name].status == "failed" for cell in sweep.cells):
            raise typer.Exit(1)


@app.command()
def status(file: File, overrides: Overrides = None, folder: Folder = "") -> None:
    """Print how every cell stands."""
    with explained():
        sweep = _load(file, overrides, folder)
        from trace_rl.launch.sweep.record import read_states
        from trace_rl.launch.sweep.tables import count_states, status_table

        console, states = Console(), read_states(sweep.folder)
        console.print(status_table(sweep, states))
        console.print(count_states(sweep, states), highlight=False)


@app.command()
def report(
    file: File,
    overrides: Overrides = None,
    folder: Folder = "",
    out: Annotated[Path | None, typer.Option(help="File to write; by default report.md in the sweep's folder.")] = None,
) -> None:
    """Compare the groups over their seeds, in Markdown; also printed."""
    with explained():
        sweep = _load(file, overrides, folder)
        from trace_rl.launch.sweep.record import read_states
        from trace_rl.launch.sweep.report import write_report

        states = read_states(sweep.folder)
        if not any(state.status == "finished" for state in states.values()):
            raise ConfigError(f"no cell of {sweep.folder} is finished yet; start it by `trace-rl sweep run {file}`")
        text = write_report(sweep, states)
        (out or sweep.folder / "report.md").write_text(text, encoding="utf-8")
        typer.echo(text, nl=False)


def _load(file: Path, overrides: list[str] | None, folder: str) -> Sweep:
    prepare_imports()
    from trace_rl.overlays import dump_config
    from trace_rl.secrecy import refuse_secrets
    from trace_rl.sweeps import load_sweep

    sweep = load_sweep(file, overrides or (), folder)
    for cell in sweep.cells:
        refuse_secrets(dump_config(cell.config), os.environ)
    return sweep


def _check_unchanged(sweep: Sweep) -> None:
    """Refuse to go on with runs that were made with other settings.

    Raises:
        ConfigError: names the first such cell and what has changed.
    """
    from trace_rl.launch.run_folder import RunFolder, changed_settings

    for cell in sweep.cells:
        changed = changed_settings(RunFolder(cell.folder), cell.config)
        if changed:
            raise ConfigError(
                f"{cell.folder} holds a run with other settings than the sweep has now: {changed}; change them back, "
                "or give the sweep another name or folder"
            )


def _run(sweep: Sweep, record: SweepRecord, retry_failed: bool) -> None:
    from trace_rl.launch.sweep.schedule import SweepScheduler

    if retry_failed:
        for cell in sweep.cells:
            if record.state(cell.name).status == "failed":
                record.note(cell.name, "reopened")
    signal.signal(signal.SIGTERM, _as_interrupt)  # a batch system's way to end a job
    try:
        SweepScheduler(sweep, record, _runner(sweep)).run()
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on with what is not finished")


def _runner(sweep: Sweep) -> Runner:
    if sweep.settings.address:
        from trace_rl.launch.sweep.as_jobs import JobRunner

        return JobRunner(sweep.settings.address)
    from trace_rl.launch.sweep.local import LocalRunner

    return LocalRunner(sweep.folder)


def _teller(console: Console) -> Callable[[str, Kind, str], None]:
    def tell(cell: str, kind: Kind, note: str) -> None:
        console.print(f"{cell}: {kind}" + (f", {note}" if note else ""), markup=False, highlight=False, soft_wrap=True)

    return tell


def _as_interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
