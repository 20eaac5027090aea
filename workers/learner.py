"""The learner as the driver sees it: one object over the rank actors.

Implements `trace_rl.protocols.Learner` for the loop, the sources of `trace_rl.workers.weight_transport`, and what the
teacher needs to follow the policy. Decides how ranks are started, waited for and blamed. Must not know how a rank
trains.

Every wait has a deadline and names the ranks that missed it. When a rank dies the others hang in a collective, so the
first failure ends the wait; a dead rank is blamed before the complaints of its peers. A batch whose step cannot be
trusted is written to `dumps/` of the run folder before the error goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from jaxtyping import Float
from ray.exceptions import GetTimeoutError, RayError
from torch import Tensor

from trace_rl.batch import TokenFigures, TokenStatistics, TrainingBatch
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, DeadlineError, TraceError, TrainingError
from trace_rl.objective import couples_tokens, merge_sums, objective_of, summarise
from trace_rl.protocols import StoredFile
from trace_rl.workers.adapters import Adapter
from trace_rl.workers.batch_runner import StepReport
from trace_rl.workers.idle import IdleMeter
from trace_rl.workers.learner_rank import LearnerRank, LearnerSpec
from trace_rl.workers.waiting import DEATHS, first_cause, worker_error
from trace_rl.workers.weight_sender import transfer_backend
from trace_rl.workers.weight_wire import TransferGroup, WeightManifest
from trace_rl.workers.worker_logs import whereabouts

logger = logging.getLogger(__name__)

_BLAME_GRACE_S = 5.0
"""How long to look for a dead rank after the first error; its peers often complain before Ray knows."""
_ARRIVAL_S = 60.0
"""For a result that is there and only has to be copied."""


def learner_spec(config: RunConfig, is_one_machine: bool = True) -> LearnerSpec:
    """What a rank needs to know of a run.

    Args:
        is_one_machine: whether ranks and engines reach each other over loopback.

    Raises:
        ConfigError: ZeRO-0 with bfloat16, which DeepSpeed cannot accumulate in float32; or ranks that share
            sequences with a loss that couples the tokens of a sequence.
    """
    objective = objective_of(config.algorithm, config.sampling.temperature)
    if config.learner.sequence_parallel > 1 and couples_tokens(objective, config.learner.minibatches_per_step == 1):
        raise ConfigError(
            f"learner.sequence_parallel is {config.learner.sequence_parallel}, but the ratio or the rollout correction "
            "of this algorithm is that of whole sequences, of which a rank then has a part; set it to 1"
        )
    if config.learner.zero_stage == 0 and config.model.dtype == "bfloat16":
        raise ConfigError(
            "learner.zero_stage is 0 and model.dtype is bfloat16, but DeepSpeed then adds up gradients in bfloat16; "
            "set learner.zero_stage to 1 or more"
        )
    return LearnerSpec(
        model=config.model,
        settings=config.learner,
        objective=objective,
        num_optimizer_steps=config.run.steps * config.learner.minibatches_per_step,
        seed=config.run.seed,
        collective_timeout_s=config.placement.step_timeout_s,
        transfer_backend=transfer_backend(config.sync, config.placement),
        bucket_mib=config.sync.bucket_mib,
        is_single_node=is_one_machine,
    )


def rank_actors(spec: LearnerSpec, options: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Actor handles of the ranks, each with its options; they load nothing until a `DeepSpeedLearner` starts them."""
    return [ray.remote(LearnerRank).options(**each).remote(spec, rank) for rank, each in enumerate(options)]


