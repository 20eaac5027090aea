"""`trace-rl view`: stored rollouts of one or two runs as a page that shows what was done with each token.

Decides which steps are shown and how token ids become text: with the tokenizer of the run's own model, because the ids
are what was trained on. Must not know how the page draws them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from trace_rl.config.roles import Model
from trace_rl.errors import DataError, TraceError
from trace_rl.launch.pages.packing import Pieces, PieceTable, pack_rollout
from trace_rl.launch.pages.records import RolloutRecord, read_records
from trace_rl.launch.pages.shell import asset, page
from trace_rl.launch.rollout_dump import dump_files, run_folder_of

logger = logging.getLogger(__name__)

_STYLES = ("base.css", "view.css")
_SCRIPTS = (
    "page.js",
    "view_data.js",
    "view_colours.js",
    "view_layout.js",
    "view_detail.js",
    "view_heading.js",
    "view_pane.js",
    "view.js",
)
_PREFIX = "step-"


@dataclass(frozen=True)
class Source:
    """The stored rollouts of one step of a run."""

    run: str
    step: int
    route_names: tuple[str, ...]
    records: tuple[RolloutRecord, ...]
    pieces_of: Pieces


def write_view(runs: Sequence[Path], steps: Sequence[int], out: Path) -> Path:
    """Write the page of some steps; returns where it is.

    Args:
        steps: of each run; none: the first and the last that were stored of one run, the last of each of two.

    Raises:
        DataError: a run has no stored rollouts, or none of a step that is asked for.
    """
    sources = [source for run in runs for source in read_sources(run, steps or _usual_steps(run, len(runs)))]
    out.write_text(view_page(sources), encoding="utf-8")
    return out


def read_sources(run: Path, steps: Sequence[int]) -> list[Source]:
    """The stored rollouts of some steps of a run."""
    files = _by_step(run)
    missing = [step for step in steps if step not in files]
    if missing:
        known = ", ".join(map(str, files))
        raise DataError(f"{run} holds no rollouts of step {missing[0]}, only of {known}; give one of these with --step")
    folder = run_folder_of(run)
    model, route_names = _run_facts(folder)
    pieces_of = token_pieces(model)
    return [
        Source(folder.name, step, route_names, tuple(read_records(files[step])), pieces_of)
        for step in sorted(set(steps))
    ]


def view_page(sources: Sequence[Source]) -> str:
    """The page of some sources."""
    names = ", ".join(dict.fromkeys(source.run for source in sources))
    styles, scripts = ([asset(name) for name in group] for group in (_STYLES, _SCRIPTS))
    return page(f"Tokens of {names}", asset("view.html"), styles, scripts, view_data(sources))


def view_data(sources: Sequence[Source]) -> dict[str, Any]:
    """What the page's script reads."""
    table = PieceTable()
    packed = [_pack_source(source, table) for source in sources]
    return {"sources": packed, "pieces": table.pieces}


def _pack_source(source: Source, table: PieceTable) -> dict[str, Any]:
    groups: dict[str, list[RolloutRecord]] = {}
    for record in source.records:
        groups.setdefault(record.prompt_id, []).append(record)
    return {
        "run": source.run,
        "step": source.step,
        "routes": list(source.route_names),
        "groups": [
            {
                "prompt": prompt_id,
                "question": records[0].question,
                "answer": records[0].answer,
                "rollouts": [pack_rollout(record, source.pieces_of, table) for record in records],
            }
            for prompt_id, records in groups.items()
        ],
    }


def token_pieces(model: Model) -> Pieces:
    """How ids become text; where the model's tokenizer does not load they are shown as numbers, which is logged."""
    from trace_rl.launch.model_files import load_tokenizer, resolve_model
    from trace_rl.segments import read_tokens

    try:
        tokenizer = load_tokenizer(resolve_model(model))
    except TraceError as error:
        logger.warning("Tokens are shown by number, because the run's tokenizer does not load: %s", error)
        return lambda ids: [f"⟨{token}⟩" for token in ids]

    def pieces(ids: Sequence[int]) -> list[str]:
        found = read_tokens(tokenizer, ids)
        return [found.text[start:end] for start, end in pairwise(found.offsets)]

    return pieces


def _run_facts(folder: Path) -> tuple[Model, tuple[str, ...]]:
    """The model of a run and the names of its routes, in order; read leniently, for older runs have other settings.

    Code that ships with a model is never run to look at tokens, whatever the run was allowed.
    """
    file = folder / "config.yaml"
    tree = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = tree.get("model", {})
    routes = tree.get("algorithm", {}).get("routes") or {}
    return Model(path=model.get("path", "")), tuple(map(str, routes))


def _by_step(run: Path) -> dict[int, Path]:
    return {
        int(file.stem.removeprefix(_PREFIX)): file for file in dump_files(run) if file.stem[len(_PREFIX) :].isdigit()
    }


def _usual_steps(run: Path, num_runs: int) -> list[int]:
    steps = list(_by_step(run))
    return [steps[-1]] if num_runs > 1 else [steps[0], steps[-1]]
