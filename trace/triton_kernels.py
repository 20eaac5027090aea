"""Elementwise work on tiles of logits in Triton, for CUDA: each kernel reads its rows as often as the mathematics asks.

`token_rows` reads a tile once; `policy_gradient` reads it once and writes the gradient in the precision of the products
that follow; a divergence reads the policy's and the teacher's rows three times (normalisers, sums, gradient) and keeps
nothing beside them. Divergences over the whole vocabulary are here; every other action, a plugin's too, goes through
`trace_rl.row_kernels.TorchKernels`. Must not know hidden states, heads or how rows are chosen.

Formulas: with terms t_u of a divergence over outcomes u, g_u = d t_u / d log p_u where the clip left the term alone,
and d / d z_v = g_v - p_v sum_u g_u. Forward: t = q log(q / p), g = -q. Reverse: t = p log(p / q), g = t + p.
Jensen-Shannon with m = beta q + (1 - beta) p: g = (1 - beta) p log(p / m), t = beta q log(q / m) + g.

Numbers are float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from trace_rl.actions import RowAction
from trace_rl.divergences import Full
from trace_rl.row_actions import Fkl, Jsd, Rkl
from trace_rl.row_kernels import RouteEntries, RouteRows, TokenRows, TorchKernels

_FORWARD, _REVERSE, _JENSEN_SHANNON = range(3)
_CLIPS = {"none": 0, "vocab_clamp": 1, "token_clamp": 2, "token_rescale": 3}
_MAX_BLOCK = 4096


@triton.jit
def _token_rows_kernel(
    logits, row_stride, targets, logprobs, entropy, normaliser, vocab, inverse_temperature, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * row_stride
    highest = -float("inf")
    total = 0.0
    weighted = 0.0  # sum of exp(z - highest) (z - highest)
    for offset in range(0, vocab, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        is_inside = column < vocab
        z = tl.load(start + column, mask=is_inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        higher = tl.maximum(highest, tl.max(z, 0))
        shift = tl.where(highest == -float("inf"), 0.0, highest - higher)
        decay = tl.where(highest == -float("inf"), 0.0, tl.exp(shift))
        distance = tl.where(is_inside, z - higher, 0.0)
        mass = tl.where(is_inside, tl.exp(distance), 0.0)
        weighted = decay * (weighted + shift * total) + tl.sum(mass * distance, 0)
        total = decay * total + tl.sum(mass, 0)
        highest = higher
    log_total = tl.log(total)
    target = tl.load(targets + row)
    own = tl.load(start + target).to(tl.float32) * inverse_temperature
    tl.store(logprobs + row, own - highest - log_total)
    tl.store(entropy + row, log_total - weighted / total)
    tl.store(normaliser + row, highest + log_total)


@triton.jit
def _policy_gradient_kernel(
    logits,
    row_stride,
    targets,
    normaliser,
    slope,
    gradient,
    gradient_stride,
    vocab,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < vocab
    z = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=is_inside, other=0.0).to(tl.float32)
    p = tl.exp(z * inverse_temperature - tl.load(normaliser + row))
    hit = (column == tl.load(targets + row)).to(tl.float32)
    value = tl.load(slope + row) * inverse_temperature * (hit - p)
    place = gradient + row.to(tl.int64) * gradient_stride + column
    tl.store(place, value.to(gradient.dtype.element_ty), mask=is_inside)


@triton.jit
def _terms(log_p, log_q, log_beta, log_rest, beta, KIND: tl.constexpr):
    """Term and g of every outcome."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if KIND == 0:
        term = q * (log_q - log_p)
        slope = -q
    elif KIND == 1:
        term = p * (log_p - log_q)
        slope = term + p
    else:
        first = log_q + log_beta
        second = log_p + log_rest
        higher = tl.maximum(first, second)
        mixture = higher + tl.log(tl.exp(first - higher) + tl.exp(second - higher))
        slope = (1 - beta) * p * (log_p - mixture)
        term = beta * q * (log_q - mixture) + slope
    return term, slope, p, q


