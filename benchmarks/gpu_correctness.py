"""Whether the GPU computes what the CPU computes in float64: the head loss of every action, and a learner's gradients.

The loss: the fused head on the GPU in float32 and bfloat16 (the Triton kernels), and in float64 (the torch operations),
against float64 on the CPU, whose agreement with automatic differentiation the tests show; without routed tokens, with
one span, and with all tokens routed. The gradients: a small random model over padded and over packed rows, against
plain torch in float64, one sequence at a time, without any of our losses; and with a prompt that lies there once.

Errors are relative to the Euclidean norm of what is right.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import head_loss as head_loss_benchmark
import learner_step
import peers
import torch
from gpu_attention import let_pack
from gpu_cases import Case, Context, Row, Skip, Wrong, relative_error, within
from gpu_models import TINY, random_policy
from peers import Problem, Shape
from torch import Tensor
from transformers import PreTrainedModel

from trace_rl.actions import RowAction
from trace_rl.divergences import KlClip, Sampled, TopK
from trace_rl.head_loss import Projection, head_logprobs, head_loss
from trace_rl.objective import Objective, RouteLoss, objective_of
from trace_rl.packing import MicroBatch, pack
from trace_rl.policy_gradients import Clipped, RolloutCorrection
from trace_rl.row_actions import Fkl, Jsd, Nll, Rkl
from trace_rl.token_layout import Layout, Packed, Padded, SharedPrompts
from trace_rl.workers import shared_attention
from trace_rl.workers.policy_model import RowModel, is_flash

CLIPS = (
    KlClip(mode="none"),
    KlClip(mode="vocab_clamp", threshold=0.01),
    KlClip(mode="token_clamp", threshold=1.0),
    KlClip(mode="token_rescale", threshold=1.0),
)
ACTIONS: tuple[RowAction, ...] = (
    *(Fkl(clip=clip) for clip in CLIPS),
    *(Rkl(clip=clip, importance_cap=1.1) for clip in CLIPS),
    *(Jsd(clip=clip, beta=0.3) for clip in CLIPS),
    *(Jsd(clip=CLIPS[0], beta=beta) for beta in (0.0, 1.0)),
    *(Fkl(support=support) for support in (TopK(k=7), Sampled())),
    *(Rkl(support=support) for support in (TopK(k=7, by="union"), Sampled())),
    Nll(),
)
SPANS = {"none": 0.0, "one span": 0.0, "all tokens": 1.0}
BOUNDS = head_loss_benchmark.BOUNDS | {"float64": 1e-10}
RATIO_NOISE = 0.15
"""Largest distance of the old log-probs, inside the range in which no ratio is clipped."""


def cases(context: Context) -> list[Case]:
    return [
        *(Case(f"head loss, {name}", partial(_head_losses, context, name)) for name in BOUNDS),
        *(
            Case(f"learner gradients, {name}", partial(_learner_gradients, context, name))
            for name in learner_step.BOUND
        ),
    ]


def _head_losses(context: Context, precision: str) -> list[Row]:
    return [_all_actions(context, getattr(torch, precision), BOUNDS[precision], spans) for spans in SPANS]


def _all_actions(context: Context, dtype: torch.dtype, bound: float, spans: str) -> Row:
    """The largest errors over all actions."""
    shape = context.of_scale(Shape(96, 64, 5003, 24), Shape(96, 64, 5003, 24), Shape(24, 16, 203, 8))
    share = peers.SPAN_TOKENS / shape.tokens if spans == "one span" else SPANS[spans]
    rounded = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # both sides get the same numbers
    problem = peers.make_problem(shape, ("route",), share, rounded, "cpu", context.seed)
    exact, own = _moved(problem, "cpu", torch.float64), _moved(problem, context.device, dtype)
    logprobs = head_logprobs(Projection(exact.hidden, exact.head), exact.targets, 1.0)
    generator = torch.Generator().manual_seed(context.seed)
    old = logprobs + RATIO_NOISE * (2 * torch.rand(shape.tokens, generator=generator, dtype=torch.float64) - 1)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    largest: dict[str, float] = {}
    for action in ACTIONS:
        right, found = _evaluate(exact, action, old), _evaluate(own, action, old.to(context.device, precise))
        for name, value in right.items():
            what = f"{name} of {action.type} ({action}) in {str(dtype)[6:]} with {spans} routed"
            error = within(what, relative_error(found[name], value), bound)
            largest[name] = max(error, largest.get(name, 0.0))
    routed = sum(map(len, problem.routed.values()))
    return {"routed": spans, "routed_tokens": routed, "actions": len(ACTIONS), **largest, "allowed": bound}


def _evaluate(problem: Problem, action: RowAction, old_logprobs: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and metric sums of one action."""
    rows = peers.loss_rows(problem)
    if problem.hidden.dtype == torch.float64:
        rows = rows.to(torch.float64)
    objective = Objective(Clipped(), RolloutCorrection(), (RouteLoss("route", 0, action, 0.8, action),), 1.0)
    policy = Projection(problem.hidden, problem.head)
    teacher = Projection(problem.teacher_hidden[rows.route_row], problem.teacher_head)
    tile_bytes = len(problem.head) * 4 * 20  # several tiles, the last of which is not full
    loss, sums = head_loss(policy, rows, objective, teacher, old_logprobs, tile_bytes)
    hidden, head = torch.autograd.grad(loss.total, (problem.hidden, problem.head))
    told = torch.stack([sums["entropy"], sums["route/value"], sums["route/teacher_entropy"]])
    return {"loss": loss.total.detach(), "hidden_gradient": hidden, "head_gradient": head, "metrics": told}


