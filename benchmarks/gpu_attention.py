"""Attention over sequences that lie end to end: flash-attn, torch's own kernel for them, and what sdpa can do instead.

Times a forward and a backward pass of one layer's attention in the shapes of Qwen3 1.7B, after a comparison with
float64 on few tokens. Work is counted as in `trace_rl.flops`, three forward passes. Also decides by which attention a
model of the other sections reads packed rows (`let_pack`).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import roofs
import torch
from gpu_cases import Case, Context, Row, Skip, need, need_gpu, relative_error, within
from gpu_roofs import matmul_roof
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from trace_rl.workers.policy_model import is_flash

TORCH_VARLEN = "flash_attention_torch"
"""By this name a model's attention is torch's own; `is_flash` knows by its beginning that it needs no mask."""
CHECKED = (70, 33, 129)
"""Lengths that are compared with float64."""
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Packed:
    """Sequences end to end: queries, keys and values, [token, head, size]."""

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: tuple[int, ...]

    @cached_property
    def borders(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.query.device)

    @cached_property
    def mask(self) -> Tensor:
        """Which token sees which; a model makes it once for all layers."""
        lengths = torch.tensor(self.lengths, device=self.query.device)
        number = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        return (number[:, None] == number).tril_()

    def sides(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def cases(context: Context) -> list[Case]:
    return [Case(name, partial(_measure, context, name)) for name in ATTENTIONS]


def let_pack(policy: PreTrainedModel) -> None:
    """Give a model an attention that computes each of several sequences in a row on its own, where there is one."""
    if policy.device.type != "cuda" or policy.dtype != torch.bfloat16 or is_flash(policy):
        return
    if is_flash_attn_2_available():
        policy.set_attn_implementation("flash_attention_2")
    elif not _why_no_torch_varlen():
        use_torch_varlen(policy)


def use_torch_varlen(policy: PreTrainedModel) -> None:
    """Let a model's layers call `torch_varlen`, on packed rows."""
    AttentionInterface.register(TORCH_VARLEN, _of_model)
    policy.config._attn_implementation = TORCH_VARLEN  # the setter of transformers looks for flash-attn


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float | None = None
) -> Tensor:
    """torch's own kernel for sides [token, head, size], in the ways in which its versions want to be called."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scale} if scale is not None else {}
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        key, value = (_repeated(each, query.shape[1], dim=1) for each in (key, value))
    return varlen_attn(query, key, value, borders, borders, longest, longest, **options)


def _of_model(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention of a layer as transformers calls it; sides are [batch, head, time, size]."""
    scale, borders = options.get("scaling"), options.get("cu_seq_lens_q")
    if borders is None:  # a sequence a row with its padding on the right, which no token before it looks at
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return found.transpose(1, 2).contiguous(), None
    sides = (each[0].transpose(0, 1) for each in (query, key, value))
    return torch_varlen(*sides, borders, options["max_length_q"], scale).unsqueeze(0), None


def _flash_attn(packed: Packed) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = max(packed.lengths)
    return flash_attn_varlen_func(*packed.sides(), packed.borders, packed.borders, longest, longest, causal=True)


def _torch(packed: Packed) -> Tensor:
    return torch_varlen(*packed.sides(), packed.borders, max(packed.lengths))


def _one_by_one(packed: Packed) -> Tensor:
    parts = zip(*(side.split(packed.lengths) for side in packed.sides()), strict=True)
    return torch.cat([_sdpa(*(side.unsqueeze(0) for side in part))[0] for part in parts])


def _padded(packed: Packed) -> Tensor:
    """Padding and its removal are timed with the attention."""
    rows = (torch.nn.utils.rnn.pad_sequence(side.split(packed.lengths), batch_first=True) for side in packed.sides())
    return torch.cat([row[:length] for row, length in zip(_sdpa(*rows), packed.lengths, strict=True)])


def _masked(packed: Packed) -> Tensor:
    query, key, value = (side.transpose(0, 1).unsqueeze(0) for side in packed.sides())
    key, value = (_repeated(side, query.shape[1], dim=1) for side in (key, value))  # or the slowest kernel is taken
    return F.scaled_dot_product_attention(query, key, value, attn_mask=packed.mask)[0].transpose(0, 1)