class DeepSpeedLearner:
    """The ranks of the learner.

    Args:
        config: `model.path` must name a folder or a hub model by now.
        ranks: actors made by `rank_actors`; without them they are made where Ray has room.

    Raises:
        WorkerError: a rank did not become ready within placement.start_timeout_s.
        ModelError: the model cannot be used.
    """

    def __init__(self, config: RunConfig, run_folder: Path, ranks: Sequence[Any] = ()) -> None:
        self._spec = learner_spec(config)
        if config.logging.diagnostics_every and config.learner.zero_stage == 3:
            logger.warning(
                "Norms and cosine of the parts of the gradient, and the exposure that adds them up, are left out "
                "(logging.diagnostics_every): ZeRO-3 never has a whole gradient"
            )
        self.idle = IdleMeter()
        self.lock = threading.Lock()
        """Held while the weights change; who sends them while others may train holds it too."""
        self._asking = threading.Lock()
        self._dumps = run_folder / "dumps"
        self._step_timeout_s = config.placement.step_timeout_s
        self._start_timeout_s = config.placement.start_timeout_s
        resources = config.placement.learner
        anywhere = [{"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}] * config.learner.world_size
        self._ranks = list(ranks) or rank_actors(self._spec, anywhere)
        try:
            address, port = self._wait([self._ranks[0].open_store.remote()], "starting", start=True)[0]
            self._manifest: WeightManifest = self._all("start", address, port, start=True)[0]
        except BaseException:
            self.close()
            raise

    def train_step(self, batch: TrainingBatch) -> dict[str, float]:
        """Train on one global batch; returns metrics over all ranks.

        Raises:
            TrainingError: a loss or gradient was not finite; names the step and the file that holds the batch.
        """
        started = time.monotonic()
        try:
            with self.lock:
                reports: list[StepReport] = self._all("train_step", ray.put(batch))
        except TrainingError as error:
            raise TrainingError(f"{error}; the batch is in {self._dump(batch, str(error))}") from error
        sums: dict[str, float] = {}
        for report in reports:
            merge_sums(sums, report.sums)
        first = reports[0]
        return summarise(sums, self._spec.objective) | {
            "learner/grad_norm": float(np.mean(first.grad_norms)),
            "learner/learning_rate": first.learning_rate,
            "learner/num_micro_batches": float(first.num_micro_batches),
            "learner/padding_frac": first.padding_frac,
            "learner/shared_frac": first.shared_frac,
            "learner/backward_frac": first.backward_frac,
            "learner/duration_s": time.monotonic() - started,
        }

    def score(self, batch: TrainingBatch) -> list[TokenStatistics]:
        """What the policy says of the rows of routes under its present weights; takes no step."""
        return [item for found in self._all("score", ray.put(batch)) for item in found]

    def inspect(self, batch: TrainingBatch) -> list[TokenFigures]:
        """What can be shown of every token under the present weights; takes no step."""
        return [item for found in self._all("inspect", ray.put(batch)) for item in found]

    def gradient_parts(self, batch: TrainingBatch) -> dict[str, float]:
        """Norms of the policy-gradient and the routed part of the gradient, and their cosine; takes no step.

        Empty under ZeRO-3, whose parameters are never whole.
        """
        if self._spec.settings.zero_stage == 3:
            return {}
        parts: dict[str, float] = self._all("gradient_parts", ray.put(batch))[0]
        return parts

    def set_teacher_head(self, head: ray.ObjectRef[Tensor]) -> None:
        """Give every rank the teacher's output head [vocab, hidden]; once per refresh of the teacher."""
        self._all("set_teacher_head", head)

    def export_state(self) -> Iterator[ray.ObjectRef[dict[str, Tensor]]]:
        """Stream the full weights as references to buckets {Hugging Face name: tensor}, tied weights once.

        Pass the references on to another actor, and the weights never pass through the driver.
        """
        doing = "exporting its weights"
        streams = self._start("export_state")
        ends = [stream.completed() for stream in streams]
        others = ends[1:]  # they yield nothing, but when one of them dies rank 0 waits for it in a collective
        deadline = time.monotonic() + self._step_timeout_s
        while True:
            patience_s = max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait([streams[0], *others], timeout=patience_s, fetch_local=False)
            if not ready:
                raise _late({0: streams[0]}, doing, self._step_timeout_s, "placement.step_timeout_s")
            for end in [end for end in others if end in ready]:
                if _failure(end) is not None:
                    raise self._blame(ends, end, doing)
                others.remove(end)
            if streams[0] in ready:
                try:
                    yield next(streams[0])
                except StopIteration:
                    break
        self._wait(ends, doing)

    def save(self, path: Path) -> dict[str, StoredFile]:
        """Write everything that a learner goes on from to a folder; returns its files by their path in it."""
        written: list[dict[str, StoredFile]] = self._all("save", str(path.absolute()))
        return {name: file for part in written for name, file in part.items()}

    def load(self, path: Path) -> None:
        """Continue exactly from a checkpoint, which other ranks under another ZeRO stage may have written.

        Raises:
            CheckpointError: it is missing, or of another model, precision or adapters.
        """
        self._all("load", str(path.absolute()))

    def rendezvous(self) -> tuple[str, int]:
        """Address of rank 0's node and a port that is free there."""
        return self._wait([self._ranks[0].rendezvous.remote()], "looking for a free port")[0]

    def describe_weights(self) -> WeightManifest:
        """Names, full shapes and dtypes of what `send_weights` sends."""
        return self._manifest

    @property
    def num_senders(self) -> int:
        """Ranks that send; all where engines read the memory of the rank beside them."""
        return len(self._ranks) if self._spec.transfer_backend == "ipc" else 1

    def connect_sender(self, group: TransferGroup) -> list[ray.ObjectRef[None]]:
        """Start to open the transfer group on the ranks that send."""
        return [rank.connect_sender.remote(group) for rank in self._ranks[: self.num_senders]]

    def send_weights(self, version: int) -> list[ray.ObjectRef[str]]:
        """Start to send the weights; those who send resolve to a digest, the other ranks join in the gathering."""
        return self._start("send_weights", version)

    def write_weights(
        self, version: int, folder: str
    ) -> tuple[ray.ObjectRef[WeightManifest], list[ray.ObjectRef[str]]]:
        """Start to write the weights to a folder: where they are, and a digest from each rank, rank 0's of them."""
        written = self._start("write_weights", version, folder)
        return written[0][0], [digest for _, digest in written]

    def keep_only(self, version: int, folder: str) -> ray.ObjectRef[None]:
        """Start to remove the other versions that were written to a folder."""
        return self._ranks[0].keep_only.remote(version, folder)

    def export_adapter(self, version: int) -> tuple[ray.ObjectRef[Adapter], list[ray.ObjectRef[str]]]:
        """Start to copy the adapters: rank 0's, and a digest from each rank, of which the first is that of the copy."""
        copies = self._start("export_adapter", version)
        return copies[0][0], [digest for _, digest in copies]

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[Float[np.ndarray, " time"]]:
        """Log-probs [len(sequence) - 1] of fixed sequences at temperature 1."""
        return self._all("canary_logprobs", list(sequences))[0]

    def close(self) -> None:
        """End the ranks."""
        for rank in self._ranks:
            ray.kill(rank)

    def _all(self, method: str, *args: Any, start: bool = False) -> list[Any]:
        """Call a method on every rank and wait for all of them."""
        with self.idle.busy():
            return self._wait(self._start(method, *args), f"calling {method}", start)

    def _start(self, method: str, *args: Any) -> list[Any]:
        """Start a call on every rank; returns a reference each.

        Calls of several threads (the teacher's refresh, an engine that comes back) reach all ranks in the same order:
        where they are collective, ranks would wait for each other otherwise.
        """
        with self._asking:
            return [getattr(rank, method).remote(*args) for rank in self._ranks]

    def _wait(self, references: Sequence[ray.ObjectRef[Any]], doing: str, start: bool = False) -> list[Any]:
        timeout_s = self._start_timeout_s if start else self._step_timeout_s
        deadline = time.monotonic() + timeout_s
        pending = list(references)
        while pending:
            ready, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                setting = "placement.start_timeout_s" if start else "placement.step_timeout_s"
                late = {rank: each for rank, each in enumerate(references) if each in pending}
                raise _late(late, doing, timeout_s, setting)
            errors = {reference: error for reference in ready if (error := _failure(reference)) is not None}
            if errors:
                raise self._blame(references, errors, doing)
        try:
            return list(ray.get(list(references), timeout=_ARRIVAL_S))
        except GetTimeoutError:
            late = dict(enumerate(references))
            raise _late(late, f"sending what came of {doing}", _ARRIVAL_S, "no setting") from None

    def _blame(
        self, references: Sequence[ray.ObjectRef[Any]], errors: dict[ray.ObjectRef[Any], RayError], doing: str
    ) -> Exception:
        """The error to raise for a failed call: that of a dead rank if there is one, else the first that came."""
        failed, error = next(iter(errors.items()))
        others = [reference for reference in references if reference not in errors]
        if others and not isinstance(first_cause(error), (*DEATHS, TraceError)):
            ray.wait(others, num_returns=len(others), timeout=_BLAME_GRACE_S)
            for reference in others:
                found = _failure(reference, timeout=0)
                if isinstance(found, DEATHS):
                    failed, error = reference, found
        return worker_error(error, f"learner rank {references.index(failed)}", doing)

    def _dump(self, batch: TrainingBatch, reason: str) -> Path:
        self._dumps.mkdir(parents=True, exist_ok=True)
        file = self._dumps / f"step_{batch.step:06d}.pt"
        torch.save({"reason": reason, "batch": batch}, file)
        return file


def _late(calls: Mapping[int, Any], doing: str, timeout_s: float, setting: str) -> DeadlineError:
    """The error on a missed deadline: which ranks are meant, and where their logs are."""
    names = ", ".join(str(rank) for rank in calls)
    places = "; ".join(f"rank {rank}: {place}" for rank, call in calls.items() if (place := whereabouts(call)))
    return DeadlineError(
        f"learner rank {names} did not finish {doing} within {timeout_s:g} s ({setting}); look at the log, or raise "
        f"the deadline if the work is that long{places and f' ({places})'}"
    )


def _failure(reference: ray.ObjectRef[Any], timeout: float = _ARRIVAL_S) -> RayError | None:
    """The error that a finished call ended with; None when it succeeded, or is not finished within `timeout`."""
    try:
        ray.get(reference, timeout=timeout)
    except GetTimeoutError:
        return None
    except RayError as error:
        return error
    return None
