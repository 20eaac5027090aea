"""Optimizer steps of the learner in plain torch, for machines without DeepSpeed: the same packing, model and loss.

What DeepSpeed does for one rank is done here in a few lines: float32 copies of the weights, gradients that are added up
in float32, one norm of all of them, AdamW. Only benchmarks use it; a run does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trace_rl.batch import TrainingBatch
from trace_rl.config.learner import Optimizer
from trace_rl.config.run import RunConfig
from trace_rl.head_loss import Projection, head_loss
from trace_rl.objective import objective_of
from trace_rl.packing import MicroBatch, extent_of, pack, plan_sequences
from trace_rl.token_layout import Layout
from trace_rl.workers.batch_runner import StepReport
from trace_rl.workers.policy_model import RowModel


def plain_runners(policy: PreTrainedModel, config: RunConfig, device: torch.device) -> Callable[[Layout], PlainRunner]:
    """The runner of a layout, over one model and one optimizer."""
    model = RowModel(policy).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    weights = Float32Weights(trained, config.learner.optimizer)
    return lambda layout: PlainRunner(model, weights, config, layout, device)


class Float32Weights:
    """What AdamW steps: copies in float32 of weights that are in lower precision."""

    def __init__(self, weights: Sequence[Tensor], settings: Optimizer) -> None:
        self._weights = weights
        self._copies = [weight.detach().to(torch.float32, copy=True) for weight in weights]
        for each in self._copies:
            each.grad = torch.zeros_like(each)
        self._max_norm = settings.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._copies,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def accumulate(self) -> None:
        """Add what the last backward pass has left at the weights, and take it from there."""
        for weight, each in zip(self._weights, self._copies, strict=True):
            if weight.grad is not None:
                each.grad += weight.grad
                weight.grad = None

    @torch.no_grad()
    def step(self) -> float:
        """Clip and step; returns the norm of the gradient before."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._copies, self._max_norm))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        for weight, each in zip(self._weights, self._copies, strict=True):
            weight.copy_(each)
        return norm


class PlainRunner:
    """Takes optimizer steps on batches in one layout."""

    def __init__(
        self, model: RowModel, weights: Float32Weights, config: RunConfig, layout: Layout, device: torch.device
    ) -> None:
        self._model = model
        self._weights = weights
        self._settings = config.learner
        self._objective = objective_of(config.algorithm, 1.0)
        self._layout = layout
        self._device = device

    def set_teacher_head(self, head: Tensor) -> None:
        self._teacher_head = head

    def train_step(self, batch: TrainingBatch) -> StepReport:
        extents = [extent_of(sequence) for sequence in batch.sequences]
        found = plan_sequences(extents, self._settings.max_tokens_per_micro_batch, 1, self._layout)
        for indices in found.plan[0]:
            micro_batch = pack([batch.sequences[index] for index in indices], self._layout)
            self._model(micro_batch.to(self._device), self._loss).backward()
            self._weights.accumulate()
        return StepReport(
            sums={},
            grad_norms=[self._weights.step()],
            learning_rate=self._settings.optimizer.learning_rate,
            num_micro_batches=len(found.plan[0]),
            padding_frac=1 - found.num_laid / found.num_positions,
            shared_frac=1 - found.num_laid / sum(extent.length for extent in extents),
            backward_frac=1.0,
        )

    def _loss(self, policy: Projection, micro_batch: MicroBatch) -> Tensor:
        teacher = Projection(micro_batch.teacher_hidden, self._teacher_head)
        tile_bytes = self._settings.tile_bytes
        return head_loss(policy, micro_batch.rows, self._objective, teacher, tile_bytes=tile_bytes)[0].total
