"""How a plan reads: a few lines when a run starts, and the whole of it on `trace-rl plan` and in the run folder.

Plain text of at most 100 columns, so that it reads the same on a terminal, in a pipe and in a file. Must not decide
anything.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from trace_rl.config.run import RunConfig
from trace_rl.launch.model_files import EMBEDDED
from trace_rl.launch.placement import PlacementPlan, Seat
from trace_rl.launch.plan.batch import BatchPlan, SyncPlan, prompts_in_flight
from trace_rl.launch.plan.memory import CacheMemory, Forecast, RoleMemory
from trace_rl.launch.plan.run_plan import RunPlan
from trace_rl.launch.summary import describe_method

PLAN_FILE = "plan.txt"
"""Of the run folder: the whole plan."""
_WIDTH = 100
_LABEL = 38
_STRATEGIES = {
    "PACK": "taken at once, each on one node, on as few as possible",
    "SPREAD": "taken at once, each on one node, on as many as possible",
    "STRICT_PACK": "taken at once, all on one node",
}


def short_text(plan: RunPlan) -> str:
    """What is about to happen, for the start of a run."""
    config, batch, sync = plan.config, plan.batch, plan.sync
    lines = [
        f"{config.run.name}: {describe_method(config)}, {config.run.steps} steps",
        f"  model {config.model.path} ({config.model.dtype}, {plan.shape.num_parameters:,} parameters), data "
        f"{config.data.path}",
        f"  {_sequences(batch)} a step of at most {config.sampling.max_response_tokens:,} tokens behind prompts of at "
        f"most {config.sampling.max_prompt_tokens:,}, {_optimizer_steps(batch)}",
        f"  {_roles(plan.placement)}; {size(sync.nbytes)} a sync by {sync.transport}",
    ]
    lines += [f"  note: {warning}" for warning in (*plan.refusals, *plan.warnings)]
    return "\n".join(lines)


def full_text(plan: RunPlan, time: Sequence[str] = ()) -> str:
    """All of a plan; ends with a newline.

    Args:
        time: lines on how long a step takes (`trace_rl.launch.plan.time_text`), where that was asked for.
    """
    config = plan.config
    sections = [
        ("Batches, at full length", _batch_lines(config, plan.batch)),
        (_placement_title(plan), _placement_lines(plan.placement)),
        (_memory_title(plan.forecast), _memory_lines(plan.forecast, plan.placement)),
        ("Weights", _sync_lines(config, plan.sync)),
        ("Scheduling", _scheduling_lines(config)),
        ("Annotation", _annotation_lines(plan)),
    ]
    if time:
        sections.append(("Time of a step", list(time)))
    if plan.warnings:
        sections.append(("Worth knowing", [f"- {warning}" for warning in plan.warnings]))
    if plan.refusals:
        sections.append(("The run would not start", [f"- {refusal}" for refusal in plan.refusals]))
    head = [
        f"{config.run.name}: {describe_method(config)}, {config.run.steps} steps",
        f"model {config.model.path} ({config.model.dtype}, {plan.shape.num_parameters:,} parameters), data "
        f"{config.data.path}",
    ]
    lines = [part for line in head for part in _wrapped(line, "", "  ")]
    for title, body in sections:
        lines += ["", title, *(part for line in body for part in _wrapped(line, "  ", "    "))]
    return "\n".join(lines) + "\n"


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            value = nbytes / scale
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{nbytes:.0f} bytes"


def _wrapped(line: str, indent: str, hanging: str) -> list[str]:
    """A line within the width; one that is laid out in columns already is only moved."""
    if len(indent + line) <= _WIDTH:
        return [indent + line]
    inner = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line.strip(),
        _WIDTH,
        initial_indent=indent + inner,
        subsequent_indent=hanging + inner,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _batch_lines(config: RunConfig, batch: BatchPlan) -> list[str]:
    sampling = config.sampling
    per_run = batch.optimizer_steps * batch.steps
    lines = [
        f"{_sequences(batch)} a step",
        f"  x {batch.max_sequence_tokens:,} tokens at most ({sampling.max_prompt_tokens:,} of the prompt, "
        f"{sampling.max_response_tokens:,} of the response) = {batch.max_tokens:,} tokens",
        f"  -> {_optimizer_steps(batch)} of {batch.sequences_per_optimizer_step} sequences each; {per_run:,} in "
        f"{batch.steps:,} steps",
        f"  -> for each, {_count(batch.micro_batches, 'micro-batch', 'micro-batches')} {_on_ranks(config, batch)}, of "
        f"{_count(batch.sequences_per_micro_batch, 'full sequence', 'full sequences')} "
        f"({config.learner.max_tokens_per_micro_batch:,} tokens fit); shorter sequences take fewer",
    ]
    if batch.epochs is not None:
        lines.append(f"data: {batch.num_rows:,} training prompts, {batch.epochs:,.3g} epochs in the run")
    else:
        is_endless = config.data.path == EMBEDDED
        lines.append("data: made without end" if is_endless else "data: could not be read, so epochs are not known")
    every = config.evaluation.every
    if every:
        count = 1 + -(-batch.steps // every)
        samples = config.evaluation.num_prompts * config.evaluation.samples_per_prompt
        lines.append(f"evaluations: {count} of up to {samples:,} samples")
    return lines


def _on_ranks(config: RunConfig, batch: BatchPlan) -> str:
    shared = config.learner.sequence_parallel
    if shared > 1:
        return f"on each of {batch.num_shares} x {shared} ranks that share sequences"
    return "on the one rank" if batch.num_shares == 1 else f"on each of {batch.num_shares} ranks"


def _placement_title(plan: RunPlan) -> str:
    placement = plan.config.placement
    where = "a private Ray on this machine" if placement.ray_address == "local" else f"Ray at {placement.ray_address}"
    return f"Placement: {placement.mode}, {plan.placement.strategy}, on {where}"


def _placement_lines(plan: PlacementPlan) -> list[str]:
    lines = []
    for alike in _alike(plan):
        first, last = alike[0], alike[-1]
        name = f"bundle {first}" if first == last else f"{first} to {last}"
        takes = _amounts(plan.bundles[first]) + ("" if first == last else " each")
        for role, end in zip(plan.roles_of(first), plan.roles_of(last), strict=True):
            who = role if role == end else f"{role} to {end.removeprefix(_kind(end)).strip()}"
            lines.append(f"{name:<10} {who + _guest(plan.seats[role]):<58} {takes}".rstrip())
            name = takes = ""
    return [*lines, f"{'together':<10} {_STRATEGIES[plan.strategy]:<58} {_amounts(plan.total())}"]


def _alike(plan: PlacementPlan) -> Iterator[list[int]]:
    """Neighbouring bundles with the same kinds of roles and the same size, unless they have guests."""

    def look(number: int) -> tuple[object, ...]:
        roles = plan.roles_of(number)
        has_guests = any(plan.seats[role].hosts for role in roles)
        return number if has_guests else -1, dict(plan.bundles[number]), [_kind(role) for role in roles]

    for _, group in groupby(range(len(plan.bundles)), key=look):
        yield list(group)


def _kind(role: str) -> str:
    """A role without its number."""
    return role.rstrip("0123456789").strip()


def _amounts(amounts: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in amounts.items())


def _guest(seat: Seat) -> str:
    return f" (guest of {', '.join(seat.hosts)})" if seat.hosts else ""


def _memory_title(forecast: Forecast) -> str:
    gpu = "" if forecast.gpu_bytes is None else f"; a GPU has {size(forecast.gpu_bytes)}"
    return f"Memory a process, at its peak (~ marks estimates, the rest is exact{gpu})"


def _memory_lines(forecast: Forecast, placement: PlacementPlan) -> list[str]:
    lines: list[str] = []
    for memory in forecast.roles:
        lines += _role_lines(memory, placement)
        if memory.name in forecast.caches:
            lines += [f"  {line}" for line in _cache_lines(forecast.caches[memory.name])]
    host = sum(
        len(memory.roles) * (memory.nbytes("host") + (0 if placement.uses_gpu(memory.roles[0]) else memory.peak))
        for memory in forecast.roles
    )
    lines.append(f"CPU memory of these roles together: ~{size(host)}, and about 1 GiB a process for libraries")
    return lines


def _role_lines(memory: RoleMemory, placement: PlacementPlan) -> Iterator[str]:
    has_gpu = placement.uses_gpu(memory.roles[0])
    title = memory.name if len(memory.roles) == 1 else f"{memory.name} (x {len(memory.roles)})"
    where = "of a GPU" if has_gpu else "of CPU memory"
    yield f"{title:<{_LABEL + 2}} {'~' + size(memory.nbytes('device')):>10} {where}"
    for item in memory.items:
        if not item.nbytes:
            continue
        mark = " " if item.is_exact else "~"
        aside = " of CPU memory" if item.place == "host" and has_gpu else ""
        yield f"  {item.what:<{_LABEL}} {mark + size(item.nbytes):>10}{aside}"
    if memory.at_start > memory.nbytes("device"):
        yield f"  {'while it starts, the model being whole':<{_LABEL}} {'~' + size(memory.at_start):>10}"


def _cache_lines(cache: CacheMemory) -> list[str]:
    sequence = cache.bytes_per_token * cache.sequence_tokens
    lines = [f"cache: {size(cache.bytes_per_token)} a token, {size(sequence)} a sequence of {cache.sequence_tokens:,}"]
    if cache.sequences is None:
        return [*lines, "  how many fit depends on the GPU: give --gpu-memory-gib, or --check with a cluster"]
    return [*lines, f"  {cache.sequences:,.0f} of full length fit; up to {cache.concurrent} run at once"]


def _sync_lines(config: RunConfig, sync: SyncPlan) -> list[str]:
    what = "adapters" if config.learner.sends_adapters else "weights"
    lines = [
        f"{sync.transport}: {size(sync.nbytes)} a version ({sync.num_weights:,} {what}) in "
        f"{_count(sync.num_buckets, 'bucket', 'buckets')} of at most {size(sync.largest_bucket)}, to "
        f"{_count(sync.num_engines, 'engine', 'engines')}",
        f"{config.run.steps + 1:,} versions in the run; each is proven by digest and canary (tolerance "
        f"{config.sync.canary_tolerance:g} nats) before it samples",
    ]
    if sync.transport in ("gloo", "nccl"):
        members = _count(sync.num_engines * sync.workers_per_engine, "worker", "workers")
        lines.insert(1, f"a group of {sync.num_members}: rank 0 of the learner sends, {members} of engines receive")
    return lines


def _scheduling_lines(config: RunConfig) -> list[str]:
    scheduling, size_ = config.scheduling, config.sampling.prompts_per_step
    flight = f"at most {_count(prompts_in_flight(config), 'prompt', 'prompts')} sampled or waiting at a time"
    if scheduling.max_staleness == 0:
        lines = [f"synchronous (max_staleness 0): every token is written by the weights that learn from it; {flight}"]
        if scheduling.oversampling_frac:
            lines.append(f"a step takes the first {size_} prompts that are complete and gives the others up")
        return lines
    late = {
        "wait": "a prompt that would be too old at the next step holds up this one (late: wait)",
        "drop": "a prompt that would be too old at the next step is given up for another (late: drop)",
    }[scheduling.late]
    partial = {
        "resume": "what is being written at a sync goes on with new weights, read anew (partial: resume)",
        "keep": "what is being written at a sync goes on with new weights and the old cache (partial: keep)",
        "finish": "a sync waits until what is being written is complete (partial: finish)",
    }[scheduling.partial]
    return [
        f"up to {_count(scheduling.max_staleness, 'version', 'versions')} ahead: {flight}",
        f"{late}; {partial}",
    ]


def _annotation_lines(plan: RunPlan) -> list[str]:
    config, cost = plan.config, plan.annotation
    if not config.needs_annotator:
        return ["no annotator: no route reads spans"]
    if cost is None:
        return [f"{config.annotator.backend.type}: a rule or a recording, which asks no model and costs nothing"]
    lines = [
        f"{config.annotator.backend.type}: at most {cost.requests:,.0f} requests, one a rollout, at {cost.steps} of "
        f"{config.run.steps} steps; repairs and failures come on top, answers from the cache take off",
        f"at most {cost.prompt_tokens:,.0f} prompt tokens and {cost.completion_tokens:,.0f} completion tokens; "
        "trace-rl annotate RUN --estimate tells from recorded rollouts",
    ]
    if cost.money:
        lines.append(f"at most {cost.money:,.2f} at the prices of annotator.backend.budget")
    if cost.minutes_at_rate:
        lines.append(f"{cost.minutes_at_rate:,.0f} minutes at annotator.backend.limits.requests_per_minute")
    model = config.annotator.backend.model
    caps = [] if model is None else _caps(model.budget.requests, model.budget.tokens, model.budget.money)
    return [*lines, f"the budget ends it at {', '.join(caps)}"] if caps else lines


def _caps(requests: int, tokens: int, money: float) -> list[str]:
    told = ((requests, "{:,.0f} requests"), (tokens, "{:,.0f} tokens"), (money, "{:,.2f} of money"))
    return [form.format(value) for value, form in told if value]


def _roles(plan: PlacementPlan) -> str:
    """How many of each kind of role there are, and what they take together."""
    names = [_kind(role) for role in plan.seats]
    kinds = list(dict.fromkeys(names))
    counted = ", ".join(_count(names.count(kind), kind, f"{kind}s") for kind in kinds if not kind.startswith("the "))
    single = ", ".join(kind for kind in kinds if kind.startswith("the "))
    return f"{counted}, {single}; {_amounts(plan.total())}"


def _sequences(batch: BatchPlan) -> str:
    return f"{batch.num_prompts} prompts x {batch.samples_per_prompt} samples = {batch.num_sequences} sequences"


def _optimizer_steps(batch: BatchPlan) -> str:
    return _count(batch.optimizer_steps, "optimizer step", "optimizer steps")


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def problem_lines(found: Sequence[str]) -> list[str]:
    """What does not fit, for the end of `--check`."""
    return [part for sentence in found for part in _wrapped(f"- {sentence}", "  ", "    ")]
