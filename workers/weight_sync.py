"""Driver side of the weight sync: moves the learner's weights to every engine and proves that they arrived.

Decides the protocol of one sync: send and receive concurrently, a handshake (each engine's version and digest against
the sender's), then a canary (log-probs of fixed sequences, engine against learner). It must not know how weights travel
(`weight_sender`, `weight_receiver`) or how the learner is sharded.

Invariants: an engine may sample only after all three agreed; every wait ends at the deadline of the sync, and the error
names who was waited for and in which step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import ray
from jaxtyping import Float
from ray import ObjectRef
from ray.exceptions import RayActorError, RayError

from trace_rl.config.roles import Sync
from trace_rl.errors import WeightSyncError
from trace_rl.protocols import Metrics
from trace_rl.workers.waiting import first_cause, worker_error
from trace_rl.workers.weight_sender import TransferGroup, WeightManifest

_GRACE_S = 3.0  # after a first failure, time for others to report: a dead peer is noticed by all, its own end says why


class WeightSource(Protocol):
    """The learner as the weight sync sees it: an object on the driver that talks to the learner's ranks.

    Rank 0 holds a `trace_rl.workers.weight_sender.WeightSender`; the other ranks only join the gathering of sharded
    weights. Names are those of the Hugging Face checkpoint, in an order that never changes; tied weights come once.
    """

    def rendezvous(self) -> tuple[str, int]:
        """Address of rank 0's node that engines can reach, and a port that is free there (`free_address`)."""
        ...

    def describe_weights(self) -> WeightManifest:
        """Names, full shapes and dtypes of what `send_weights` will send (`WeightManifest.of`); nothing is gathered."""
        ...

    def connect_sender(self, group: TransferGroup) -> ObjectRef[Any]:
        """Start `WeightSender.connect(group)` on rank 0; resolves when every engine has joined."""
        ...

    def send_weights(self, version: int) -> list[ObjectRef[str]]:
        """Start `WeightSender.send`; one reference a rank, and rank 0's resolves to the digest of what was sent."""
        ...

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[Float[np.ndarray, " time"]]:
        """Log-probs of fixed token sequences under the weights just sent, at temperature 1; bounded by the learner.

        Returns:
            One float array [len(sequence) - 1] per sequence: element t is log p(sequence[t + 1] | sequence[: t + 1]).
        """
        ...


