"""One rank of the learner: the actor that holds a DeepSpeed engine and takes optimizer steps.

Decides how a rank starts, what it gives to others (weights, canary log-probs) and how it is saved; what is done with a
batch is `trace_rl.workers.batch_runner`. Must not know the driver, other roles or the run folder.

After a failed step the rank refuses everything that would spread or store its weights.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trace_rl.batch import RolloutKey, TokenFigures, TokenStatistics, TrainingBatch, TrainingSequence
from trace_rl.config.learner import LearnerSettings
from trace_rl.config.roles import Model
from trace_rl.errors import CheckpointError, ModelError, MovedOnError, TrainingError
from trace_rl.objective import Objective
from trace_rl.protocols import StoredFile
from trace_rl.workers import life
from trace_rl.workers.adapters import Adapter, adapter_config, add_adapters
from trace_rl.workers.batch_runner import BatchRunner, StepReport
from trace_rl.workers.checkpoint_files import seal
from trace_rl.workers.life import new_life
from trace_rl.workers.ranks import Ranks
from trace_rl.workers.weight_file import keep_only, write_version
from trace_rl.workers.weight_sender import WeightSender
from trace_rl.workers.weight_wire import TransferBackend, TransferGroup, WeightManifest, free_address, open_store

if TYPE_CHECKING:
    import deepspeed

    from trace_rl.workers import checkpoint
    from trace_rl.workers.learner_weights import FullWeight


@dataclass(frozen=True)
class LearnerSpec:
    """What a rank needs to know of the run."""

    model: Model
    settings: LearnerSettings
    objective: Objective
    num_optimizer_steps: int
    """Of the whole run: where the learning-rate schedule ends."""
    seed: int
    collective_timeout_s: float
    transfer_backend: TransferBackend
    bucket_mib: int
    is_single_node: bool


class LearnerRank:
    """Made an actor by `ray.remote`; what is marked collective must be called on all ranks in the same order."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self._spec = spec
        self._rank = rank
        self._world_size = spec.settings.world_size
        self._store: TCPStore | None = None
        self._engine: deepspeed.DeepSpeedEngine
        self._sender: WeightSender | None = None
        self._failure = ""
        self._sent_version: int | None = None
        self._has_moved_on = False
        life.begin(new_life())

    def open_store(self) -> tuple[str, int]:
        """Rank 0: open the rendezvous of the learner's process group on a port that the system picks."""
        address = "127.0.0.1" if self._spec.is_single_node else ray.util.get_node_ip_address()
        self._store = self._open_store(address, 0)
        return address, self._store.port

    def start(self, address: str, port: int) -> WeightManifest:
        """Join the process group, load the model, build the engine (collective); returns what `send_weights` sends."""
        import transformers

        from trace_rl.workers import deepspeed_engine, learner_weights, shared_attention
        from trace_rl.workers.policy_model import RowModel, layout_of, learner_model, load_policy

        transformers.utils.logging.disable_progress_bar()
        spec = self._spec
        store = self._store or self._open_store(address, port)
        deepspeed_engine.join_process_group(store, self._rank, self._world_size, spec.collective_timeout_s)
        random.seed(spec.seed + self._rank)
        np.random.seed((spec.seed + self._rank) % 2**32)
        torch.manual_seed(spec.seed + self._rank)
        self._device = deepspeed_engine.device()
        policy = load_policy(learner_model(spec.model, spec.settings), self._device)
        layout = layout_of(policy, spec.settings)
        if layout.shares_prompts and (reason := shared_attention.prepare(policy)):
            raise ModelError(
                f"learner.layout is shared, but {spec.model.path!r} ({type(policy).__name__}) {reason}; set "
                "learner.layout=auto"
            )
        if spec.settings.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        if spec.settings.lora.rank:
            add_adapters(policy, spec.settings.lora, spec.seed)
        shares = spec.settings.sequence_parallel
        group = deepspeed_engine.share_sequences(policy, shares)
        self._engine = deepspeed_engine.build_engine(
            RowModel(policy), spec.settings, spec.model.dtype == "bfloat16", spec.num_optimizer_steps
        )
        self._engine.train()
        self._policy = policy
        ranks = Ranks(self._rank, self._world_size, shares, group)
        self._runner = BatchRunner(self._engine, spec.settings, spec.objective, ranks, layout, self._device)
        self._gathered = learner_weights.gathered_buckets
        self._weights = learner_weights.model_weights(policy)
        self._adapters = learner_weights.adapter_weights(policy)
        sent = self._adapters if spec.settings.sends_adapters else self._weights
        self._manifest = WeightManifest.of((weight.name, weight.shape, weight.dtype) for weight in sent)
        return self._manifest

    def set_teacher_head(self, head: Float[Tensor, "vocab hidden"]) -> None:
        """Keep the teacher's output head; once per refresh of the teacher."""
        self._runner.set_teacher_head(head.to(self._device, getattr(torch, self._spec.model.dtype)))

    def train_step(self, batch: TrainingBatch) -> StepReport:
        """Take the optimizer steps of one global batch; collective.

        Raises:
            TrainingError: a loss or gradient is not finite, or the batch does not fit what the rank has been given.
        """
        self._refuse_after_failure("train")
        self._has_moved_on = True
        try:
            return self._runner.train_step(batch)
        except BaseException as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def score(self, batch: TrainingBatch) -> list[TokenStatistics]:
        """What this rank's sequences say of the rows of routes; collective."""
        return self._runner.score(batch)

    def inspect(self, batch: TrainingBatch) -> list[TokenFigures]:
        """What can be shown of this rank's sequences; collective."""
        return self._runner.inspect(batch)

    def gradient_parts(self, batch: TrainingBatch) -> dict[str, float]:
        """Norms of the two parts of the gradient and the cosine between them; collective, the same on every rank."""
        return self._runner.gradient_parts(batch)

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Log-probs [len(sequence) - 1] of every token after the first, at temperature 1; collective under ZeRO-3."""
        unweighted = [_unweighted(number, sequence) for number, sequence in enumerate(sequences)]
        return self._runner.logprobs(unweighted, temperature=1.0)

    def rendezvous(self) -> tuple[str, int]:
        """Address of this node, and a port that is free on it."""
        return free_address(self._spec.is_single_node)

    def connect_sender(self, group: TransferGroup) -> None:
        """A rank that sends: join the group that weights are sent through."""
        if self._sender is None:
            self._sender = WeightSender(self._manifest, self._spec.transfer_backend, self._rank, self._device)
        self._sender.connect(group)

    def send_weights(self, version: int) -> str:
        """Gather the full weights and send them, where this rank does; collective.

        Returns:
            Digest of what was sent; '' of a rank that does not send.
        """
        self._begin_to_send(f"send its weights as version {version}", version)
        weights = self._full_weights()
        if self._sender is not None:
            return self._sender.send(weights)
        for _ in weights:
            pass
        return ""

    @ray.method(num_returns=2)
    def write_weights(self, version: int, folder: str) -> tuple[WeightManifest, str]:
        """Gather the full weights and write them to a folder from rank 0; collective.

        Returns:
            Where they are, and their digest; of other ranks what they would be, and ''.
        """
        self._begin_to_send(f"write its weights as version {version}", version)
        weights = self._full_weights()
        if self._rank == 0:
            return write_version(Path(folder), version, self._manifest, weights, self._spec.bucket_mib * 2**20)
        for _ in weights:
            pass
        return self._manifest, ""

    def keep_only(self, version: int, folder: str) -> None:
        """Remove the other versions that were written to a folder."""
        keep_only(Path(folder), version)

    @ray.method(num_returns=2)
    def export_adapter(self, version: int) -> tuple[Adapter, str]:
        """Copies of the adapters from rank 0, and their digest; collective."""
        self._begin_to_send(f"send its adapters as version {version}", version)
        adapter = self._adapter()
        return adapter, adapter.digest()

    @ray.method(num_returns="streaming")
    def export_state(self) -> Iterator[dict[str, Tensor]]:
        """Stream copies of the full weights in buckets {Hugging Face name: tensor} from rank 0; collective."""
        self._refuse_after_failure("export its weights")
        for bucket in self._buckets():
            if self._rank == 0:
                yield {name: weight.to("cpu", copy=True) for name, weight in bucket}

    def save(self, folder: str) -> dict[str, StoredFile]:
        """Write this rank's part of a checkpoint into `folder` (collective); returns its files by their path in it.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        from trace_rl.workers import checkpoint

        self._refuse_after_failure("save its weights")
        weights = self._on_rank_0(self._weights)
        adapters = self._on_rank_0(self._adapters)
        target = Path(folder)
        written: list[Path] = []
        try:
            if self._rank == 0:
                written += checkpoint.write_policy(target, self._policy, weights, self._spec.model.path)
            if self._rank == 0 and adapters:
                Adapter(adapters, adapter_config(self._policy)).write(target / "adapter")
                written += (target / "adapter").iterdir()
            written += checkpoint.write_learner(target, self._engine, self._rank, self._layout())
            return seal(target, written)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"learner rank {self._rank} failed to write to {target}: {error}") from error

    def load(self, folder: str) -> None:
        """Continue from a checkpoint exactly, whatever ranks and ZeRO stage have written it; collective."""
        from trace_rl.workers import checkpoint

        self._has_moved_on = True
        checkpoint.read_learner(Path(folder), self._engine, self._rank, self._layout())
        self._failure = ""

    def put_away(self, what: str) -> None:
        """Move the `states` of training, or then the `weights`, to CPU memory, so that engines have the GPU."""
        from trace_rl.workers import learner_states

        learner_states.put_away(self._engine, what)

    def take_back(self) -> None:
        """Bring all of that back to the GPU."""
        from trace_rl.workers import learner_states

        learner_states.take_back(self._engine)

    def _layout(self) -> checkpoint.Layout:
        from trace_rl.workers import checkpoint

        settings = self._spec.settings
        # how adapters are sent may change, what they are may not
        lora = settings.lora.model_dump(mode="json", exclude={"sync"}) if settings.lora.rank else None
        return checkpoint.Layout(
            meaning={"learner.lora": lora, "model.dtype": self._spec.model.dtype},
            spread={"learner.world_size": settings.world_size, "learner.zero_stage": settings.zero_stage},
        )

    def _adapter(self) -> Adapter:
        """The adapters, whole on rank 0 and without weights elsewhere."""
        return Adapter(self._on_rank_0(self._adapters), adapter_config(self._policy))

    def _on_rank_0(self, weights: Sequence[FullWeight]) -> dict[str, Tensor]:
        """Copies of full weights in CPU memory; collective, and empty on the other ranks."""
        buckets = self._gathered(weights, self._spec.bucket_mib * 2**20)
        return {name: weight.to("cpu", copy=True) for bucket in buckets for name, weight in bucket if self._rank == 0}

    def _full_weights(self) -> Iterator[tuple[str, Tensor]]:
        return (weight for bucket in self._buckets() for weight in bucket)

    def _buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        return self._gathered(self._weights, self._spec.bucket_mib * 2**20)

    def _open_store(self, address: str, port: int) -> TCPStore:
        return open_store(address, port, self._rank, self._world_size, self._spec.collective_timeout_s)

    def _begin_to_send(self, what: str, version: int) -> None:
        """Raise where this version was sent before, to other engines, and the weights have changed since."""
        self._refuse_after_failure(what)
        if self._has_moved_on and version == self._sent_version:
            if self._sender is not None:
                self._sender.close()  # engines that wait for it see that instead of their deadline
            raise MovedOnError(
                f"learner rank {self._rank} cannot {what}, because it has trained since; send the next version"
            )
        self._sent_version, self._has_moved_on = version, False

    def _refuse_after_failure(self, what: str) -> None:
        if self._failure:
            raise TrainingError(
                f"learner rank {self._rank} refuses to {what}, because a training step failed before "
                f"({self._failure}); restart from the last checkpoint"
            )


def _unweighted(number: int, token_ids: tuple[int, ...]) -> TrainingSequence:
    """A sequence whose first token is the prompt and whose tokens carry no weight: only its log-probs are read."""
    zeros, none, index = np.zeros(len(token_ids) - 1), np.zeros(0), np.zeros(0, dtype=np.int64)
    return TrainingSequence(
        key=RolloutKey("canary", number),
        prompt_token_ids=token_ids[:1],
        token_ids=token_ids[1:],
        rollout_logprobs=zeros,
        staleness=zeros.astype(np.int64),
        advantages=zeros,
        pg_weight=zeros,
        route_positions=index,
        route_index=index,
        route_weight=none,
        teacher_row=index,
        teacher_hidden=np.zeros((0, 0)),
    )
