"""What the GPU gives at most, on random numbers: large copies, large matrix products, and copies to and from the host.

Every share of a roof that the other sections report is a share of what is measured in the same way.
"""

from __future__ import annotations

from functools import partial

import roofs
import torch
from gpu_cases import Case, Context, Row, need_gpu

from trace_rl.launch.plan.hardware import GPUS

PRECISIONS = {"bfloat16": (torch.bfloat16, False), "float32": (torch.float32, False), "tf32": (torch.float32, True)}
"""Dtype, and whether products of float32 may round their operands to tf32."""
OTHER_CARDS = ("PCIe", "NVL", "MIG")
"""In the names of GPUs whose chips have other limits than the cards that the data sheets speak of."""
HOST_BYTES = 2**30
WAYS = ("host to GPU", "GPU to host")
KINDS = ("pinned", "pageable")


def cases(context: Context) -> list[Case]:
    return [
        Case("copy", lambda: [{"bytes_per_s": roofs.copy_bytes_per_s(context.device)}]),
        *(Case(f"matmul {name}", partial(_matmul, context, name)) for name in PRECISIONS),
        *(Case(f"{way}, {kind}", partial(_host, context, way, kind)) for way in WAYS for kind in KINDS),
    ]


def matmul_roof(context: Context, dtype: torch.dtype) -> float:
    """Operations a second of a product that is large for the device."""
    return roofs.matmul_flops(context.device, dtype, context.of_scale(8192, 8192, 256))


def datasheet_flops(context: Context) -> float:
    """What the maker says of products in bfloat16; 0 where it is not known here."""
    name = torch.cuda.get_device_name(context.device) if context.is_gpu else ""
    is_other = any(part in name for part in OTHER_CARDS)
    told = (roof.matmul_flops for gpu, roof in GPUS.items() if gpu.split("-")[0] in name)
    return 0.0 if is_other else next(told, 0.0)


def _matmul(context: Context, name: str) -> list[Row]:
    dtype, is_tf32 = PRECISIONS[name]
    if is_tf32:
        need_gpu(context)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    try:
        row: dict[str, float] = {"flops_per_s": matmul_roof(context, dtype)}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    if name == "bfloat16" and (told := datasheet_flops(context)):
        row |= {"datasheet_flops_per_s": told, "of_datasheet_frac": row["flops_per_s"] / told}
    return [row]


def _host(context: Context, way: str, kind: str) -> list[Row]:
    need_gpu(context)
    on_gpu = torch.empty(HOST_BYTES, dtype=torch.uint8, device=context.device).random_()
    on_host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=kind == "pinned").copy_(on_gpu)
    target, source = (on_gpu, on_host) if way == WAYS[0] else (on_host, on_gpu)
    return [{"bytes_per_s": HOST_BYTES / roofs.seconds_of(lambda: target.copy_(source), context.device)}]
