"""Writes docs/cost.md and its curves: what a step takes, and where each stage becomes the bottleneck.

`make docs` runs it, and a test fails where the page is not what the cost model says. All numbers of the page come from
`trace_rl.launch.plan`, for GPUs by their data sheets with the default shares, and from recorded benchmarks. Must not
decide how anything is worked out.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trace_rl.config.base import Section
from trace_rl.launch.cost_page import on_paper, prose
from trace_rl.launch.cost_page.curves import Panel, figure
from trace_rl.launch.cost_page.on_paper import Case
from trace_rl.launch.plan import stages
from trace_rl.launch.plan.cost import LONGEST, StepCost, finished_first, left_to_score, running_ahead, synchronous
from trace_rl.launch.plan.hardware import GPUS, Fixed, Roofs, Shares
from trace_rl.launch.plan.stages import Stage
from trace_rl.launch.plan.text import size
from trace_rl.launch.plan.time_text import rate, seconds
from trace_rl.launch.plan.workload import Expected

ROOT = Path(__file__).resolve().parents[2]
PAGE, CURVES = ROOT / "docs/cost.md", ROOT / "docs/images/cost-curves.svg"
STRAGGLERS = ROOT / "benchmarks/results/straggler_trace.json"
AHEAD = 2
"""Staleness of the asynchronous column."""
_SHOWN = (stages.GENERATION, stages.TEACHER, stages.LEARNER, stages.SYNC, stages.DRIVER)


@dataclass(frozen=True)
class Dimension:
    """Something that a step grows or shrinks with."""

    title: str
    setting: str
    """Where it is set."""
    values: tuple[float, ...]
    varied: Callable[[Case, float], Case]
    is_whole: bool = True


def _setting(title: str, dotted: str, values: Sequence[float]) -> Dimension:
    return Dimension(title, f"`{dotted}`", tuple(values), lambda case, value: case.changed({dotted: int(value)}))


def _budget(case: Case, value: float) -> Case:
    longest = case.config.sampling.max_prompt_tokens + int(value)
    micro_batch = max(case.config.learner.max_tokens_per_micro_batch, longest)
    changed = case.changed(
        {"sampling.max_response_tokens": int(value), "learner.max_tokens_per_micro_batch": micro_batch}
    )
    return changed.expecting(response_tokens=value / 4)


DIMENSIONS = (
    _setting("Prompts a step", "sampling.prompts_per_step", (8, 16, 32, 64, 128, 256)),
    _setting("Samples a prompt", "sampling.samples_per_prompt", (2, 4, 8, 16, 32, 64)),
    Dimension(
        "Tokens that a response may have, a quarter of which it has on average",
        "`sampling.max_response_tokens`",
        (1024, 2048, 4096, 8192, 16384, 32768),
        _budget,
    ),
    Dimension(
        "Share of rollouts with routed tokens, a quarter of whose tokens are routed",
        "`routed_rollouts_frac`",
        (0.05, 0.1, 0.25, 0.5, 1.0),
        lambda case, value: case.expecting(routed_rollouts_frac=value),
        is_whole=False,
    ),
    _setting("Engines", "generator.num_engines", (1, 2, 4, 8, 16, 32)),
    _setting("Ranks of the learner", "learner.world_size", (4, 8, 16, 32, 64)),
)


def page() -> str:
    """The whole page; ends with a newline."""
    with on_paper.models() as shapes:
        node, large = on_paper.one_node(shapes), on_paper.many_nodes(shapes)
        parts = [
            prose.INTRODUCTION,
            _fields({"": Expected}),
            prose.FILE,
            _fields({"roofs.": Roofs, "shares.": Shares, "fixed.": Fixed}),
            _assumptions(),
            _formulas(),
            "## One node: Qwen3-8B on 8 H100",
            _wrapped(_node_words(node)),
            _step_table(node),
            "![Seconds of each stage over six dimensions](images/cost-curves.svg)",
            *(f"### {each.title}\n\n{_dimension_table(node, each)}" for each in DIMENSIONS),
            "## Where the bottleneck moves",
            prose.BOTTLENECKS,
            _bottleneck_table(node),
            "## On paper: 70 G parameters on 64 nodes",
            _wrapped(_large_words(large)),
            _table(("what", "arithmetic", "value"), (_derived_cells(row) for row in on_paper.derivation(large))),
            _wrapped(_large_verdict(large)),
            "## Against what was measured",
            prose.MEASURED,
            _table(
                ("scheduling", "measured, s a step", "worked out, s", "difference"),
                (
                    (name, f"{measured:.2f}", f"{found:.2f}", f"{found / measured - 1:+.0%}")
                    for name, measured, found in stragglers()
                ),
            ),
            prose.LEFT_OUT,
        ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def curves() -> str:
    """The figure."""
    with on_paper.models() as shapes:
        node = on_paper.one_node(shapes)
        panels = []
        for each in DIMENSIONS:
            steps = [on_paper.step_of(each.varied(node, value)) for value in each.values]
            lines: dict[str, list[float]] = {name: [step.of(name).seconds for step in steps] for name in _SHOWN}
            lines["a step"] = [step.seconds for step in steps]
            panels.append(Panel(each.title.split(",")[0], each.values, lines))
    return figure(panels, "s")


def stragglers() -> list[tuple[str, float, float]]:
    """Of simulated stragglers (benchmarks/straggler_trace.py): scheduling, seconds of a step as measured and worked
    out from the stages of the synchronous run.

    A batch takes what it took there; where others follow it, 128 responses in 64 places take as many token steps as
    their mean length says, of engines that are full.
    """
    report = json.loads(STRAGGLERS.read_text(encoding="utf-8"))
    setting, rows = report["setting"], {row["mode"]: row for row in report["results"]}
    base, count = rows["synchronous"], setting["prompts"] * setting["samples"]
    places = setting["num_engines"] * setting["max_concurrent"]
    token_s = setting["seconds_per_token"] * (1 + setting["crowding"])
    batch = [_took(stages.GENERATION, base["rollout_s"])]
    steady = [_took(stages.GENERATION, count / places * base["sampled_length_tokens"] * token_s)]
    after = [_took(stages.LEARNER, base["learner_s"]), _took(stages.SYNC, setting["sync_s"])]
    found = {
        "synchronous": synchronous(batch, 0.0, after),
        "one step off, finish": finished_first(batch, 0.0, after),
        "one step off": running_ahead(steady, base["rollout_s"], after, 1),
        "staleness 2": running_ahead(steady, base["rollout_s"], after, 2),
        "staleness 4": running_ahead(steady, base["rollout_s"], after, 4),
    }
    return [(name, count / rows[name]["rollouts_per_s"], step.seconds) for name, step in found.items()]


def _took(name: str, seconds_: float) -> Stage:
    return Stage(name, seconds_, 0.0, seconds_, "products")


def _fields(sections: Mapping[str, type[Section]]) -> str:
    """What a user may give, in the words of the settings themselves."""
    rows = [
        (
            f"`{prefix}{name}`",
            "" if field.is_required() else f"{field.default:g}",
            " ".join((field.description or "").split()),
        )
        for prefix, section in sections.items()
        for name, field in section.model_fields.items()
    ]
    return _table(("key", "default", "meaning"), rows)


def _assumptions() -> str:
    shares, fixed = Shares(), Fixed()
    rows = [
        (
            f"`{name}`",
            rate(roofs.matmul_flops, "FLOP/s"),
            rate(roofs.copy_bytes_per_s, "B/s"),
            rate(roofs.link_bytes_per_s, "B/s"),
            rate(roofs.ring_bytes_per_s, "B/s"),
        )
        for name, roofs in GPUS.items()
    ]
    return "\n\n".join(
        [
            "## What it stands on",
            _table(("GPU, by its data sheet", "products, bfloat16", "memory", "link", "gather over all ranks"), rows),
            _wrapped(
                f"Without measured ones, these shares of the roofs are expected: generation {shares.generation:.0%}, "
                f"teacher {shares.teacher:.0%}, learner {shares.learner:.0%}, sync {shares.sync:.0%}. They are "
                "assumptions, with their reasons in the table above; nothing takes a fixed time but a rollout on the "
                f"driver, {fixed.driver_s * 1e3:.2g} ms (measured, `benchmarks/results/driver_overhead.md`)."
            ),
        ]
    )


def _formulas() -> str:
    rows = [
        ("generation", "max(bytes / memory, operations / products) while writing, + prompts read once", "token steps"),
        ("grading", "beside generation", "completions / processes"),
        ("annotation", "beside generation; the last reply is waited for", "requests"),
        ("teacher", "operations / products + (states + weights) / link", "batches"),
        ("learner", "max(operations / ranks / products, bytes / gather)", "micro-batches"),
        ("sync", "weights / link, + what ZeRO-3 gathers first", "1"),
        ("driver", "", "rollouts"),
    ]
    return "\n\n".join(
        [prose.FORMULAS.strip(), _table(("stage", "seconds at the roofs", "rounds"), rows), prose.WHO_WAITS.strip()]
    )


def _node_words(node: Case) -> str:
    work = node.given.work
    return (
        f"`configs/recipes/qwen3_8b_trace_fkl.yaml` on {node.gpu}: {node.config.generator.num_engines} engines, "
        f"{node.config.learner.world_size} learner ranks under ZeRO-{node.config.learner.zero_stage}, one teacher. "
        f"{work.prompts} prompts x {work.samples} responses; prompts of {work.prompt_tokens:,.0f} tokens, responses of "
        f"{work.responses.mean:,.0f} on average, log-normal with sigma 1 and cut at "
        f"{node.config.sampling.max_response_tokens:,}; half of the rollouts have routed tokens, a quarter of theirs. "
        "The step is one in which routes read the teacher."
    )


def _step_table(case: Case) -> str:
    step = on_paper.step_of(case)
    rows: list[tuple[str, ...]] = [
        (
            stage.name,
            seconds(stage.roof_s) if stage.roof_s else "",
            seconds(stage.seconds),
            f"{step.busy_frac(stage.name):.0%}",
            stage.bound,
        )
        for stage in step.stages
    ]
    rows.append(("**a step**", "", f"**{seconds(step.seconds)}**", "", _told(step)))
    return _table(("stage", "at the roofs", "expected", "of a step", "bound by"), rows)


def _dimension_table(node: Case, dimension: Dimension) -> str:
    head = (
        dimension.setting, "generation", "teacher", "learner", "sync", "a step", "bottleneck",
        f"staleness {AHEAD}", "bottleneck", "GPU memory of a rank", "responses at once",
    )  # fmt: skip
    return _table(head, (_dimension_cells(dimension.varied(node, value), value) for value in dimension.values))


def _dimension_cells(case: Case, value: float) -> tuple[str, ...]:
    step, ahead = on_paper.step_of(case), on_paper.step_of(_ahead(case))
    return (
        f"{value:,g}",
        *(seconds(step.of(name).seconds) for name in _SHOWN[:4]),
        seconds(step.seconds),
        _told(step),
        seconds(ahead.seconds),
        _told(ahead),
        size(case.rank_bytes),
        f"{stages.decoding(case.given, is_steady=False).at_once:,.0f}",
    )


def _ahead(case: Case) -> Case:
    return case.changed({"scheduling.max_staleness": AHEAD})


def _bottleneck_table(node: Case) -> str:
    short = _budget(node.changed({"sampling.prompts_per_step": 256}), 1024)
    cases = (node, _ahead(node), short, _ahead(short))
    rows = [(each.title.split(",")[0], *(moves(each, case) for case in cases)) for each in DIMENSIONS]
    modes = ("synchronous", f"staleness {AHEAD}")
    return _table(("over", *modes, *(f"many short responses, {mode}" for mode in modes)), rows)


def moves(dimension: Dimension, case: Case) -> str:
    """The bottleneck along a dimension, and the values from which it is another one."""

    def at(value: float) -> str:
        return _told(on_paper.step_of(dimension.varied(case, value)))

    told = [at(dimension.values[0])]
    for low, high in zip(dimension.values, dimension.values[1:], strict=False):
        while at(low) != at(high):
            low = _first_change(at, low, high, dimension.is_whole)
            told.append(f"from {_plain(low)} on {at(low)}")
    return "; ".join(told)


def _first_change(at: Callable[[float], str], low: float, high: float, is_whole: bool) -> float:
    """The least value above `low` at which `at` differs, where it changes once."""
    before = at(low)
    while high - low > (1 if is_whole else 0.01 * high):
        middle = (low + high) // 2 if is_whole else (low + high) / 2
        low, high = (middle, high) if at(middle) == before else (low, middle)
    return high


def _told(step: StepCost) -> str:
    return LONGEST if step.bottleneck == LONGEST else f"{step.bottleneck} ({step.of(step.bottleneck).bound})"


def _large_words(large: Case) -> str:
    config, work = large.config, large.given.work
    return (
        f"A Llama of 70 G parameters in bfloat16 with TRACE, on 64 nodes of 8 {large.gpu}: "
        f"{config.generator.num_engines} engines of {config.generator.tensor_parallel} GPUs, "
        f"{config.learner.world_size} ranks under ZeRO-{config.learner.zero_stage}, and the teacher on a GPU of the "
        f"last node. {work.prompts} prompts x {work.samples} responses of {work.responses.mean:,.0f} tokens on average "
        f"(log-normal, sigma 1), cut at {config.sampling.max_response_tokens:,}; otherwise as above. A rank takes "
        f"{size(large.rank_bytes)} of a GPU, the teacher {size(large.teacher_bytes)} of {size(large.gpu_bytes)}."
    )


def _derived_cells(row: on_paper.Derived) -> tuple[str, str, str]:
    return row.what, f"`{row.arithmetic}`", f"{_plain(row.value)} {row.unit}".strip()


def _plain(value: float) -> str:
    """Three digits, or all of what is no larger than a million."""
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def _large_verdict(large: Case) -> str:
    step, ahead = on_paper.step_of(large), on_paper.step_of(_ahead(large))
    plain = on_paper.step_of(large, has_routes=False)
    plain_ahead = on_paper.step_of(_ahead(large), has_routes=False)
    spread = step.of(stages.TEACHER).seconds / large.config.learner.world_size
    generation_s, teacher_s = step.of(stages.GENERATION).seconds, step.of(stages.TEACHER).seconds
    needed = max(  # done a tenth of a plain step after generation, whatever is left to score at each moment
        teacher_s * left / (generation_s * (1 - come) + plain.seconds * 0.1)
        for come, left in left_to_score(large.given.work, large.config.prompts_scored_together)
    )
    return (
        f"A step with routes takes {seconds(step.seconds)} (bottleneck: {_told(step)}), one without "
        f"{seconds(plain.seconds)} ({_told(plain)}); {AHEAD} versions ahead {seconds(ahead.seconds)} and "
        f"{seconds(plain_ahead.seconds)}. So **one teacher process is too little at this size**: to cost a tenth of a "
        f"step without routes it would have to be {needed:,.0f} times as fast. Spread over the ranks of the learner "
        f"its work would take {seconds(spread)}, but that does not exist here. What helps today is what shrinks its "
        "work: fewer rollouts with spans, a schedule that ends, a smaller teacher.\n\nverl reports 28.8 s for the sync "
        "of a 72 G model over NCCL (its docs/advance/delta_weight_sync.md); "
        f"{seconds(step.of(stages.SYNC).seconds)} is what a quarter of the link would give, and was not measured."
    )


def _wrapped(words: str) -> str:
    """Paragraphs in lines of at most 120 columns."""
    return "\n\n".join(
        textwrap.fill(each, 120, break_long_words=False, break_on_hyphens=False) for each in words.split("\n\n")
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    CURVES.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    CURVES.write_text(curves(), encoding="utf-8")
    sys.stdout.write(f"wrote {PAGE} and {CURVES}\n")


if __name__ == "__main__":
    main()