ATTENTIONS: dict[str, Callable[[Packed], Tensor]] = {
    "flash-attn, varlen": _flash_attn,
    "torch varlen": _torch,
    "sdpa, one sequence after another": _one_by_one,
    "sdpa, padded rows": _padded,
    "sdpa, one row with a mask": _masked,
}


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in rows [row, time, head, size]."""
    sides = (side.transpose(1, 2) for side in (query, key, value))
    return F.scaled_dot_product_attention(*sides, is_causal=True, enable_gqa=True).transpose(1, 2)


def _repeated(side: Tensor, heads: int, dim: int) -> Tensor:
    """Keys or values with a head for each of the queries'."""
    return side.repeat_interleave(heads // side.shape[dim], dim)


def _measure(context: Context, name: str) -> list[Row]:
    _need_kernel(context, name)
    attention = ATTENTIONS[name]
    dtype = torch.bfloat16 if context.is_gpu else torch.float32
    heads, kv_heads, size = context.of_scale((16, 8, 128), (16, 8, 128), (4, 2, 32))
    lengths = context.of_scale((6016, 4416, 3616, 2336), (3008, 2208, 1808, 1168), (40, 24))
    error = _error(attention, _random(context, CHECKED, (heads, kv_heads, size), dtype))
    packed = _random(context, lengths, (heads, kv_heads, size), dtype)
    upstream = torch.randn_like(packed.query)

    def both_passes() -> None:
        torch.autograd.grad(attention(packed), packed.sides(), upstream)

    with torch.no_grad():
        forward_s = roofs.seconds_of(lambda: attention(packed), context.device)
    both_s = roofs.seconds_of(both_passes, context.device)
    flops = 3 * 2 * heads * size * sum(length**2 for length in lengths) / both_s
    row: dict[str, float | str] = {"tokens": sum(lengths), "forward_s": forward_s, "both_passes_s": both_s}
    row |= {"flops_per_s": flops, "of_matmul_roof_frac": flops / matmul_roof(context, dtype), "error": error}
    return [row | {"kernel": _backend(name, packed)}]


def _need_kernel(context: Context, name: str) -> None:
    """Skip where the kernel is missing."""
    if "varlen" in name:
        need_gpu(context)
    if name.startswith("flash-attn"):
        need("flash_attn")
    if name == "torch varlen" and (reason := _why_no_torch_varlen()):
        raise Skip(reason)


def _why_no_torch_varlen() -> str:
    found = importlib.util.find_spec("torch.nn.attention.varlen")
    return "" if found else f"torch {torch.__version__} has no torch.nn.attention.varlen"


def _random(context: Context, lengths: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype) -> Packed:
    generator = torch.Generator(context.device).manual_seed(context.seed)
    heads, kv_heads, size = shape

    def side(count: int) -> Tensor:
        made = torch.empty(sum(lengths), count, size, device=context.device).normal_(generator=generator)
        return made.to(dtype).requires_grad_()

    return Packed(side(heads), side(kv_heads), side(kv_heads), tuple(lengths))


def _error(attention: Callable[[Packed], Tensor], packed: Packed) -> float:
    """The largest of those of the output and the three gradients against float64 on the CPU.

    Raises:
        Wrong: it is larger than the precision allows.
    """
    exact = Packed(*(each.detach().cpu().double().requires_grad_() for each in packed.sides()), packed.lengths)
    upstream = torch.randn_like(packed.query)
    errors = {}
    found, right = attention(packed), _one_by_one(exact)
    errors["the output"] = relative_error(found, right)
    gradients = torch.autograd.grad(found, packed.sides(), upstream)
    rights = torch.autograd.grad(right, exact.sides(), upstream.cpu().double())
    for name, one, other in zip(("query", "key", "value"), gradients, rights, strict=True):
        errors[f"the gradient of the {name}"] = relative_error(one, other)
    return max(within(what, error, BOUND[packed.query.dtype]) for what, error in errors.items())


def _backend(name: str, packed: Packed) -> str:
    """Which kernel torch picks for sdpa at these shapes."""
    if not name.startswith("sdpa"):
        return name
    rows = [side[: packed.lengths[0]].transpose(0, 1).unsqueeze(0) for side in packed.sides()]
    mask, options = None, {"is_causal": True, "enable_gqa": True}
    if "mask" in name:
        heads, time = rows[0].shape[1:3]
        rows = [rows[0], *(_repeated(side, heads, dim=1) for side in rows[1:])]
        mask, options = torch.ones(time, time, dtype=torch.bool, device=rows[0].device).tril(), {}
    return SDPBackend(torch._fused_sdp_choice(*rows, attn_mask=mask, **options)).name.lower()
