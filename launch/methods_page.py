"""docs/methods.md from the presets in configs/methods: every method side by side, and where its numbers come from.

`python -m trace_rl.launch.methods_page` writes the page. Tables are read off the loaded configuration and prose off
each preset's card, so that the page cannot say anything else than what runs; `methods_notes.md` beside this file holds
the parts that no preset knows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from trace_rl.config.algorithm import Algorithm, Route
from trace_rl.config.base import Kind
from trace_rl.config.run import RunConfig
from trace_rl.contexts import Context
from trace_rl.overlays import load_config
from trace_rl.selectors import Top

CONFIGS = Path(str(resources.files("trace_rl.configs")))
PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
_NOTES = Path(__file__).with_name("methods_notes.md")
_REST = ("model.path=DIR", "data.path=FILE", "teacher.weights.path=DIR")


def presets() -> dict[str, RunConfig]:
    """Every preset by name, over `configs/base.yaml`; TRACE first, then by name."""
    files = sorted(
        (CONFIGS / "methods").glob("*.yaml"), key=lambda file: (not file.stem.startswith("trace"), file.stem)
    )
    return {file.stem: load_preset(file) for file in files}


def load_preset(file: Path) -> RunConfig:
    """One preset over `configs/base.yaml`, with paths that nobody opens."""
    is_external = "type: external" in file.read_text(encoding="utf-8")
    return load_config([CONFIGS / "base.yaml", file], _REST if is_external else _REST[:2])


def page() -> str:
    """The whole document."""
    methods = presets()
    intro, notes = _NOTES.read_text(encoding="utf-8").split("<!-- tables -->\n")
    gradients = [[f"`{name}`", *_gradient_cells(config)] for name, config in methods.items()]
    routes = [
        [f"`{name}`", *_route_cells(route_name, route, config)]
        for name, config in methods.items()
        for route_name, route in config.algorithm.routes.items()
    ]
    teachers = [[f"`{name}`", *_teacher_cells(config)] for name, config in methods.items() if config.algorithm.routes]
    parts = [
        intro.strip(),
        "## Policy gradients side by side",
        _table(("preset", "advantage", "policy gradient", "mean over", "also"), gradients),
        "## Routes side by side",
        _table(
            (
                "preset",
                "route",
                "rollouts",
                "tokens",
                "action",
                "token weight",
                "lambda",
                "policy gradient there",
                "mean",
            ),
            routes,
        ),
        "## Teachers side by side",
        _table(("preset", "context", "weights", "annotator", "completions"), teachers),
        "## The methods",
        *(_section(name, config) for name, config in methods.items()),
        notes.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def _gradient_cells(config: RunConfig) -> list[str]:
    algorithm = config.algorithm
    if not algorithm.has_policy_gradient:
        return ["none", "none", algorithm.aggregation, _extras(algorithm)]
    return [
        describe(algorithm.advantage),
        describe(algorithm.policy_gradient),
        algorithm.aggregation,
        _extras(algorithm),
    ]


def _extras(algorithm: Algorithm) -> str:
    found = []
    if algorithm.rollout_correction.level in ("token", "sequence"):  # no method is defined for older weights
        found.append(f"correction per {algorithm.rollout_correction.level}, cap {algorithm.rollout_correction.cap:g}")
    if algorithm.dynamic_sampling.max_rounds > 1:
        found.append(f"refilled up to {algorithm.dynamic_sampling.max_rounds} rounds")
    if algorithm.overlong.mask:
        found.append("truncated masked")
    if algorithm.overlong.penalty_frac:
        found.append(f"length penalty in the last {algorithm.overlong.penalty_frac:.0%}")
    return ", ".join(found)


def _route_cells(name: str, route: Route, config: RunConfig) -> list[str]:
    return [
        name,
        " and ".join(route.selector.rollouts),
        describe(route.selector.tokens),
        describe(route.action) + (f", T {route.temperature:g}" if route.temperature != 1 else ""),
        describe(route.token_weight),
        describe(route.schedule),
        route.on_routed if config.algorithm.has_policy_gradient else "there is none",
        route.normalisation,
    ]


def _teacher_cells(config: RunConfig) -> list[str]:
    routes = [route for route in config.algorithm.routes.values() if route.reads]
    contexts = dict.fromkeys(_context(route.teacher_context(config.teacher.context)) for route in routes)
    sampling = config.sampling
    share = f", {sampling.off_policy_frac:.0%} of the prompts" if sampling.off_policy_frac < 1 else ""
    return [
        "; ".join(contexts) or "no teacher",
        describe(config.teacher.weights) if routes or sampling.source == "teacher" else "",
        "yes" if config.needs_annotator else "no",
        sampling.source + share,
    ]


def _context(context: Context) -> str:
    joined = {"every": " + ", "available": " and/or ", "first": ", else "}[context.combine]
    return joined.join(piece.replace("_", " ") for piece in context.pieces) or "none"


def describe(kind: Kind) -> str:
    """A kind with the settings that it has beside its type, nested ones too, those at their defaults left out."""
    required = {name for name, field in type(kind).model_fields.items() if field.is_required()}
    told = [
        f"{name.replace('_', ' ')} {_value(value)}"
        for name, value in kind
        if name != "type"
        and name not in required
        and (value != type(kind).model_fields[name].default or name in _ALWAYS)
    ]
    if isinstance(kind, Top):
        told = [f"{kind.frac:.0%} by {kind.score.type}"]
    return kind.type + (f" ({', '.join(told)})" if told else "")


_ALWAYS = frozenset(
    {"clip", "clip_low", "clip_high", "std", "beta", "k", "by", "tail", "like", "shape"}
    | {"every", "rate", "value", "initial", "final", "steps", "hold_steps", "decay_steps"}
)
"""Settings that tell methods apart even at their defaults."""


def _value(value: object) -> str:
    if isinstance(value, Kind):
        return describe(value)
    if hasattr(value, "mode"):
        return str(value.mode) if value.mode == "none" else f"{value.mode} {value.threshold:g}"  # type: ignore[attr-defined]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _section(name: str, config: RunConfig) -> str:
    method = config.method
    return "\n\n".join(
        [
            f"### {method.name} (`configs/methods/{name}.yaml`)",
            f"Source: {method.source}.",
            f"*From the source.* {method.from_source.strip()}",
            f"*Ours.* {method.ours.strip()}",
        ]
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")


if __name__ == "__main__":
    main()
