"""What one learner rank does with a batch: optimizer steps, scoring passes, and the geometry of the gradient.

Decides the order of things within a step: the same plan on every rank, old log-probs before the first of several
optimizer steps, a check of every loss on all ranks before its backward pass. The number of collectives depends on the
plan alone, never on what a rank's sequences hold. Must not know Ray, other roles, checkpoints or weight sync.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trace_rl.batch import TokenFigures, TokenStatistics, TrainingBatch, TrainingSequence
from trace_rl.config.learner import LearnerSettings
from trace_rl.errors import TrainingError
from trace_rl.head_figures import head_figures
from trace_rl.head_loss import Projection, head_logprobs, head_loss, head_statistics
from trace_rl.objective import LossRows, Objective, merge_sums
from trace_rl.packing import (
    MicroBatch,
    SequencePlan,
    batches_of,
    extent_of,
    num_tokens,
    pack,
    plan_sequences,
    read_sequences,
    split_minibatches,
)
from trace_rl.token_layout import Layout
from trace_rl.workers.ranks import Ranks
from trace_rl.workers.token_figures import cut_figures, split_rows

if TYPE_CHECKING:
    import deepspeed


@dataclass(frozen=True)
class StepReport:
    """What one rank saw in a training step."""

    sums: dict[str, float]
    """Metric sums over this rank's tokens (names ending in `_max`: maxima)."""
    grad_norms: list[float]
    """Global norm before clipping, per optimizer step; the same on every rank."""
    learning_rate: float
    num_micro_batches: int
    padding_frac: float
    shared_frac: float
    """Share of the tokens that all ranks read that was not computed, since other sequences have the same prompt."""
    backward_frac: float
    """Share of the tokens of all ranks in sequences that can have a gradient."""


@dataclass
class Minibatch:
    """What one optimizer step reads, on one rank."""

    micro_batches: tuple[list[MicroBatch], list[MicroBatch]]
    """Of sequences that can have a gradient, and of those that cannot."""
    num_tokens: int
    """Of all ranks."""
    num_read: int
    """Of sequences that are read."""
    num_backward_tokens: int
    num_laid: int
    """Those that are left where a shared prompt counts once."""
    num_positions: int
    """What the passes over them compute, padding included."""
    old_logprobs: Sequence[Sequence[Tensor | None]] = ()
    """By micro-batch; none where one optimizer step is taken on a batch."""


