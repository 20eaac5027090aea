"""`trace-rl report`: what one or several runs have done, as one page with its charts and tables.

Decides what a report is made of. Must not know how runs are read or charts are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trace_rl.launch.pages.charts import sections
from trace_rl.launch.pages.recorded_runs import Group, grouped, read_run
from trace_rl.launch.pages.shell import asset, page

_STYLES = ("base.css", "report.css")
_SCRIPTS = ("page.js", "report.js")
_PLOTLY_STYLES = ("style-src-elem 'unsafe-inline'", "style-src-attr 'unsafe-inline'")
"""Plotly makes style elements and attributes as it draws; without a network they can colour and no more."""


def write_report(runs: Sequence[Path], prefixes: Sequence[str], out: Path) -> Path:
    """Write the report of some run folders; returns where it is.

    Args:
        prefixes: runs whose names begin with one of them are one group; see `grouped`.

    Raises:
        DataError: a folder holds no metrics.
    """
    out.write_text(report_page(grouped([read_run(run) for run in runs], prefixes)), encoding="utf-8")
    return out


def report_page(groups: Sequence[Group]) -> str:
    """The report of some groups of runs."""
    from plotly.offline import get_plotlyjs

    title = f"Report: {', '.join(group.name for group in groups)}"
    data = {
        "title": title,
        "groups": [{"name": group.name, "runs": [run.name for run in group.runs]} for group in groups],
        "sections": sections(groups),
    }
    styles, scripts = [*map(asset, _STYLES)], [*map(asset, _SCRIPTS)]
    return page(title, asset("report.html"), styles, scripts, data, allowed=_PLOTLY_STYLES, library=get_plotlyjs())
