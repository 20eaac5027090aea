"""One synthetic step of any preset, up to the learner and through the loss, on a causal model small enough for float64.

What a step is made of is real: routing, teacher requests, scoring pass, token weights, denominators, packing and loss.
Made up are the completions, the model, and the teacher, which is another such model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from logits_loss import only
from torch import Tensor, nn

from trace_rl import packing
from trace_rl.batch import (
    NOT_THE_POLICY,
    AnnotatedRollout,
    GradedRollout,
    Prompt,
    Rollout,
    RoutedRollout,
    Span,
    TeacherRequest,
    TeacherRows,
    TrainingBatch,
    TrainingSequence,
)
from trace_rl.config.algorithm import Route
from trace_rl.config.run import RunConfig
from trace_rl.flops import TeacherCost
from trace_rl.head_loss import DEFAULT_TILE_BYTES, LossParts, Projection, head_logprobs, head_loss
from trace_rl.loop import _rank_and_weigh
from trace_rl.objective import LossRows, Objective, objective_of
from trace_rl.overlays import load_config
from trace_rl.packing import MicroBatch, pack
from trace_rl.prompts import PromptEncoder
from trace_rl.routing import route_rollouts
from trace_rl.selectors import Selector, Top
from trace_rl.teacher_scoring import TeacherScoring
from trace_rl.token_layout import Layout, Padded
from trace_rl.workers.batch_runner import BatchRunner
from trace_rl.workers.ranks import Ranks

METHODS = Path(__file__).parent.parent / "configs" / "methods"
PRESETS = sorted(file.stem for file in METHODS.glob("*.yaml"))
VOCAB = 24

# By prompt: reward, number of tokens, spans of its completions. A completion of 16 tokens is truncated.
GROUPS: dict[str, list[tuple[float, int, list[tuple[str, int, int]]]]] = {
    "mixed": [
        (1.0, 9, [("key", 2, 5)]),
        (0.0, 7, [("error", 3, 5)]),
        (1.0, 6, []),
        (0.0, 16, []),
    ],
    "right": [(1.0, 8, [("key", 0, 2)]), (1.0, 5, []), (1.0, 1, [])],
    "whole": [(1.0, 6, [("key", 0, 6)]), (0.0, 9, [("error", 6, 9), ("error", 0, 2)])],
    "wrong": [(0.0, 8, [("error", 4, 6)]), (0.0, 5, [("error", 0, 5)]), (0.0, 1, [])],
}
MAX_TOKENS = 16
PADDED = Padded()


class Tokenizer:
    """A token per character, and one for thinking."""

    def apply_chat_template(self, conversation: Sequence[dict[str, str]], **kwargs: Any) -> list[int]:
        ids = [2 + ord(character) % (VOCAB - 2) for character in conversation[-1]["content"]]
        return [*ids, 1] if kwargs.get("enable_thinking") else ids


class TinyModel(nn.Module):
    """A causal language model in float64: each state mixes a token with the mean of all up to it."""

    def __init__(self, seed: int, vocab: int = VOCAB, hidden: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"embedding": (VOCAB, hidden), "mixing": (2 * hidden, hidden), "head": (vocab, hidden)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64)))

    def states(self, input_ids: Tensor) -> Tensor:
        own = self.embedding[input_ids]
        mean = own.cumsum(-2) / torch.arange(1, input_ids.shape[-1] + 1).unsqueeze(-1)
        return torch.tanh(torch.cat([own, mean], -1) @ self.mixing)

    def projection(self, packed: MicroBatch) -> Projection:
        grid = packed.grid
        rows = grid.input_ids.split(list(grid.runs), dim=1) if grid.runs else [grid.input_ids]
        states = torch.cat([self.states(row).flatten(0, 1) for row in rows])
        return Projection(states[packed.row_index], self.head)


class RoundedModel(TinyModel):
    """Its states are float32 numbers, so that nothing is lost when they are shipped as a teacher's."""

    def states(self, input_ids: Tensor) -> Tensor:
        exact = super().states(input_ids)
        return exact + (exact.float().double() - exact).detach()


class ModelTeacher:
    """Scores requests with a model, as the teacher's actor does."""

    def __init__(self, model: TinyModel) -> None:
        self._model = model

    def refresh(self, step: int) -> bool:
        return False

    @torch.no_grad()
    def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherRows]:
        return [self._rows(request) for request in requests]

    def _rows(self, request: TeacherRequest) -> TeacherRows:
        ids = torch.tensor([request.teacher_prompt_token_ids + request.token_ids])
        predicting = packing.predicting_positions(len(request.teacher_prompt_token_ids), request.positions)
        states = self._model.states(ids)[0, predicting]
        logprobs = (states @ self._model.head.T / request.temperature).log_softmax(-1)
        targets = torch.tensor([request.token_ids[position] for position in request.positions])
        found = {
            "states": states.float(),
            "logprobs": logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).float(),
            "entropy": -(logprobs.exp() * logprobs).sum(-1).float(),
        }
        rows = {name: (value if name in request.outputs else value[:0]).numpy() for name, value in found.items()}
        return TeacherRows(
            request.key, request.view, request.positions, rows["states"], rows["logprobs"], rows["entropy"]
        )