class BatchRunner:
    """Runs batches on one rank's engine; every method is collective."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        settings: LearnerSettings,
        objective: Objective,
        ranks: Ranks,
        layout: Layout,
        device: torch.device,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._objective = objective
        self._ranks = ranks
        self._layout = layout
        self._device = device
        self._teacher_head: Tensor | None = None

    def set_teacher_head(self, head: Float[Tensor, "vocab hidden"]) -> None:
        """Keep the output head that the teacher's states of the coming batches belong to."""
        self._teacher_head = head

    def train_step(self, batch: TrainingBatch) -> StepReport:
        """Take the optimizer steps of one global batch.

        Raises:
            TrainingError: a loss or gradient is not finite, or the batch does not fit what the rank has been given.
        """
        self._check_batch(batch)
        parts = [
            self._minibatch(part) for part in split_minibatches(batch.sequences, self._settings.minibatches_per_step)
        ]
        for part in parts if len(parts) > 1 else []:
            part.old_logprobs = [
                [self._logprobs(micro_batch, self._objective.sampling_temperature) for micro_batch in each]
                for each in part.micro_batches
            ]
        learning_rate = float(self._engine.get_lr()[0])
        sums: dict[str, float] = {}
        norms = []
        for number, part in enumerate(parts):
            where = f"step {batch.step}" + (f", minibatch {number}" if len(parts) > 1 else "")
            norms.append(self._optimizer_step(part, len(parts), sums, where))
        laid = sum(part.num_laid for part in parts)
        return StepReport(
            sums=sums,
            grad_norms=norms,
            learning_rate=learning_rate,
            num_micro_batches=sum(len(each) for part in parts for each in part.micro_batches),
            padding_frac=1 - laid / sum(part.num_positions for part in parts),
            shared_frac=1 - laid / sum(part.num_read for part in parts),
            backward_frac=sum(part.num_backward_tokens for part in parts) / sum(part.num_tokens for part in parts),
        )

    def score(self, batch: TrainingBatch) -> list[TokenStatistics]:
        """What this rank's sequences say of the rows of routes, under the weights as they are; no gradient."""
        found: list[TokenStatistics] = []
        for sequences, whole, by_route in self._measured(batch, self._statistics):
            for route, values in self._ranks.joined_statistics(whole, by_route):
                mine = split_rows(sequences, route, values)
                found += [TokenStatistics(sequence.key, route, **columns) for sequence, columns in mine]
        return [] if self._ranks.stretch else found  # those who share sequences found the same

    def inspect(self, batch: TrainingBatch) -> list[TokenFigures]:
        """What can be shown of this rank's sequences, under the weights as they are; no gradient."""
        found: list[TokenFigures] = []
        for sequences, whole, (tokens, by_route) in self._measured(batch, self._figures):
            joined = {name: self._ranks.joined(whole, column) for name, column in tokens.items()}
            found += cut_figures(sequences, joined, self._ranks.joined_statistics(whole, by_route))
        return [] if self._ranks.stretch else found

    def _measured(self, batch: TrainingBatch, measure: Any) -> Iterator[tuple[list[TrainingSequence], MicroBatch, Any]]:
        """What `measure` finds in each micro-batch of this rank, with its sequences and the whole of it."""
        self._check_batch(batch)
        for indices in self._plan(batch.sequences).plan[self._ranks.share]:
            sequences = [batch.sequences[index] for index in indices]
            whole = pack(sequences, self._layout)
            with torch.no_grad():
                found = self._engine(self._ranks.shard(whole).to(self._device), measure)
            yield sequences, whole, found

    def gradient_parts(self, batch: TrainingBatch) -> dict[str, float]:
        """Norms of the gradients of the policy-gradient and the routed part of the loss, and the cosine between them.

        The routed part is told apart by sequences with and without an advantage: those of groups whose rewards are all
        equal learn from nothing else (arXiv:2605.10194, proposition 5). Without one of both parts there is no cosine.

        Takes three float32 copies of the gradient; not for ZeRO-3, whose parameters are never whole.
        """
        self._check_batch(batch)
        parameters = [parameter for parameter in self._engine.module.parameters() if parameter.requires_grad]
        policy, routed, silent = (
            [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters] for _ in range(3)
        )
        of_kind = {True: routed, False: silent}
        for has_advantage, into in of_kind.items():
            sequences = [item for item in batch.sequences if bool(np.any(item.advantages)) == has_advantage]
            for micro_batch in self._pack(sequences, self._plan(sequences)) if sequences else ():
                rows = micro_batch.rows
                self._add_gradient(micro_batch, replace(rows, route_weight=0 * rows.route_weight), parameters, policy)
                self._add_gradient(micro_batch, replace(rows, pg_weight=0 * rows.pg_weight), parameters, into)
        for gradient in (*policy, *routed, *silent):
            torch.distributed.all_reduce(gradient)
        silent_norm = np.sqrt(_dot(silent, silent))
        for all_of_it, part in zip(routed, silent, strict=True):
            all_of_it += part
        norms = np.sqrt(_dot(policy, policy)), np.sqrt(_dot(routed, routed))
        found = {
            "policy_grad_norm": float(norms[0]),
            "routed_grad_norm": float(norms[1]),
            "routed_grad_norm_without_advantage": float(silent_norm),
        }
        return found | ({"cosine": float(_dot(policy, routed) / (norms[0] * norms[1]))} if min(norms) > 0 else {})

    def _add_gradient(
        self, micro_batch: MicroBatch, rows: LossRows, parameters: Sequence[Tensor], into: Sequence[Tensor]
    ) -> None:
        # past the engine, whose hooks would take this for the backward pass of a step
        loss, _ = self._engine.module(replace(micro_batch, rows=rows).to(self._device), self._loss(None))
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        for total, gradient in zip(into, gradients, strict=True):
            if gradient is not None:
                total += gradient

    def logprobs(self, sequences: Sequence[TrainingSequence], temperature: float) -> list[Float[np.ndarray, " time"]]:
        """Log-probs of the response tokens of each sequence under the weights as they are; the same on every rank."""
        budget = max(self._settings.max_tokens_per_micro_batch, *map(num_tokens, sequences))
        found: dict[int, np.ndarray] = {}
        for indices in batches_of(list(map(extent_of, sequences)), budget, self._layout):
            whole = pack([sequences[index] for index in indices], self._layout)
            mine = self._logprobs(self._ranks.shard(whole), temperature)
            rows = self._ranks.joined(whole, mine).cpu().numpy()
            cuts = np.cumsum([len(sequences[index].token_ids) for index in indices])[:-1]
            found |= dict(zip(indices, np.split(rows, cuts), strict=True))
        return [found[index] for index in range(len(sequences))]

    def _logprobs(self, micro_batch: MicroBatch, temperature: float) -> Float[Tensor, " row"]:
        with torch.no_grad():
            return self._engine(
                micro_batch.to(self._device),
                lambda policy, packed: head_logprobs(
                    policy, packed.rows.targets, temperature, self._settings.tile_bytes
                ),
            )

    def _plan(self, sequences: Sequence[TrainingSequence]) -> SequencePlan:
        budget = self._settings.max_tokens_per_micro_batch
        return plan_sequences(list(map(extent_of, sequences)), budget, self._ranks.num_shares, self._layout)

    def _pack(self, sequences: Sequence[TrainingSequence], planned: SequencePlan) -> list[MicroBatch]:
        return [
            self._ranks.shard(pack([sequences[index] for index in indices], self._layout))
            for indices in planned.plan[self._ranks.share]
        ]

    def _minibatch(self, sequences: Sequence[TrainingSequence]) -> Minibatch:
        """Plan a minibatch. What has no gradient is read for metrics if at all; where all is such, all is read, and a
        backward pass over nothing gives zero.
        """
        by_advantage = self._objective.policy_gradient.vanishes_without_advantage
        kinds = read_sequences(sequences, by_advantage, self._settings.measured_sequences)
        plans = [self._plan(kind) for kind in kinds]
        tokens = [sum(map(num_tokens, kind)) for kind in kinds]
        return Minibatch(
            micro_batches=(self._pack(kinds[0], plans[0]), self._pack(kinds[1], plans[1]) if kinds[1] else []),
            num_tokens=sum(map(num_tokens, sequences)),
            num_read=sum(tokens),
            num_backward_tokens=tokens[0],
            num_laid=sum(each.num_laid for each in plans),
            num_positions=sum(each.num_positions for each in plans),
        )

    def _optimizer_step(self, part: Minibatch, num_minibatches: int, sums: dict[str, float], where: str) -> float:
        """Accumulate the micro-batches and step; adds their metric sums to `sums`, returns the gradient norm.

        The weights of a batch add up to one mean over all of it; a minibatch is scaled up to estimate that mean.
        """
        from trace_rl.workers import deepspeed_engine

        backward, forward = part.micro_batches
        old = part.old_logprobs or [[None] * len(each) for each in part.micro_batches]
        with torch.no_grad():
            for number, micro_batch in enumerate(forward):
                self._forward(micro_batch, old[1][number], sums, f"{where}, micro-batch {number} without gradient")
        for number, micro_batch in enumerate(backward):
            loss = self._forward(micro_batch, old[0][number], sums, f"{where}, micro-batch {number}")
            deepspeed_engine.accumulate(self._engine, loss * num_minibatches, is_last=number == len(backward) - 1)
        norm = deepspeed_engine.optimizer_step(self._engine)
        if not np.isfinite(norm):
            raise TrainingError(
                f"{where}: the gradient norm is not finite although every loss was; the optimizer step was not taken"
            )
        return norm

    def _forward(self, micro_batch: MicroBatch, old: Tensor | None, sums: dict[str, float], where: str) -> Tensor:
        """The loss of a micro-batch, checked on all ranks."""
        loss, terms = self._engine(micro_batch.to(self._device), self._loss(old))
        self._check_loss(loss, where)
        merge_sums(sums, {name: float(value) for name, value in terms.items()})
        return loss

    def _loss(self, old_logprobs: Tensor | None) -> Any:
        def loss(policy: Projection, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            teacher = self._teacher(policy, micro_batch)
            parts, sums = head_loss(
                policy, micro_batch.rows, self._objective, teacher, old_logprobs, self._settings.tile_bytes
            )
            # DeepSpeed finds the tensors of an output in tuples and mappings only, not in other classes
            return parts.total, sums

        return loss

    def _statistics(self, policy: Projection, micro_batch: MicroBatch) -> list[tuple[int, dict[str, Tensor]]]:
        teacher = self._teacher(policy, micro_batch)
        return head_statistics(policy, micro_batch.rows, self._objective, teacher, self._settings.tile_bytes)

    def _figures(self, policy: Projection, micro_batch: MicroBatch) -> Any:
        teacher = self._teacher(policy, micro_batch)
        return head_figures(policy, micro_batch.rows, self._objective, teacher, self._settings.tile_bytes)

    def _teacher(self, policy: Projection, micro_batch: MicroBatch) -> Projection:
        """The teacher's states; without any, none under the policy's head."""
        if self._teacher_head is None:
            return Projection(policy.hidden[:0], policy.head)
        return Projection(micro_batch.teacher_hidden, self._teacher_head)

    def _check_batch(self, batch: TrainingBatch) -> None:
        if not batch.sequences:
            raise TrainingError(f"step {batch.step}: the batch holds no sequence; nothing can be trained on")
        if any(len(s.teacher_hidden) for s in batch.sequences) and self._teacher_head is None:
            raise TrainingError(
                f"step {batch.step}: the batch has routed tokens, but the learner was given no teacher head; call "
                "set_teacher_head after each refresh of the teacher"
            )

    def _check_loss(self, loss: Tensor, where: str) -> None:
        """Fail on every rank when the loss is not finite on one, before any of them enters the backward pass."""
        flags = torch.zeros(self._ranks.world_size, device=self._device)
        flags[self._ranks.rank] = float(not torch.isfinite(loss))
        torch.distributed.all_reduce(flags)
        if flags.any():
            ranks = ", ".join(str(rank) for rank in flags.nonzero().flatten().tolist())
            raise TrainingError(
                f"{where}: the loss is not finite on learner rank {ranks}; the optimizer step was not taken"
            )


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(left, right, strict=True))
