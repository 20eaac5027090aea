"""When the teacher is asked: of some prompts once their completions are annotated, or of a whole step at its end.

A teacher computes on a place of its own and would wait there while rollouts are sampled. Where it is certain which
prompts a step trains on (`RunConfig.scores_early`), as many neighbours of them as fill a batch are therefore sent to it
once the last of their completions has come; what is left over is sent at the end, and the step waits for what came last
only. Must not know what is asked for (`trace_rl.prompts`), nor who answers.

Invariants: which requests share a call does not depend on time, so that what the teacher computes does not either; its
weights are brought up to date before the first call of a step.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol

from trace_rl.batch import AnnotatedRollout, RolloutKey, RoutedRollout, RoutedTokens, TeacherRequest, TeacherRows
from trace_rl.config.run import RunConfig
from trace_rl.errors import DeadlineError, PreemptedError
from trace_rl.flops import TeacherCost
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import Metrics, Teacher
from trace_rl.routing import route_rollouts, teacher_views
from trace_rl.step_metrics import teacher_metrics
from trace_rl.training_batch import Evidence

logger = logging.getLogger(__name__)


class TeacherSide(Protocol):
    """What `trace_rl.loop.Roles` has of the way to the teacher and back."""

    @property
    def encoder(self) -> PromptEncoder: ...

    @property
    def teacher(self) -> Teacher: ...

    @property
    def teacher_cost(self) -> TeacherCost: ...


class TeacherScoring:
    """What the teacher says of one step's routed tokens; to be entered for the step.

    A thread makes the calls, one after the other. Leaving drops those that were not made yet. A run that is told to end
    writes a checkpoint next, of the teacher too, and so waits for the call that is being served; others do not.
    """

    def __init__(self, config: RunConfig, roles: TeacherSide, step: int) -> None:
        self.routes: dict[RolloutKey, tuple[RoutedTokens, ...]] = {}
        """Of the rollouts that were sent, as `route_rollouts` found them."""
        self._config, self._roles, self._step = config, roles, step
        self._timeout_s = config.placement.step_timeout_s
        self._views = teacher_views(config, step)
        self._is_early = bool(self._views) and config.scores_early
        self._incomplete: dict[int, dict[int, Sequence[AnnotatedRollout]]] = {}
        """Prompts of calls that lack others: by call and place."""
        self._calls: list[Sequence[TeacherRequest]] = []
        self._work: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._rows: list[TeacherRows] = []
        self._error: BaseException | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True, name=f"teacher of step {step}")

    def __enter__(self) -> TeacherScoring:
        if self._views:
            self._thread.start()
        if self._is_early:
            self._work.put(self._refresh)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closed.set()
        self._work.put(None)
        if self._views and isinstance(error, PreemptedError):
            self._thread.join(self._timeout_s)
            if self._error is not None:
                logger.warning("The teacher failed while the run was told to end: %s", self._error)

    def add(self, place: int, group: Sequence[AnnotatedRollout]) -> None:
        """All completions of a prompt are there, and the step trains on them.

        Args:
            place: of the prompt among those of the step, from 0; neighbours share a call.

        Raises:
            TraceError: what the teacher raised since the step began.
        """
        if not self._is_early:
            return
        self._raise_what_failed()
        size = self._config.prompts_scored_together
        together = self._incomplete.setdefault(place // size, {})
        together[place] = group
        if len(together) == size:
            del self._incomplete[place // size]
            routed = route_rollouts(chain.from_iterable(together.values()), self._config, self._step)
            self.routes |= {item.key: item.routed for item in routed}
            self._ask(routed)

    def finish(self, routed: Sequence[RoutedRollout]) -> tuple[Evidence, Metrics]:
        """What the teacher says of all rollouts, and what that took; those that were not sent yet are, in one call.

        Raises:
            TraceError: what the teacher raised, now or since the step began.
            DeadlineError: it was not done within placement.step_timeout_s.
        """
        if self._views:
            if not self._is_early:
                self._work.put(self._refresh)
            self._ask([item for item in routed if item.key not in self.routes])
            self._work.put(None)
            self._thread.join(self._timeout_s)
            self._raise_what_failed()
            if self._thread.is_alive():
                raise DeadlineError(
                    f"the teacher did not finish scoring within {self._timeout_s:g} s after the last rollout of step "
                    f"{self._step} (placement.step_timeout_s); look at its log, or raise the deadline if the work is "
                    "that long"
                )
        cost = teacher_metrics(routed, self._calls, self._rows, len(self._views), self._roles.teacher_cost)
        return Evidence(self._views, {(item.key, item.view): item for item in self._rows}), cost

    def _refresh(self) -> None:
        self._roles.teacher.refresh(self._step)

    def _ask(self, routed: Sequence[RoutedRollout]) -> None:
        requests = self._roles.encoder.teacher_requests(routed, self._views)
        if requests:
            self._calls.append(requests)
            self._work.put(lambda: self._rows.extend(self._roles.teacher.score(requests)))

    def _serve(self) -> None:
        """Make the calls until one fails."""
        try:
            while (work := self._work.get()) is not None and not self._is_closed.is_set():
                work()
        except BaseException as error:  # raised again in the loop's thread
            self._error = error

    def _raise_what_failed(self) -> None:
        if self._error is not None:
            raise self._error