@triton.jit
def _divergence_kernel(
    policy,
    policy_stride,
    index,
    teacher,
    teacher_stride,
    into,
    into_stride,
    targets,
    factors,
    loss,
    unclipped,
    clipped,
    mass,
    teacher_entropy,
    teacher_advantage,
    vocab,
    inverse_temperature,
    threshold,
    log_beta,
    log_rest,
    beta,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    own = policy + tl.load(index + row) * policy_stride
    other = teacher + row.to(tl.int64) * teacher_stride
    place = into + row.to(tl.int64) * into_stride

    p_highest = -float("inf")
    q_highest = -float("inf")
    p_total = 0.0
    q_total = 0.0
    for offset in range(0, vocab, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        is_inside = column < vocab
        z = tl.load(own + column, mask=is_inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        w = tl.load(other + column, mask=is_inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        p_higher = tl.maximum(p_highest, tl.max(z, 0))
        q_higher = tl.maximum(q_highest, tl.max(w, 0))
        p_decay = tl.where(p_highest == -float("inf"), 0.0, tl.exp(p_highest - p_higher))
        q_decay = tl.where(q_highest == -float("inf"), 0.0, tl.exp(q_highest - q_higher))
        p_total = p_total * p_decay + tl.sum(tl.exp(z - p_higher), 0)
        q_total = q_total * q_decay + tl.sum(tl.exp(w - q_higher), 0)
        p_highest = p_higher
        q_highest = q_higher
    p_normaliser = p_highest + tl.log(p_total)
    q_normaliser = q_highest + tl.log(q_total)

    value = 0.0
    kept = 0.0
    slope_sum = 0.0
    clipped_mass = 0.0
    clipped_terms = 0.0
    disorder = 0.0
    for offset in range(0, vocab, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        is_inside = column < vocab
        z = tl.load(own + column, mask=is_inside, other=0.0).to(tl.float32) * inverse_temperature
        w = tl.load(other + column, mask=is_inside, other=0.0).to(tl.float32) * inverse_temperature
        log_q = w - q_normaliser
        term, slope, p, q = _terms(z - p_normaliser, log_q, log_beta, log_rest, beta, KIND)
        term = tl.where(is_inside, term, 0.0)
        slope = tl.where(is_inside, slope, 0.0)
        value += tl.sum(term, 0)
        disorder -= tl.sum(tl.where(is_inside, q * log_q, 0.0), 0)
        if CLIP == 1:
            is_above = is_inside & (term > threshold)
            kept += tl.sum(tl.where(is_above, threshold, term), 0)
            slope_sum += tl.sum(tl.where(is_above, 0.0, slope), 0)
            clipped_mass += tl.sum(tl.where(is_above, q, 0.0), 0)
            clipped_terms += tl.sum(is_above.to(tl.float32), 0)
        else:
            slope_sum += tl.sum(slope, 0)

    factor = tl.load(factors + row)
    scale = 1.0
    bounded = value
    if CLIP == 1:
        bounded = kept
    if CLIP == 2:
        is_over = tl.where(value > threshold, 1.0, 0.0)
        bounded = tl.minimum(value, threshold)
        scale = 1.0 - is_over
        clipped_mass = is_over
        clipped_terms = is_over
    if CLIP == 3:
        is_over = tl.where(value > threshold, 1.0, 0.0)
        scale = tl.where(value > threshold, threshold / value, 1.0)
        bounded = value * scale
        clipped_mass = is_over
        clipped_terms = is_over

    # before the teacher's logits are overwritten
    target = tl.load(targets + row)
    own_logprob = tl.load(own + target).to(tl.float32) * inverse_temperature - p_normaliser
    other_logprob = tl.load(other + target).to(tl.float32) * inverse_temperature - q_normaliser
    tl.store(teacher_advantage + row, other_logprob - own_logprob)
    tl.store(teacher_entropy + row, disorder)
    tl.store(loss + row, bounded)
    tl.store(unclipped + row, value)
    tl.store(clipped + row, clipped_terms)
    tl.store(mass + row, clipped_mass)
    tl.debug_barrier()

    outer = factor * scale * inverse_temperature
    for offset in range(0, vocab, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        is_inside = column < vocab
        z = tl.load(own + column, mask=is_inside, other=0.0).to(tl.float32) * inverse_temperature
        w = tl.load(other + column, mask=is_inside, other=0.0).to(tl.float32) * inverse_temperature
        term, slope, p, q = _terms(z - p_normaliser, w - q_normaliser, log_beta, log_rest, beta, KIND)
        if CLIP == 1:
            slope = tl.where(term > threshold, 0.0, slope)
        tl.store(place + column, outer * (slope - p * slope_sum), mask=is_inside)


class TritonKernels:
    """`trace_rl.row_kernels.RowKernels` in Triton; tiles are contiguous along the vocabulary."""

    def token_rows(
        self, logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"], temperature: float
    ) -> TokenRows:
        rows, vocab = logits.shape
        found = TokenRows(*(logits.new_empty(rows, dtype=torch.float32) for _ in range(3)))
        if rows:
            _token_rows_kernel[(rows,)](
                logits,
                logits.stride(0),
                targets,
                found.logprobs,
                found.entropy,
                found.normaliser,
                vocab,
                1 / temperature,
                BLOCK=_block(vocab),
                num_warps=8,
            )
        return found

    def policy_gradient(
        self,
        logits: Float[Tensor, "row vocab"],
        targets: Int[Tensor, " row"],
        temperature: float,
        normaliser: Float[Tensor, " row"],
        slope: Float[Tensor, " row"],
        dtype: torch.dtype,
    ) -> Float[Tensor, "row vocab"]:
        rows, vocab = logits.shape
        gradient = logits if logits.dtype == dtype else torch.empty_like(logits, dtype=dtype)
        block = _block(vocab)
        if rows:
            _policy_gradient_kernel[(rows, triton.cdiv(vocab, block))](
                logits,
                logits.stride(0),
                targets,
                normaliser,
                slope,
                gradient,
                gradient.stride(0),
                vocab,
                1 / temperature,
                BLOCK=block,
                num_warps=8,
            )
        return gradient

    def route_gradient(
        self,
        action: RowAction,
        logits: Float[Tensor, "row vocab"],
        entries: RouteEntries,
        into: Float[Tensor, "entry vocab"],
    ) -> RouteRows:
        if not _has_kernel(action):
            return TorchKernels().route_gradient(action, logits, entries, into)
        assert isinstance(action, Fkl | Rkl | Jsd)
        kind, beta = _kind(action)
        importance = action.importance(entries.ratio).float()
        count, vocab = into.shape
        names = (
            "loss",
            "unclipped",
            "num_clipped_terms",
            "clipped_teacher_mass",
            "teacher_entropy",
            "teacher_advantage",
        )
        found = {name: into.new_empty(count, dtype=torch.float32) for name in names}
        _divergence_kernel[(count,)](
            logits,
            logits.stride(0),
            entries.index,
            entries.teacher_logits,
            entries.teacher_logits.stride(0),
            into,
            into.stride(0),
            entries.targets,
            entries.weights.float() * importance,
            *found.values(),
            vocab,
            1 / entries.temperature,
            action.clip.threshold,
            math.log(beta) if 0 < beta < 1 else 0.0,
            math.log1p(-beta) if 0 < beta < 1 else 0.0,
            beta,
            KIND=kind,
            CLIP=_CLIPS[action.clip.mode],
            BLOCK=_block(vocab),
            num_warps=8,
        )
        found["loss"] *= importance
        return RouteRows(**found)


def _has_kernel(action: RowAction) -> bool:
    """Whether the action is exactly one of the divergences above; a subclass may mean something else."""
    return type(action) in (Fkl, Rkl, Jsd) and isinstance(action.support, Full)  # type: ignore[attr-defined]


def _kind(action: Fkl | Rkl | Jsd) -> tuple[int, float]:
    """Which formula, and the weight of the teacher in the mixture."""
    if isinstance(action, Fkl) or (isinstance(action, Jsd) and action.beta == 0):
        return _FORWARD, 0.0
    if isinstance(action, Rkl) or action.beta == 1:
        return _REVERSE, 0.0
    return _JENSEN_SHANNON, action.beta


def _block(vocab: int) -> int:
    return min(_MAX_BLOCK, int(triton.next_power_of_2(vocab)))