def _moved(problem: Problem, device: str | torch.device, dtype: torch.dtype) -> Problem:
    """The problem elsewhere, as leaves of a graph of its own."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().to(device, dtype).requires_grad_()

    return replace(
        problem,
        hidden=leaf(problem.hidden),
        head=leaf(problem.head),
        teacher_hidden=problem.teacher_hidden.to(device, dtype),
        teacher_head=problem.teacher_head.to(device, dtype),
        targets=problem.targets.to(device),
        advantages=problem.advantages.to(device),
        routed={name: rows.to(device) for name, rows in problem.routed.items()},
    )


def _learner_gradients(context: Context, precision: str) -> list[Row]:
    """Errors of all gradients together, by layout."""
    dtype, bound = getattr(torch, precision), learner_step.BOUND[precision]
    made = random_policy(TINY, torch.float32, torch.device("cpu"), context.seed).to(dtype)
    policy = copy.deepcopy(made).to(context.device)
    let_pack(policy)
    if precision == "bfloat16" and not (context.is_gpu and is_flash(policy)):
        raise Skip("no attention here tells sequences in a packed row apart in bfloat16 without a mask")
    sharing = copy.deepcopy(made).to(context.device)
    sharing.set_attn_implementation("sdpa")
    if reason := shared_attention.prepare(sharing):
        raise Wrong(f"a random model in the shape of Qwen3 {reason}")
    preset = replace(
        learner_step.PRESETS["demo"], config=TINY, num_prompts=1, prompt_tokens=7, response_tokens=40, dtype=precision
    )
    batch = learner_step.make_batch(preset, 0.25, TINY["hidden_size"], TINY["vocab_size"], context.seed)
    generator = torch.Generator().manual_seed(context.seed)
    head = torch.randn(TINY["vocab_size"], TINY["hidden_size"], generator=generator).to(dtype)
    right = _flat(learner_step.exact_gradients(made.double(), head.double(), batch))
    rows: list[Row] = []
    objective = objective_of(learner_step.run_config(preset, Path("unused")).algorithm, 1.0)
    layouts: tuple[tuple[str, Layout, PreTrainedModel], ...] = (
        ("padded", Padded(), policy),
        ("packed", Packed(), policy),
        ("shared", SharedPrompts(), sharing),
    )
    for name, layout, each in layouts:
        micro_batch = pack(batch.sequences, layout).to(context.device)
        found = _flat(_gradients(RowModel(each), micro_batch, objective, head.to(context.device)))
        error = within(f"the gradient over {name} rows in {precision}", relative_error(found, right), bound)
        rows.append({"layout": name, "attention": each.config._attn_implementation, "error": error, "allowed": bound})
    return rows


def _gradients(model: RowModel, micro_batch: MicroBatch, objective: Objective, head: Tensor) -> list[Tensor]:
    """All gradients of the loss."""

    def loss(policy: Projection, packed: MicroBatch) -> Tensor:
        return head_loss(policy, packed.rows, objective, Projection(packed.teacher_hidden, head))[0].total

    model.zero_grad()
    model(micro_batch, loss).backward()
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def _flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])
