"""One loss in several implementations: ours, plain torch, and compositions of the parts that peers offer.

    loss = 1/T sum_t -A[t] r[t]  +  1/T sum_{t routed} D_{direction(t)}(teacher, policy)[t],   r = pi / sg(pi)

over the whole vocabulary, with the entropy of every token beside it. No peer has that in one pass, so each composition
calls a peer's log-prob part on all tokens and its divergence part on the rows of one direction at a time. That is the
cheapest use of these parts; trainers call the divergence on all tokens, which is the figure at a share of 100 %.

Peers are optional: `why_not` says what is missing. Nothing of theirs is copied here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_rl.divergences import KlClip
from trace_rl.head_loss import Projection, head_loss
from trace_rl.objective import LossRows, Objective, RouteLoss
from trace_rl.policy_gradients import Clipped, RolloutCorrection
from trace_rl.row_actions import Fkl, Jsd, Rkl

DIRECTIONS = {"fkl": 0.0, "jsd": 0.5, "rkl": 1.0}
"""Weight of the teacher in the mixture, as in GKD; the ends stand for the two KLs."""
ACTIONS = {
    "fkl": Fkl(clip=KlClip(mode="none")),
    "rkl": Rkl(clip=KlClip(mode="none")),
    "jsd": Jsd(clip=KlClip(mode="none")),
}
SPAN_TOKENS = 8
SLICE_TOKENS = 256
"""Tokens that the float64 reference takes at once."""
TRL_VOCAB_CHUNK = 32768
"""The chunk that TRL's trainers pass to its log-prob function."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem."""

    tokens: int
    hidden: int
    vocab: int
    sequence: int
    """Tokens of each completion."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one evaluation; gradients go to `hidden` and `head`."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    """Of every token, so that every implementation can choose the rows that it needs."""
    teacher_head: Tensor
    targets: Tensor
    advantages: Tensor
    """One a sequence."""
    routed: dict[str, Tensor]
    """Tokens by direction, in order."""
    num_tokens: int
    """Denominator of both parts."""


def make_problem(
    shape: Shape, directions: tuple[str, ...], share: float, dtype: torch.dtype, device: str, seed: int
) -> Problem:
    """Random inputs whose logits have a standard deviation of 3; a share of the tokens lies in spans of 8."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, scale: float) -> Tensor:
        made = torch.empty(rows, shape.hidden, device=device)
        return made.normal_(generator=generator).mul_(scale).to(dtype)

    num_spans = shape.tokens // SPAN_TOKENS
    spans = torch.randperm(num_spans, generator=generator, device=device)[: round(share * num_spans)]
    within = torch.arange(SPAN_TOKENS, device=device)
    routed = {
        name: (spans[number :: len(directions)].sort().values[:, None] * SPAN_TOKENS + within).flatten()
        for number, name in enumerate(directions)
    }
    hidden, head = normal(shape.tokens, 1.0), normal(shape.vocab, 3 * shape.hidden**-0.5)
    return Problem(
        hidden=hidden.requires_grad_(),
        head=head.requires_grad_(),
        teacher_hidden=normal(shape.tokens, 0.3).add_(hidden.detach()),
        teacher_head=normal(shape.vocab, 0.3 * shape.hidden**-0.5).add_(head.detach()),
        targets=torch.randint(shape.vocab, (shape.tokens,), generator=generator, device=device),
        advantages=torch.randn(shape.tokens // shape.sequence, generator=generator, device=device),
        routed={name: rows for name, rows in routed.items() if len(rows)},
        num_tokens=shape.tokens,
    )


@dataclass(frozen=True)
class Contender:
    """An implementation of the loss."""

    name: str
    prepare: Callable[[Problem], Callable[[], Tensor]]
    """Returns the evaluation of the loss; what a training step would not repeat happens before."""
    package: str = "torch"
    """The distribution whose version belongs to the figures."""
    why_not: Callable[[], str] = lambda: ""
    """Why it cannot run here; empty where it can."""


def contenders(tile_bytes: int) -> list[Contender]:
    """All implementations; the first is what ours costs without any route."""
    return [
        Contender("ours, GRPO only", lambda problem: ours(replace(problem, routed={}), tile_bytes)),
        Contender("ours", lambda problem: ours(problem, tile_bytes)),
        Contender("naive torch", naive),
        Contender("naive torch, teacher on routed rows", lean),
        Contender("TRL kernels", trl, "trl", lambda: _import_error("trl.kernels.chunked_divergence")),
        Contender("Liger chunked losses", liger, "liger-kernel", lambda: _import_error("liger_kernel.chunked_loss")),
        Contender("verl fused linear + torch KL", verl, "verl", lambda: _error_of(_verl_functions)),
    ]


def ours(problem: Problem, tile_bytes: int) -> Callable[[], Tensor]:
    """`trace_rl.head_loss` with one route a direction."""
    rows = loss_rows(problem)
    routes = tuple(
        RouteLoss(name, number, ACTIONS[name], 1.0, ACTIONS[name]) for number, name in enumerate(problem.routed)
    )
    objective = Objective(Clipped(), RolloutCorrection(), routes, 1.0)
    policy = Projection(problem.hidden, problem.head)
    teacher = Projection(problem.teacher_hidden[rows.route_row], problem.teacher_head)
    return lambda: head_loss(policy, rows, objective, teacher, tile_bytes=tile_bytes)[0].total


def loss_rows(problem: Problem) -> LossRows:
    """The constants of a problem's tokens, with one route for each of its directions."""
    device, time = problem.hidden.device, len(problem.targets)
    constants = torch.full((time,), 1 / problem.num_tokens, device=device)
    tokens = list(problem.routed.values())
    empty = torch.zeros(0, dtype=torch.long, device=device)
    route_row = torch.cat([empty, *tokens])
    return LossRows(
        targets=problem.targets,
        sequence=torch.arange(time, device=device) // _sequence(problem),
        num_sequences=len(problem.advantages),
        advantages=problem.advantages.repeat_interleave(_sequence(problem)),
        rollout_logprobs=torch.full_like(constants, torch.nan),
        is_stale=torch.zeros_like(constants, dtype=torch.bool),
        pg_weight=constants,
        route_row=route_row,
        route_index=torch.cat([empty, *(torch.full_like(part, number) for number, part in enumerate(tokens))]),
        route_weight=constants[route_row],
        teacher_row=torch.arange(len(route_row), device=device),
    )


def naive(problem: Problem) -> Callable[[], Tensor]:
    """Full logits of both sides for all tokens, as SDPO and OPSD hold them; the divergence on routed rows."""
    everywhere = torch.arange(len(problem.targets), device=problem.targets.device)
    return lambda: _full_logits(problem, everywhere if problem.routed else everywhere[:0])


def lean(problem: Problem) -> Callable[[], Tensor]:
    """Full logits of the policy, and the teacher's for routed rows alone."""
    projected = torch.cat([problem.targets[:0], *problem.routed.values()]).sort().values
    return lambda: _full_logits(problem, projected)


def reference(problem: Problem) -> dict[str, Tensor]:
    """Loss and gradients in float64, a slice of whole sequences at a time."""
    exact = replace(
        problem,
        hidden=problem.hidden.detach().double().requires_grad_(),
        head=problem.head.detach().double().requires_grad_(),
        teacher_hidden=problem.teacher_hidden.double(),
        teacher_head=problem.teacher_head.double(),
        advantages=problem.advantages.double(),
    )
    total = exact.hidden.new_zeros(())
    length = _sequence(problem)
    step = max(1, SLICE_TOKENS // length) * length
    for start in range(0, len(problem.targets), step):
        loss = lean(_part(exact, start, start + step))()
        loss.backward()
        total += loss.detach()
    assert exact.hidden.grad is not None and exact.head.grad is not None
    return {"loss": total, "hidden": exact.hidden.grad, "head": exact.head.grad}


def trl(problem: Problem) -> Callable[[], Tensor]:
    """TRL's chunked log-prob and entropy on all tokens, and its chunked divergence by direction."""
    logprob_function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    divergence_function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss() -> Tensor:
        hidden, head = problem.hidden, problem.head
        logprobs, *_ = logprob_function.apply(
            hidden, head, None, problem.targets, 1.0, TRL_VOCAB_CHUNK, None, 1.0, ("entropy",)
        )
        total = _policy_part(problem, logprobs)
        for name, rows in problem.routed.items():
            teacher = problem.teacher_hidden[rows], problem.teacher_head, None
            divergence, _ = divergence_function.apply(hidden[rows], head, None, *teacher, DIRECTIONS[name])
            total = total + divergence.sum() / problem.num_tokens
        return total

    return loss


def liger(problem: Problem) -> Callable[[], Tensor]:
    """Liger's fused linear GRPO (which gives no entropy), and its fused linear JSD by direction."""
    losses = importlib.import_module("liger_kernel.chunked_loss")
    length = _sequence(problem)
    grpo = losses.LigerFusedLinearGRPOLoss(beta=0.0, epsilon_high=0.28, loss_type="bnpo", use_ref_model=False)
    divergences = {
        name: losses.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=DIRECTIONS[name])
        for name in problem.routed
    }
    targets = problem.targets.view(-1, length)
    mask = torch.ones_like(targets)

    def loss() -> Tensor:
        states = problem.hidden.view(*targets.shape, -1)
        total = grpo(states, problem.head, targets, mask, problem.advantages)[0]
        for name, rows in problem.routed.items():
            teacher = problem.teacher_hidden[rows], problem.teacher_head
            mean = divergences[name](problem.hidden[rows], problem.head, *teacher, problem.targets[rows])
            total = total + mean * (len(rows) / problem.num_tokens)
        return total

    return loss


def verl(problem: Problem) -> Callable[[], Tensor]:
    """verl's chunked log-prob and entropy on all tokens; its full-vocabulary KL is plain torch on logits."""
    fused = _verl_functions().FusedLinearForPPO()

    def loss() -> Tensor:
        logprobs, _ = fused(problem.hidden, problem.head, problem.targets)
        total = _policy_part(problem, logprobs)
        for name, rows in problem.routed.items():
            policy = F.log_softmax((problem.hidden[rows] @ problem.head.T).float(), -1)
            teacher = F.log_softmax((problem.teacher_hidden[rows] @ problem.teacher_head.T).float(), -1)
            total = total + _divergence(policy, teacher, name) / problem.num_tokens
        return total

    return loss


def _full_logits(problem: Problem, projected: Tensor) -> Tensor:
    """The loss by autograd, with the teacher's logits of the projected tokens."""
    logprobs = F.log_softmax(_precise(problem.hidden @ problem.head.T), -1)
    with torch.no_grad():
        _ = -(logprobs.exp() * logprobs).sum(-1)  # the entropy, which every implementation but Liger's reports
        teacher = F.log_softmax(_precise(problem.teacher_hidden[projected] @ problem.teacher_head.T), -1)
    total = _policy_part(problem, logprobs.gather(-1, problem.targets.unsqueeze(-1)).squeeze(-1))
    for name, rows in problem.routed.items():
        place = torch.searchsorted(projected, rows)
        total = total + _divergence(logprobs[rows], teacher[place], name) / problem.num_tokens
    return total


def _policy_part(problem: Problem, logprobs: Tensor) -> Tensor:
    advantages = problem.advantages.repeat_interleave(_sequence(problem))
    return -(torch.exp(logprobs - logprobs.detach()) * advantages).sum() / problem.num_tokens


def _divergence(policy: Tensor, teacher: Tensor, name: str) -> Tensor:
    """Sum over rows of the divergence between log-probs."""
    if name == "fkl":
        return F.kl_div(policy, teacher, reduction="sum", log_target=True)
    if name == "rkl":
        return F.kl_div(teacher, policy, reduction="sum", log_target=True)
    mixture = torch.logaddexp(policy, teacher) - torch.tensor(2.0).log()
    sides = (F.kl_div(mixture, side, reduction="sum", log_target=True) for side in (policy, teacher))
    return sum(sides, policy.new_zeros(())) / 2


def _part(problem: Problem, start: int, end: int) -> Problem:
    """The tokens [start, end), which are whole sequences; the denominators stay."""
    first, last = start // _sequence(problem), end // _sequence(problem)
    routed = {name: rows[(rows >= start) & (rows < end)] - start for name, rows in problem.routed.items()}
    return replace(
        problem,
        hidden=problem.hidden[start:end],
        teacher_hidden=problem.teacher_hidden[start:end],
        targets=problem.targets[start:end],
        advantages=problem.advantages[first:last],
        routed={name: rows for name, rows in routed.items() if len(rows)},
    )


def _sequence(problem: Problem) -> int:
    return len(problem.targets) // len(problem.advantages)


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _verl_functions() -> ModuleType:
    """The one file of verl that is needed; the package itself wants Ray and more at import."""
    package = importlib.util.find_spec("verl")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'verl'", name="verl")
    file = Path(package.submodule_search_locations[0]) / "utils/experimental/torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_error(name: str) -> str:
    return _error_of(lambda: importlib.import_module(name))


def _error_of(load: Callable[[], Any]) -> str:
    try:
        load()
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    except (ImportError, OSError) as error:
        return f"cannot be imported: {error}"
    return ""