class ProvenWeightSync:
    """Implements `trace_rl.protocols.WeightSync` between one learner and its engines.

    Args:
        engines: actor handles of `trace_rl.workers.generator.GeneratorEngine`, in the order of their index.
        canary: token sequences of at least 2 tokens each, scored after every sync (`canary_sequences`).
    """

    def __init__(
        self, source: WeightSource, engines: Sequence[Any], canary: Sequence[tuple[int, ...]], settings: Sync
    ) -> None:
        self._source = source
        self._engines = {f"generator engine {index}": engine for index, engine in enumerate(engines)}
        self._canary = list(canary)
        self._settings = settings
        self._manifest: WeightManifest | None = None

    def sync(self, version: int) -> Metrics:
        """Bring every engine to the learner's weights as `version` and prove it.

        Raises:
            WeightSyncError: a party died, failed or missed the deadline, or an engine's version, digest or canary
                differs from the learner's. The engines stay unproven.
            WorkerError: the learner failed in a call that it bounds itself (`describe_weights`, `canary_logprobs`).
        """
        started = time.monotonic()
        deadline = started + self._settings.timeout_s
        try:
            manifest = self._manifest if self._manifest is not None else self._connect(deadline)
            self._transfer(manifest, version, deadline)
            sent = time.monotonic()
            gap = self._check_canary(version, deadline)
        except BaseException:
            self._manifest = None  # the group may be broken: the next sync joins anew
            raise
        accepted = {name: engine.accept.remote(version) for name, engine in self._engines.items()}
        _gather(accepted, f"accepting version {version}", deadline, self._settings.timeout_s)
        return {
            "sync/duration_s": time.monotonic() - started,
            "sync/transfer_s": sent - started,
            "sync/canary_gap_max_nats": gap,
            "sync/weight_bytes": float(manifest.nbytes),
        }

    def _connect(self, deadline: float) -> WeightManifest:
        try:
            manifest = self._source.describe_weights()
            address, port = self._source.rendezvous()
        except RayError as error:
            raise WeightSyncError(f"the learner could not prepare the weight sync: {first_cause(error)}") from error
        settings = self._settings
        group = TransferGroup(address, port, 1 + len(self._engines), settings.bucket_mib, settings.timeout_s)
        joins: dict[str, ObjectRef[Any]] = {"the learner": self._source.connect_sender(group)}
        for rank, (name, engine) in enumerate(self._engines.items(), start=1):
            joins[name] = engine.join_transfer.remote(group, rank)
        _gather(joins, f"joining the transfer group at {address}:{port}", deadline, settings.timeout_s)
        self._manifest = manifest
        return manifest

    def _transfer(self, manifest: WeightManifest, version: int, deadline: float) -> None:
        """Send and receive at the same time, then compare what each engine reports with what was sent."""
        parties = {name: engine.receive_weights.remote(manifest, version) for name, engine in self._engines.items()}
        senders = {f"learner rank {rank}": ref for rank, ref in enumerate(self._source.send_weights(version))}
        reports = _gather(parties | senders, f"transferring version {version}", deadline, self._settings.timeout_s)
        digest = reports["learner rank 0"]
        for name, receipt in ((name, reports[name]) for name in parties):
            if receipt.version != version:
                raise WeightSyncError(
                    f"{name} reports weight version {receipt.version} after the sync of version {version}; its weights "
                    "are stale, stop the run and look at its log"
                )
            if receipt.digest != digest:
                raise WeightSyncError(
                    f"{name} received weights with digest {receipt.digest} for version {version}, but the learner sent "
                    f"{digest}; the transfer corrupted them, stop the run and check the network"
                )

    def _check_canary(self, version: int, deadline: float) -> float:
        """Largest difference in nats between any engine's and the learner's log-probs of the canary."""
        scores = {name: engine.score.remote(self._canary) for name, engine in self._engines.items()}
        try:
            expected = self._source.canary_logprobs(self._canary)
        except RayError as error:
            raise WeightSyncError(f"the learner could not score the canary: {first_cause(error)}") from error
        found = _gather(scores, f"scoring the canary of version {version}", deadline, self._settings.timeout_s)
        tolerance = self._settings.canary_tolerance
        gaps = {name: _max_gap(expected, logprobs) for name, logprobs in found.items()}
        refused = [f"{name} ({gap:.3g} nats)" for name, gap in gaps.items() if not gap <= tolerance]  # NaN too
        if refused:
            raise WeightSyncError(
                f"{', '.join(refused)} does not compute with the learner's weights of version {version}: the log-probs "
                f"of the canary may differ by at most {tolerance:g} nats (sync.canary_tolerance); stop the run, or "
                "raise the tolerance if the precision of the model explains the gap"
            )
        return max(gaps.values())


def canary_sequences(vocab_size: int, count: int = 4, length: int = 24) -> list[tuple[int, ...]]:
    """Fixed pseudo-random token sequences: they touch many rows of the embedding and of the head."""
    ids = np.random.default_rng(0).integers(0, vocab_size, size=(count, length))
    return [tuple(int(token) for token in row) for row in ids]


def _max_gap(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Largest absolute difference; NaN where either side has one."""
    return float(np.max([np.max(np.abs(ours - theirs)) for ours, theirs in zip(expected, found, strict=True)]))


def _gather(parties: Mapping[str, ObjectRef[Any]], step: str, deadline: float, timeout_s: float) -> dict[str, Any]:
    """Results of all parties; raises as soon as one fails, naming those that died first."""
    pending = {ref: name for name, ref in parties.items()}
    results: dict[str, Any] = {}
    failures: list[tuple[bool, str]] = []
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            break
        name = pending.pop(done[0])
        try:
            results[name] = ray.get(done[0])
        except RayError as error:
            cause = worker_error(error, name, step)
            failures.append((not isinstance(error, RayActorError), str(cause)))
            deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        raise WeightSyncError("the weight sync failed: " + "; ".join(what for _, what in sorted(failures)))
    if pending:
        raise WeightSyncError(
            f"{', '.join(sorted(pending.values()))} did not finish {step} within the {timeout_s:g} s that one sync may "
            "take (sync.timeout_s); look at their logs or raise the deadline"
        )
    return {name: results[name] for name in parties}