POLICY, OLD_POLICY, TEACHER = TinyModel(1), TinyModel(1), TinyModel(2)
with torch.no_grad():
    # one or two optimizer steps ago: ratios on both sides of every clip range
    for _parameter in OLD_POLICY.parameters():
        _parameter += 0.1 * torch.randn(
            _parameter.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
        )


@dataclass(frozen=True)
class Case:
    """One step of a preset up to the learner."""

    config: RunConfig
    routed: Sequence[RoutedRollout]
    batch: TrainingBatch
    objective: Objective
    head: Tensor
    """The teacher's."""

    @property
    def sequences(self) -> tuple[TrainingSequence, ...]:
        return self.batch.sequences


Change = Callable[[RunConfig], RunConfig]
Edit = Callable[[list[AnnotatedRollout]], list[AnnotatedRollout]]


def preset_config(preset: str, *overrides: str) -> RunConfig:
    """A preset on a minimal base; top-k supports are made smaller than the vocabulary."""
    file = METHODS / f"{preset}.yaml"
    text = file.read_text()
    given = [
        "model.path=some/model",
        "model.dtype=float32",
        "data.path=some.jsonl",
        "sampling.prompts_per_step=4",
        "sampling.max_prompt_tokens=8",
        f"sampling.max_response_tokens={MAX_TOKENS}",
        "learner.max_tokens_per_micro_batch=40",
    ]
    if "type: external" in text:
        given.append("teacher.weights.path=some/teacher")
    return load_config([file], [*given, *overrides])


def with_routes(config: RunConfig, change: Callable[[Route], Route | None]) -> RunConfig:
    """The configuration with every route changed, or left out where `change` gives None."""
    routes = {name: new for name, route in config.algorithm.routes.items() if (new := change(route)) is not None}
    return config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"routes": routes})})


def small_supports(config: RunConfig) -> RunConfig:
    def change(route: Route) -> Route:
        support = getattr(route.action, "support", None)
        if support is None or support.type != "topk":
            return route
        smaller = route.action.model_copy(update={"support": support.model_copy(update={"k": 5})})
        return route.model_copy(update={"action": smaller})

    return with_routes(config, change)


def encoder_of(config: RunConfig) -> PromptEncoder:
    return PromptEncoder(Tokenizer(), "", config.model.chat_template_kwargs, config.teacher.chat_template_kwargs)


def annotated_rollouts(config: RunConfig, step: int) -> list[AnnotatedRollout]:
    """The completions of GROUPS; those of another sampler have no log-probs."""
    random = np.random.default_rng(5)
    source = config.sampling.source
    elsewhere = set() if source == "policy" else set(GROUPS if config.sampling.off_policy_frac == 1 else ["mixed"])
    found = []
    for name, completions in GROUPS.items():
        prompt = Prompt(name, f"{name}?", "42", solution=f"{name} is 42")
        ids = encoder_of(config).student_ids(prompt)
        for sample, (reward, time, spans) in enumerate(completions):
            tokens, logprobs = random.integers(2, VOCAB, time).tolist(), -4 * random.random(time).astype(np.float32)
            is_policy = name not in elsewhere
            rollout = Rollout(
                prompt,
                sample,
                ids,
                tuple(tokens),
                logprobs if is_policy else np.full(time, np.nan, dtype=np.float32),
                "length" if time == MAX_TOKENS else "stop",
                np.full(time, step if is_policy else NOT_THE_POLICY),
                f"sample {sample} says 42",
            )
            feedback, reflection = ("", "") if reward else ("Not 42.", "A case is missing.")
            graded = GradedRollout(rollout, reward, "graded", feedback)
            marks = tuple(Span(start, end, kind, f"{kind}_type") for kind, start, end in spans)
            found.append(AnnotatedRollout(graded, marks, "annotated", reflection=reflection if spans else ""))
    return found


def make_case(
    preset: str,
    step: int = 0,
    change: Change = lambda config: config,
    edit: Edit = lambda rollouts: rollouts,
    policy: TinyModel = POLICY,
    teacher: TinyModel = TEACHER,
) -> Case:
    """Run the stages between the annotator and the learner, as the loop does."""
    config = change(small_supports(preset_config(preset)))
    objective = objective_of(config.algorithm, config.sampling.temperature)
    runner = BatchRunner(
        lambda packed, read: read(policy.projection(packed), packed),  # type: ignore[arg-type]
        config.learner,
        objective,
        Ranks(0, 1),
        PADDED,
        torch.device("cpu"),
    )
    runner.set_teacher_head(teacher.head.detach())
    routed, batch = stages(config, step, edit(annotated_rollouts(config, step)), teacher, runner)
    return Case(config, routed, batch, objective, teacher.head.detach())


