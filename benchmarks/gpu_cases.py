"""What a section of the GPU check is made of: cases that are run one after another, whatever becomes of each.

A section is a module `gpu_NAME` with a function `cases(context)`. Decides when no case is started any more, and how the
end of one is written down: done, skipped for a reason, or failed with the first line of its error. Must not know what a
section measures, processes or files.

Invariant: every case of a section is told of once it has ended, and told once.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from trace_rl.errors import first_line

Scale = Literal["full", "quick", "dry"]
Row = Mapping[str, float | str]
"""Figures by name; the name ends in the unit."""
Tell = Callable[[dict[str, Any]], None]
Choice = TypeVar("Choice")

WHOLE = "all of it"
"""Stands for the name of a case where a section has none."""


class Skip(Exception):  # noqa: N818 - nothing is wrong
    """A case cannot run here; the message is the reason."""


class Wrong(Exception):  # noqa: N818 - what it says is what it is
    """A result differs from what it must be."""


@dataclass(frozen=True)
class Context:
    """Where the cases run, and how large they are."""

    device: torch.device
    scale: Scale
    seed: int
    deadline: float
    """When no case is started any more, on the monotonic clock."""

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def of_scale(self, full: Choice, quick: Choice, dry: Choice) -> Choice:
        return {"full": full, "quick": quick, "dry": dry}[self.scale]


@dataclass(frozen=True)
class Case:
    """One thing to measure or to compare."""

    name: str
    run: Callable[[], Iterable[Row]]
    """Returns the rows of its table.

    Raises:
        Skip: it cannot run here.
        Wrong: a comparison failed.
    """


def run_section(section: str, context: Context, tell: Tell) -> None:
    """Run all cases of a section; tells of each that it begins (`status` is running), and how it ended."""
    try:
        cases = importlib.import_module(f"gpu_{section}").cases(context)
    except Exception as error:
        tell({"case": WHOLE, **_how_it_failed(error)})
        return
    for case in cases:
        if time.monotonic() > context.deadline:
            tell({"case": case.name, "status": "skipped", "why": "not started: --budget-s was over"})
            continue
        tell({"case": case.name, "status": "running"})
        tell({"case": case.name, **outcome(case, context)})


def outcome(case: Case, context: Context) -> dict[str, Any]:
    """How a case ended, with its rows, its seconds and the most memory that torch held on the GPU."""
    started = time.perf_counter()
    if context.is_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        end: dict[str, Any] = {"status": "done", "rows": [dict(row) for row in case.run()]}
    except (Exception, SystemExit) as error:  # a benchmark that finds a wrong result exits
        end = _how_it_failed(error)
    end["seconds"] = round(time.perf_counter() - started, 3)
    if context.is_gpu:
        end["peak_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    gc.collect()
    torch.cuda.empty_cache()
    return end


def need(package: str) -> None:
    """Skip the case where a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise Skip(f"not installed: {package}")


def need_gpu(context: Context) -> None:
    """Skip the case where there is none."""
    if not context.is_gpu:
        raise Skip("no GPU")


def within(what: str, error: float, bound: float) -> float:
    """The error, where it is allowed.

    Raises:
        Wrong: it is not; that of NaN never is.
    """
    if not error <= bound:
        raise Wrong(f"{what} is off by {error:.2e}, allowed is {bound:.0e}")
    return error


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact| in the Euclidean norm, on the CPU in float64; the absolute error where exact is 0."""
    exact = exact.detach().cpu().double()
    gap, size = (found.detach().cpu().double() - exact).norm(), exact.norm()
    return float(gap / size if size else gap)


def _how_it_failed(error: BaseException) -> dict[str, Any]:
    if isinstance(error, Skip):
        return {"status": "skipped", "why": str(error)}
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "skipped", "why": f"out of memory: {first_line(error)}"}
    traceback.print_exception(error, file=sys.stderr)
    kind = "" if isinstance(error, Wrong | SystemExit) else f"{type(error).__name__}: "
    return {"status": "failed", "why": f"{kind}{first_line(error)}"}
