"""The head loss in the sizes of Qwen3's heads, 2,048 to 32,768 tokens, beside plain torch and the peers that are here.

Errors, seconds and memory are those of `head_loss`, this folder's benchmark. Added is the ratio to the bare products of
the head: logits, gradient of the states and gradient of the head, which no implementation gets around.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import head_loss
import roofs
from gpu_cases import Case, Context, Row
from head_loss import MIB, PRESETS, Preset
from peers import Contender, contenders
from report import version_of

TOKENS = (2048, 8192, 32768)


def cases(context: Context) -> list[Case]:
    sizes = _sizes(context)
    checked = [preset for preset in sizes if preset.shape.tokens == sizes[0].shape.tokens]
    shares = context.of_scale((0.0, 0.25, 1.0), (0.25,), (0.25,))
    return [
        Case("implementations", partial(_implementations, sizes[0])),
        *(Case(f"errors, {_name(preset)}", partial(_errors, context, preset)) for preset in checked),
        *(
            Case(f"{_name(preset)}, {share:.0%} routed", partial(_times, context, preset, share))
            for preset in sizes
            for share in shares
        ),
    ]


def _sizes(context: Context) -> list[Preset]:
    """From few tokens to many."""
    if context.scale == "dry":
        return [replace(PRESETS["toy"], device=context.device.type)]
    heads = {preset.shape.hidden: preset for preset in PRESETS.values() if preset.device == "cuda"}
    tokens = TOKENS if context.scale == "full" else TOKENS[:1]
    return [
        replace(preset, shape=replace(preset.shape, tokens=count, sequence=256))
        for count in tokens
        for preset in heads.values()
    ]


def _name(preset: Preset) -> str:
    return f"hidden {preset.shape.hidden}, {preset.shape.tokens} tokens"


def _present(preset: Preset) -> list[Contender]:
    return [each for each in contenders(preset.tile_mib * MIB) if not each.why_not()]


def _implementations(preset: Preset) -> list[Row]:
    return [
        {"implementation": each.name, "here": each.why_not() or f"{each.package} {version_of(each.package)}"}
        for each in contenders(preset.tile_mib * MIB)
    ]


def _errors(context: Context, preset: Preset) -> list[Row]:
    return head_loss.check(preset, _present(preset), context.seed)


def _times(context: Context, preset: Preset, share: float) -> list[Row]:
    products_s = _products_s(preset, context)
    repeats = context.of_scale(3, 3, 1)
    rows: list[Row] = []
    for found in head_loss.measure(preset, _present(preset), share, repeats, context.seed):
        row: dict[str, float | str] = {"implementation": found["contender"]}
        if "why_not" in found:
            rows.append(row | {"why_not": found["why_not"]})
            continue
        row |= {"seconds": found["seconds"], "of_products_ratio": found["seconds"] / products_s}
        rows.append(row | {"of_ours_without_routes_ratio": found["ratio"], "extra_memory_mib": found["extra_mib"]})
    return rows


def _products_s(preset: Preset, context: Context) -> float:
    """Seconds of the three products, each of all tokens at once."""
    problem = head_loss.build(preset, (), 0.0, context.seed)
    hidden, head = problem.hidden.detach(), problem.head.detach()

    def products() -> None:
        logits = hidden @ head.T
        _ = logits @ head
        _ = logits.T @ hidden

    return roofs.seconds_of(products, context.device)
