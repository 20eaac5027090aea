"""The rewarder: an actor that grades in killable child processes, and the driver's side of it.

Decides which rollouts are graded at all (truncated ones are not: they earn 0) and what is counted. It must not know how
an answer is judged (`trace_rl.rewards`) or how a child is killed (`trace_rl.workers.grading`).

Invariant: a rollout that missed the deadline or broke the grader earns 0, is marked with the cause, and is counted
apart from responses that were graded 0.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from trace_rl.batch import GradedRollout, Rollout
from trace_rl.config.roles import Rewarder
from trace_rl.errors import RewardError, WorkerError
from trace_rl.reply_checks import reward_fault
from trace_rl.rewards import feedback
from trace_rl.workers import life
from trace_rl.workers.grading import START_TIMEOUT_S, GradingPool, Verdict
from trace_rl.workers.idle import IdleMeter
from trace_rl.workers.life import new_life
from trace_rl.workers.streaming import Call, Gate, Unserved, stream
from trace_rl.workers.worker_logs import whereabouts_of_actor

MAX_CONCURRENT_CALLS = 4
"""Calls that the actor serves at a time; make it with at least this `max_concurrency`."""
RESPONSE_MARGIN_S = 30.0
"""What a call may take beyond the deadlines of its texts: transport, and a machine that is busy with other things."""

logger = logging.getLogger(__name__)


class MathRewarder:
    """Grades batches of (response text, reference answer); a plain class that Ray makes a threaded actor."""

    def __init__(self, settings: Rewarder) -> None:
        self._pool = GradingPool(settings.num_processes, settings.timeout_s)
        life.begin(new_life())

    def ready(self) -> bool:
        """True once a right and a wrong answer were graded as such.

        Raises:
            RewardError: they were not.
        """
        verdicts = self._pool.grade([("\\boxed{\\frac{4}{2}}", "2"), ("\\boxed{3}", "2")])
        if verdicts != [Verdict(1.0, "graded"), Verdict(0.0, "graded")]:
            raise RewardError(
                f"The grader gave {verdicts} to a right and a wrong answer instead of 1 and 0: check the installation "
                "of math-verify and whether rewarder.timeout_s is too short for this machine."
            )
        return True

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts in order; bounded by the deadlines of the texts."""
        return self._pool.grade(pairs)

    def close(self) -> None:
        """End the child processes."""
        self._pool.close()


class RayGrader:
    """Implements `trace_rl.protocols.Grader` over a `MathRewarder` actor."""

    def __init__(self, actor: Any, settings: Rewarder) -> None:
        self._actor = actor
        self._settings = settings
        self._lock = threading.Lock()
        self._has_told = False
        self._gate = Gate(MAX_CONCURRENT_CALLS)
        self.idle = IdleMeter()

    def grade(self, rollouts: Iterable[Rollout]) -> Iterator[GradedRollout]:
        """Graded rollouts as they are done.

        Raises:
            WorkerError: the actor died, or did not answer although every text has a deadline.
        """
        call: Call[Rollout, Verdict] = Call(
            submit=self._submit,
            is_wanted=lambda rollout: rollout.finish_reason != "length",
            deadline_s=self._deadline_s,
            suspect="the rewarder",
            doing="grading",
            gate=self._gate,
        )
        for rollout, verdict in stream(rollouts, call):
            if verdict is Unserved.SKIPPED:
                verdict = Verdict(0.0, "truncated")
            elif isinstance(verdict, Unserved):
                place = whereabouts_of_actor(self._actor._actor_id.hex())
                raise WorkerError(
                    f"The rewarder did not answer for rollout {rollout.key} although each text is killed after "
                    f"{self._settings.timeout_s:g} s (rewarder.timeout_s): look at its log{place and f' ({place})'}."
                )
            if fault := reward_fault(verdict.reward):
                raise WorkerError(
                    f"the rewarder garbled its verdict on rollout {rollout.key}: {fault}; look at its log"
                )
            self._tell(rollout, verdict)
            said = feedback(rollout.text, verdict.reward, verdict.cause)
            yield GradedRollout(rollout, verdict.reward, verdict.cause, said)

    def _submit(self, rollouts: Sequence[Rollout]) -> Future[Sequence[Verdict]]:
        pairs = [(rollout.text, rollout.prompt.answer) for rollout in rollouts]
        future: Future[Sequence[Verdict]] = self._actor.grade.remote(pairs).future()
        self.idle.until(future)
        return future

    def _deadline_s(self, num_texts: int) -> float:
        """The time that `num_texts` take if every one of them misses its deadline."""
        rounds = -(-num_texts // self._settings.num_processes)
        return START_TIMEOUT_S + RESPONSE_MARGIN_S + rounds * (self._settings.timeout_s + RESPONSE_MARGIN_S)

    def _tell(self, rollout: Rollout, verdict: Verdict) -> None:
        """Say once a run why grading failed; how often it does, metrics tell."""
        if verdict.cause != "error":
            return
        with self._lock:
            is_first, self._has_told = not self._has_told, True
        if is_first:
            logger.warning("Rollout %s earned 0 because its grading failed: %s", rollout.key, verdict.detail)
