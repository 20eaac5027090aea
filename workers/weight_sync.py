"""Driver side of the weight sync: moves the learner's weights to every engine and proves that they arrived.

Decides the protocol of one sync: send and receive concurrently, a handshake (each engine's version and digest against
the sender's), then a canary (log-probs of fixed sequences, engine against learner). It must not know how weights travel
(`weight_transport`) or how the learner is sharded.

An engine that died and was started again by Ray is brought to the version of the others, alone, by the same three
steps (`recover`), or by the next sync of all of them.

Invariants: an engine may sample only after all three agreed; every wait ends at the deadline of the sync, and the error
names who was waited for and in which step; one transfer is under way at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import ray
from jaxtyping import Float
from ray import ObjectRef
from ray.exceptions import RayError

from trace_rl.config.roles import Sync
from trace_rl.errors import MovedOnError, SyncDeadlineError, WeightSyncError
from trace_rl.protocols import Metrics
from trace_rl.workers.revival import life_of
from trace_rl.workers.waiting import DEATHS, first_cause, worker_error
from trace_rl.workers.weight_transport import Transport
from trace_rl.workers.worker_logs import whereabouts

logger = logging.getLogger(__name__)

_ARRIVAL_S = 60.0  # for what is finished and only has to be copied
_PAUSE_S = 0.5  # between two tries to bring an engine back while the learner trains
_GRACE_S = 3.0  # after a first failure, time for others to report: a dead peer is noticed by all, its own end says why


class Scorer(Protocol):
    """The learner as the canary sees it."""

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[Float[np.ndarray, " time"]]:
        """Log-probs of fixed token sequences under the weights just sent, at temperature 1; bounded by the learner.

        Returns:
            One float array [len(sequence) - 1] per sequence: element t is log p(sequence[t + 1] | sequence[: t + 1]).
        """
        ...


class ProvenWeightSync:
    """Implements `trace_rl.protocols.WeightSync` between one learner and its engines.

    Args:
        engines: actor handles of `trace_rl.workers.generator_engine.GeneratorEngine`, in the order of their index.
        canary: token sequences of at least 2 tokens each, scored after every sync (`canary_sequences`).
        restart_timeout_s: how long an engine that died is waited for; None: engines are not started again.
        lock: held while weights are sent, and by who changes them.
    """

    def __init__(
        self,
        learner: Scorer,
        transport: Transport,
        engines: Sequence[Any],
        canary: Sequence[tuple[int, ...]],
        settings: Sync,
        restart_timeout_s: float | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._learner = learner
        self._transport = transport
        self._engines = {f"generator engine {index}": engine for index, engine in enumerate(engines)}
        self._canary = list(canary)
        self._settings = settings
        self._restart_timeout_s = restart_timeout_s
        self._connected: tuple[str, ...] = ()
        self._version = -1
        self._lives: dict[str, str] = {}
        """In which each engine was proven last."""
        self._seen: dict[str, str] = {}
        """Lives of the engines when they were looked at last."""
        self._lock = lock or threading.Lock()

    def sync(self, version: int) -> Metrics:
        """Bring every engine to the learner's weights as `version` and prove it.

        Where an engine died on the way it is waited for, and all of it is done again.

        Raises:
            WeightSyncError: a party died, failed or missed the deadline, or an engine's version, digest or canary
                differs from the learner's. The engines stay unproven.
            WorkerError: the learner failed in a call that it bounds itself, or an engine died and did not come back.
        """
        with self._lock:
            if not self._seen:
                self._look()
            while True:
                try:
                    metrics = self._sync(self._engines, version)
                except WeightSyncError as error:
                    if isinstance(error, SyncDeadlineError) or not self._has_lost_any():
                        raise
                    logger.warning("Weights of version %d are sent again to all engines: %s", version, error)
                    continue
                self._version = version
                return metrics

    def life(self, index: int) -> str:
        """The life of an engine that was proven last."""
        return self._lives.get(self._name(index), "")

    def recover(self, index: int, life: str) -> bool:
        """Wait until an engine that died can be asked again; several threads may.

        Args:
            life: the one in which it was asked.

        Returns:
            False where it is still alive in it, so that what went wrong was something else.

        Raises:
            WeightSyncError, WorkerError: as of `sync`.
        """
        name = self._name(index)
        if self._restart_timeout_s is None:
            return False
        if life_of(self._engines[name], name, self._restart_timeout_s) == life:
            return False
        self._admit(name)
        return True

    def _admit(self, name: str) -> None:
        """Bring one engine to the version of the others, unless a sync of all has done so meanwhile."""
        engine = {name: self._engines[name]}
        assert self._restart_timeout_s is not None
        while True:
            with self._lock:
                if self._lives.get(name) == life_of(engine[name], name, self._restart_timeout_s):
                    return
                self._connected = ()  # the group has the name of an engine that is gone
                try:
                    self._sync(engine, self._version)
                    return
                except MovedOnError:  # it trains; the next sync brings the engine its next version
                    pass
            time.sleep(_PAUSE_S)

    def _has_lost_any(self) -> bool:
        """Whether an engine has begun another life since the last look; waits until all are there."""
        seen = self._seen
        self._look()
        return self._seen != seen

    def _look(self) -> None:
        if self._restart_timeout_s is not None:
            self._seen = {name: life_of(each, name, self._restart_timeout_s) for name, each in self._engines.items()}

    def _name(self, index: int) -> str:
        return list(self._engines)[index]

    def _sync(self, engines: Mapping[str, Any], version: int) -> Metrics:
        started = time.monotonic()
        deadline = started + self._settings.timeout_s
        try:
            if self._connected != tuple(engines):
                self._connect(engines, deadline)
            self._transfer(engines, version, deadline)
            sent = time.monotonic()
            gap = self._check_canary(engines, version, deadline)
            accepted = {name: engine.accept.remote(version) for name, engine in engines.items()}
            lives = _gather(accepted, f"accepting version {version}", deadline, self._settings.timeout_s)
        except BaseException:
            self._connected = ()  # the group may be broken: the next sync joins anew
            raise
        if self._restart_timeout_s is not None:
            self._lives |= lives
            self._seen |= lives
        remains = self._transport.finish(version)
        _gather(remains, f"clearing away what version {version} replaced", deadline, self._settings.timeout_s)
        return {
            "sync/duration_s": time.monotonic() - started,
            "sync/transfer_s": sent - started,
            "sync/canary_gap_max_nats": gap,
            "sync/weight_bytes": float(self._transport.nbytes),
        }

    def _connect(self, engines: Mapping[str, Any], deadline: float) -> None:
        try:
            where, joins = self._transport.connect(engines)
        except RayError as error:
            raise WeightSyncError(f"the learner could not prepare the weight sync: {first_cause(error)}") from error
        _gather(joins, f"joining {where}", deadline, self._settings.timeout_s)
        self._connected = tuple(engines)

    def _transfer(self, engines: Mapping[str, Any], version: int, deadline: float) -> None:
        """Send and receive at the same time, then compare what each engine reports with what was sent."""
        transfer = self._transport.start(engines, version)
        senders = {f"learner rank {rank}": digest for rank, digest in enumerate(transfer.digests)}
        parties = {**transfer.receipts, **senders}
        reports = _gather(parties, f"transferring version {version}", deadline, self._settings.timeout_s)
        digest = reports["learner rank 0"]
        for name, receipt in ((name, reports[name]) for name in transfer.receipts):
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

    def _check_canary(self, engines: Mapping[str, Any], version: int, deadline: float) -> float:
        """Largest difference in nats between any engine's and the learner's log-probs of the canary."""
        scores = {name: engine.score.remote(self._canary) for name, engine in engines.items()}
        try:
            expected = self._learner.canary_logprobs(self._canary)
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
    moved_on: MovedOnError | None = None
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            break
        name = pending.pop(done[0])
        try:
            results[name] = ray.get(done[0], timeout=_ARRIVAL_S)
        except RayError as error:
            cause = worker_error(error, name, step)
            failures.append((not isinstance(error, DEATHS), str(cause)))
            moved_on = cause if isinstance(cause, MovedOnError) else moved_on
            deadline = min(deadline, time.monotonic() + _GRACE_S)
    if moved_on is not None:
        raise moved_on
    if failures:
        causes = dict.fromkeys(what for _, what in sorted(failures))  # what the learner wrote fails for every engine
        raise WeightSyncError("the weight sync failed: " + "; ".join(causes))
    if pending:
        told = "; ".join(f"{name}: {place}" for ref, name in pending.items() if (place := whereabouts(ref)))
        raise SyncDeadlineError(
            f"{', '.join(sorted(pending.values()))} did not finish {step} within the {timeout_s:g} s that one sync may "
            f"take (sync.timeout_s); look at their logs or raise the deadline{told and f' ({told})'}"
        )
    return {name: results[name] for name in parties}