def stages(
    config: RunConfig, step: int, annotated: list[AnnotatedRollout], teacher: TinyModel, learner: Any
) -> tuple[Sequence[RoutedRollout], TrainingBatch]:
    """What the loop makes of annotated completions before the learner trains on them."""
    roles: Any = SimpleNamespace(
        encoder=encoder_of(config), teacher=ModelTeacher(teacher), teacher_cost=TeacherCost(), learner=learner
    )
    candidates = route_rollouts(annotated, config, step)
    with TeacherScoring(config, roles, step) as scoring:
        evidence, _ = scoring.finish(candidates)
    return _rank_and_weigh(config, roles, candidates, evidence, step)


HeadInputs = tuple[Projection, LossRows, Objective, Projection, Tensor | None]


def head_inputs(
    case: Case, packed: MicroBatch, policy: TinyModel, old: TinyModel | None, rows: LossRows | None = None
) -> HeadInputs:
    """What the loss of a micro-batch is computed from, in float64 and in the order of `head_loss`."""
    exact, hidden = (rows or packed.rows).to(torch.float64), packed.teacher_hidden.double()
    before = None
    if old is not None:
        before = head_logprobs(old.projection(packed), exact.targets, case.objective.sampling_temperature)
    return policy.projection(packed), exact, case.objective, Projection(hidden, case.head), before


def parts_of(
    case: Case,
    packed: MicroBatch,
    policy: TinyModel,
    old: TinyModel | None,
    rows: LossRows | None = None,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> LossParts:
    """The loss of a micro-batch in float64."""
    return head_loss(*head_inputs(case, packed, policy, old, rows), tile_bytes)[0]


def evaluate(
    case: Case,
    split: Sequence[Sequence[int]],
    old: TinyModel | None = None,
    policy: TinyModel = POLICY,
    part: str = "total",
    layout: Layout = PADDED,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> tuple[float, Tensor]:
    """Loss and flat gradient, accumulated over micro-batches of the case's sequences."""
    policy.zero_grad()
    loss = 0.0
    for indices in split:
        packed = pack([case.sequences[index] for index in indices], layout)
        rows = packed.rows if part == "total" else only(packed.rows, part)
        value = parts_of(case, packed, policy, old, rows, tile_bytes).total
        value.backward()
        loss += value.item()
    zeros = (torch.zeros_like(parameter) for parameter in policy.parameters())
    gradients = [
        zero if parameter.grad is None else parameter.grad.clone()
        for parameter, zero in zip(policy.parameters(), zeros, strict=True)
    ]
    return loss, torch.cat([gradient.flatten() for gradient in gradients])


def whole(case: Case) -> list[list[int]]:
    """All sequences in one micro-batch."""
    return [list(range(len(case.sequences)))]


def every_token_routed(config: RunConfig) -> RunConfig:
    """Routes take every token of every completion, but for the ranked ones."""

    def change(route: Route) -> Route:
        is_ranked = isinstance(route.selector.tokens, Top)
        return route if is_ranked else route.model_copy(update={"selector": Selector.model_validate({"tokens": "all"})})

    return with_routes(config, change)


def up_to_two_versions_late(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"scheduling": config.scheduling.model_copy(update={"max_staleness": 2})})


def of_older_weights(rollouts: list[AnnotatedRollout]) -> list[AnnotatedRollout]:
    """The policy's completions as if two syncs had come while they were written: after 3 and after 6 tokens.

    One in three was written before the first of them, one in three after the last.
    """
    found = []
    for number, item in enumerate(rollouts):
        rollout = item.graded.rollout
        age = 2 - np.minimum(np.arange(len(rollout.token_ids)) // 3, 2)
        age = {0: np.full_like(age, 2), 1: np.zeros_like(age)}.get(number % 3, age)
        versions = rollout.token_versions
        older = replace(rollout, token_versions=np.where(versions == NOT_THE_POLICY, versions, versions - age))
        found.append(replace(item, graded=replace(item.graded, rollout=older)))
    return found


def without_spans(rollouts: list[AnnotatedRollout]) -> list[AnnotatedRollout]:
    return [replace(item, spans=()) for item in rollouts]


def one_token_each(rollouts: list[AnnotatedRollout]) -> list[AnnotatedRollout]:
    """Every completion ends after its first token, which is all of its span where it had one."""
    found = []
    for item in rollouts:
        rollout = item.graded.rollout
        cut = replace(
            rollout,
            token_ids=rollout.token_ids[:1],
            rollout_logprobs=rollout.rollout_logprobs[:1],
            token_versions=rollout.token_versions[:1],
        )
        spans = tuple(replace(span, start=0, end=1) for span in item.spans[:1])
        found.append(replace(item, graded=replace(item.graded, rollout=cut), spans=spans))
    return found


@torch.no_grad()
def on_policy(item: AnnotatedRollout, policy: TinyModel, temperature: float) -> AnnotatedRollout:
    """The completion with the log-probs that this policy gives it."""
    rollout = item.graded.rollout
    ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
    states = policy.states(ids)[0, len(rollout.prompt_token_ids) - 1 : -1]
    found = head_logprobs(Projection(states, policy.head), torch.tensor(rollout.token_ids), temperature).float().numpy()
    known = np.where(np.isnan(rollout.rollout_logprobs), np.nan, found)
    return replace(item, graded=replace(item.graded, rollout=replace(rollout, rollout_logprobs=known)))
