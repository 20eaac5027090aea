"""What a sweep will do and how it stands, as tables for a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from rich.table import Table

from trace_rl.launch.sweep.outcome import final_value, read_records, steps_done
from trace_rl.launch.sweep.record import CellState, Status
from trace_rl.sweeps import Sweep

_STYLES: Mapping[Status, str] = {
    "finished": "green",
    "running": "cyan",
    "stopped": "yellow",
    "failed": "red",
    "waiting": "dim",
}


def plan_table(sweep: Sweep) -> Table:
    """One line a group: what it is, its seeds and its steps."""
    table = Table("group", "method", "steps", "seeds", title=f"{sweep.settings.name}: runs go to {sweep.folder}")
    for group in sweep.groups:
        cells = [cell for cell in sweep.cells if cell.group == group]
        config = cells[0].config
        seeds = " ".join(str(cell.seed) for cell in cells)
        table.add_row(group, config.method.name or "-", str(config.run.steps), seeds)
    return table


def plan_totals(sweep: Sweep) -> str:
    """The whole sweep in one sentence."""
    steps = sum(cell.config.run.steps for cell in sweep.cells)
    where = f"as jobs of {sweep.settings.address}" if sweep.settings.address else "on this machine"
    rules = len(sweep.settings.stop)
    early = f"; {rules} rule(s) may stop a cell early" if rules else ""
    return (
        f"{len(sweep.cells)} cells ({len(sweep.groups)} groups x {len(sweep.settings.seeds)} seeds), {steps:,} "
        f"training steps in all, {sweep.settings.parallel} at a time {where}{early}"
    )


def status_table(sweep: Sweep, states: Mapping[str, CellState]) -> Table:
    """One line a cell: its state, how far it is, its latest value of the first metric that the report compares."""
    metric = sweep.settings.report.metrics[0]
    table = Table("cell", "state", "steps", metric, "broke", "note", title=str(sweep.folder))
    for cell in sweep.cells:
        state = states.get(cell.name, CellState())
        records = read_records(cell.folder)
        value = final_value(records, metric, 1)
        table.add_row(
            cell.name,
            f"[{_STYLES[state.status]}]{state.status}[/]",
            f"{steps_done(records)}/{cell.config.run.steps}",
            "-" if math.isnan(value) else f"{value:.4g}",
            str(state.failures or "-"),
            state.note.replace("[", "\\["),  # rich reads brackets as markup
        )
    return table


def count_states(sweep: Sweep, states: Mapping[str, CellState]) -> str:
    """How many cells are in each state: `3 finished, 1 running, 61 waiting`."""
    counts = Counter(states.get(cell.name, CellState()).status for cell in sweep.cells)
    return ", ".join(f"{counts[status]} {status}" for status in _STYLES if counts[status])
