"""One rank of the learner: the actor that holds a DeepSpeed engine and takes optimizer steps.

Decides the order of things within a step: the same plan on every rank, old log-probs before the first of several
optimizer steps, a check of every loss on all ranks before its backward pass. Must not know the driver, other roles or
the run folder. The number of collectives depends on the plan alone, never on what a rank's sequences hold.

After a failed step the rank refuses everything that would spread or store its weights.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trace_rl.batch import RolloutKey, TrainingBatch, TrainingSequence
from trace_rl.config.algorithm import PolicyGradient
from trace_rl.config.roles import LearnerSettings, Model
from trace_rl.errors import TrainingError
from trace_rl.packing import MicroBatch, num_tokens, pack, padded_tokens, plan_micro_batches, split_minibatches
from trace_rl.token_loss import RouteLoss, target_logprobs, token_loss
from trace_rl.workers.weight_sender import TransferBackend, TransferGroup, WeightManifest, WeightSender, free_address

if TYPE_CHECKING:
    import deepspeed


@dataclass(frozen=True)
class LearnerSpec:
    """What a rank needs to know of the run."""

    model: Model
    settings: LearnerSettings
    policy_gradient: PolicyGradient
    routes: tuple[RouteLoss, ...]
    sampling_temperature: float
    num_optimizer_steps: int
    """Of the whole run: where the learning-rate schedule ends."""
    seed: int
    collective_timeout_s: float
    transfer_backend: TransferBackend
    bucket_mib: int
    is_single_node: bool


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


class LearnerRank:
    """Made an actor by `ray.remote`; what is marked collective must be called on all ranks in the same order."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self._spec = spec
        self._rank = rank
        self._world_size = spec.settings.world_size
        self._store: TCPStore | None = None
        self._engine: deepspeed.DeepSpeedEngine
        self._teacher_head: Tensor | None = None
        self._sender: WeightSender | None = None
        self._failure = ""

    def open_store(self) -> tuple[str, int]:
        """Rank 0: open the rendezvous of the learner's process group on a port that the system picks."""
        address = "127.0.0.1" if self._spec.is_single_node else ray.util.get_node_ip_address()
        self._store = self._connect_store(address, 0)
        return address, self._store.port

    def start(self, address: str, port: int) -> WeightManifest:
        """Join the process group, load the model, build the engine (collective); returns what `send_weights` sends."""
        import transformers

        from trace_rl.workers import deepspeed_engine
        from trace_rl.workers.policy_model import RowModel, load_policy

        transformers.utils.logging.disable_progress_bar()
        spec = self._spec
        store = self._store or self._connect_store(address, port)
        deepspeed_engine.join_process_group(store, self._rank, self._world_size, spec.collective_timeout_s)
        random.seed(spec.seed + self._rank)
        np.random.seed((spec.seed + self._rank) % 2**32)
        torch.manual_seed(spec.seed + self._rank)
        self._device = deepspeed_engine.device()
        policy = load_policy(spec.model, self._device)
        if spec.settings.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        self._ds = deepspeed_engine
        self._engine = deepspeed_engine.build_engine(
            RowModel(policy), spec.settings, spec.model.dtype == "bfloat16", spec.num_optimizer_steps
        )
        self._engine.train()
        self._policy = policy
        # Under ZeRO-3 the output head is a placeholder between forward passes; its shape stays known.
        self._manifest = WeightManifest.of(
            (name, deepspeed_engine.full_shape(parameter), parameter.dtype) for name, parameter in self._parameters()
        )
        return self._manifest

    def set_teacher_head(self, head: Float[Tensor, "vocab hidden"]) -> None:
        """Keep the teacher's output head; once per refresh of the teacher."""
        self._teacher_head = head.to(self._device, getattr(torch, self._spec.model.dtype))

    def train_step(self, batch: TrainingBatch) -> StepReport:
        """Take the optimizer steps of one global batch; collective.

        Raises:
            TrainingError: a loss or gradient is not finite, or the batch does not fit what the rank has been given.
        """
        self._refuse_after_failure("train")
        try:
            return self._train_step(batch)
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def _train_step(self, batch: TrainingBatch) -> StepReport:
        settings = self._spec.settings
        self._check_batch(batch)
        parts = split_minibatches(batch.sequences, settings.minibatches_per_step)
        lengths = [[num_tokens(sequence) for sequence in part] for part in parts]
        plans = [plan_micro_batches(part, settings.max_tokens_per_micro_batch, self._world_size) for part in lengths]
        mine = [
            [pack([part[i] for i in indices]) for indices in plan[self._rank]]
            for part, plan in zip(parts, plans, strict=True)
        ]
        old = [[self._logprobs(m) for m in part] if len(parts) > 1 else [None] * len(part) for part in mine]
        learning_rate = float(self._engine.get_lr()[0])
        sums: dict[str, float] = {}
        norms = []
        for number, part in enumerate(mine):
            where = f"step {batch.step}" + (f", minibatch {number}" if len(parts) > 1 else "")
            norms.append(self._optimizer_step(part, old[number], len(parts), sums, where))
        num_padded = sum(padded_tokens(plan, part) for plan, part in zip(plans, lengths, strict=True))
        return StepReport(
            sums=sums,
            grad_norms=norms,
            learning_rate=learning_rate,
            num_micro_batches=sum(len(part) for part in mine),
            padding_frac=1 - sum(map(sum, lengths)) / num_padded,
        )

    def _optimizer_step(
        self,
        micro_batches: Sequence[MicroBatch],
        old_logprobs: Sequence[Tensor | None],
        num_minibatches: int,
        sums: dict[str, float],
        where: str,
    ) -> float:
        """Accumulate the micro-batches and step; adds their metric sums to `sums`, returns the gradient norm.

        The weights of a batch add up to one mean over all of it; a minibatch is scaled up to estimate that mean.
        """
        for number, (micro_batch, old) in enumerate(zip(micro_batches, old_logprobs, strict=True)):
            loss, terms = self._engine(micro_batch.to(self._device), self._objective(old))
            self._check_loss(loss, f"{where}, micro-batch {number}")
            self._ds.accumulate(self._engine, loss * num_minibatches, number == len(micro_batches) - 1)
            merge_sums(sums, {name: float(value) for name, value in terms.items()})
        norm = self._ds.optimizer_step(self._engine)
        if not np.isfinite(norm):
            raise TrainingError(
                f"{where}: the gradient norm is not finite although every loss was; the optimizer step was not taken"
            )
        return norm

    def _objective(self, old_logprobs: Tensor | None) -> Any:
        spec = self._spec

        def objective(logits: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            teacher = self._teacher_logits(logits, micro_batch)
            rows, temperature = micro_batch.rows, spec.sampling_temperature
            loss, sums = token_loss(logits, rows, spec.policy_gradient, spec.routes, teacher, temperature, old_logprobs)
            if old_logprobs is not None and old_logprobs.numel():
                # The gap to the sampler is that of the weights that it sampled with.
                gap = (old_logprobs - rows.rollout_logprobs).abs()
                sums |= {"mismatch": gap.sum(), "mismatch_max": gap.max()}
            return loss, sums

        return objective

    def _teacher_logits(self, logits: Float[Tensor, "row vocab"], micro_batch: MicroBatch) -> Tensor:
        if not len(micro_batch.teacher_hidden):
            return logits.new_zeros(0, logits.shape[-1])
        assert self._teacher_head is not None
        return micro_batch.teacher_hidden.to(self._teacher_head.dtype) @ self._teacher_head.T

    def _logprobs(self, micro_batch: MicroBatch, temperature: float | None = None) -> Float[Tensor, " row"]:
        """Log-probs of the response tokens under the weights as they are; by default at the sampling temperature."""
        scale = self._spec.sampling_temperature if temperature is None else temperature
        with torch.no_grad():
            return self._engine(
                micro_batch.to(self._device), lambda logits, packed: target_logprobs(logits, packed.rows.targets, scale)
            )

    def _check_batch(self, batch: TrainingBatch) -> None:
        if not batch.sequences:
            raise TrainingError(f"step {batch.step}: the batch holds no sequence; nothing can be trained on")
        if any(len(s.kl_positions) for s in batch.sequences) and self._teacher_head is None:
            raise TrainingError(
                f"step {batch.step}: the batch has routed tokens, but the learner was given no teacher head; call "
                "set_teacher_head after each refresh of the teacher"
            )

    def _check_loss(self, loss: Tensor, where: str) -> None:
        """Fail on every rank when the loss is not finite on one, before any of them enters the backward pass."""
        flags = torch.zeros(self._world_size, device=self._device)
        flags[self._rank] = float(not torch.isfinite(loss))
        torch.distributed.all_reduce(flags)
        if flags.any():
            ranks = ", ".join(str(rank) for rank in flags.nonzero().flatten().tolist())
            raise TrainingError(
                f"{where}: the loss is not finite on learner rank {ranks}; the optimizer step was not taken"
            )

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Log-probs [len(sequence) - 1] of every token after the first, at temperature 1; collective under ZeRO-3."""
        micro_batch = pack([_unweighted(number, sequence) for number, sequence in enumerate(sequences)])
        flat = self._logprobs(micro_batch, temperature=1.0).cpu().numpy()
        return np.split(flat, np.cumsum([len(sequence) - 1 for sequence in sequences])[:-1])

    def rendezvous(self) -> tuple[str, int]:
        """Address of this node, and a port that is free on it."""
        return free_address(self._spec.is_single_node)

    def connect_sender(self, group: TransferGroup) -> None:
        """Rank 0: open the group that weights are sent through."""
        if self._sender is None:
            self._sender = WeightSender(self._manifest, self._spec.transfer_backend)
        self._sender.connect(group)

    def send_weights(self, version: int) -> str:
        """Gather the full weights and send them from rank 0; collective. Returns the digest of what was sent, or ''."""
        self._refuse_after_failure(f"send its weights as version {version}")
        weights = (weight for bucket in self._buckets() for weight in bucket)
        if self._rank == 0 and self._sender is not None:
            return self._sender.send(weights)
        for _ in weights:
            pass
        return ""

    @ray.method(num_returns="streaming")
    def export_state(self) -> Iterator[dict[str, Tensor]]:
        """Stream copies of the full weights in buckets {Hugging Face name: tensor} from rank 0; collective."""
        self._refuse_after_failure("export its weights")
        for bucket in self._buckets():
            if self._rank == 0:
                yield {name: weight.to("cpu", copy=True) for name, weight in bucket}

    def save(self, folder: str) -> None:
        """Write this rank's part of a checkpoint into `folder`; collective."""
        from trace_rl.workers import checkpoint

        self._refuse_after_failure("save its weights")
        weights: dict[str, Tensor] = {}
        for bucket in self._buckets():
            if self._rank == 0:
                weights |= {name: weight.to("cpu", copy=True) for name, weight in bucket}
        if self._rank == 0:
            checkpoint.write_policy(Path(folder), self._policy, weights, self._spec.model.path)
        checkpoint.write_learner(Path(folder), self._engine, self._rank, self._layout())

    def load(self, folder: str) -> None:
        """Continue from a checkpoint exactly; collective."""
        from trace_rl.workers import checkpoint

        checkpoint.check_layout(Path(folder), self._layout())
        checkpoint.read_learner(Path(folder), self._engine, self._rank)
        self._failure = ""

    def _layout(self) -> dict[str, Any]:
        settings = self._spec.settings
        return {
            "learner.world_size": settings.world_size,
            "learner.zero_stage": settings.zero_stage,
            "model.dtype": self._spec.model.dtype,
        }

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self._policy.named_parameters())

    def _buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        return self._ds.gathered_buckets(self._parameters(), self._spec.bucket_mib * 2**20)

    def _connect_store(self, address: str, port: int) -> TCPStore:
        timeout = timedelta(seconds=self._spec.collective_timeout_s)
        return TCPStore(
            address, port, self._world_size, is_master=self._rank == 0, timeout=timeout, wait_for_workers=False
        )

    def _refuse_after_failure(self, what: str) -> None:
        if self._failure:
            raise TrainingError(
                f"learner rank {self._rank} refuses to {what}, because a training step failed before "
                f"({self._failure}); restart from the last checkpoint"
            )


def merge_sums(total: dict[str, float], other: dict[str, float]) -> None:
    """Add metric sums in place; names ending in `_max` combine by maximum."""
    for name, value in other.items():
        combine = max if name.endswith("_max") else operator.add
        total[name] = combine(total[name], value) if name in total else value


def _unweighted(number: int, token_ids: tuple[int, ...]) -> TrainingSequence:
    """A sequence whose first token is the prompt and whose tokens carry no weight: only its log-probs are read."""
    zeros, none = np.zeros(len(token_ids) - 1), np.zeros(0, dtype=np.int64)
    return TrainingSequence(
        RolloutKey("canary", number), token_ids[:1], token_ids[1:], zeros, 0.0, zeros, none, none, np.zeros(0), zeros
    )
