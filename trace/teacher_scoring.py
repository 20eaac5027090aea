"""When the teacher is asked: of some prompts once their completions are annotated, or of a whole step at its end.

A teacher computes on a place of its own and would wait there while rollouts are sampled. Where it is certain which
prompts a step trains on (`RunConfig.scores_early`), as many of them as fill a batch are therefore sent to it once the
last of their completions has come, and the step waits for those that were last only. Must not know what is asked for
(`trace_rl.prompts`), nor who answers.

Invariants: which requests share a call does not depend on time, so that what the teacher computes does not either; its
weights are brought up to date before the first call of a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import chain
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol

from trace_rl.batch import AnnotatedRollout, RolloutKey, RoutedRollout, RoutedTokens, TeacherRequest, TeacherRows
from trace_rl.config.run import RunConfig
from trace_rl.errors import PreemptedError
from trace_rl.flops import TeacherCost
from trace_rl.prompts import PromptEncoder
from trace_rl.protocols import Metrics, Teacher
from trace_rl.routing import route_rollouts, teacher_views
from trace_rl.step_metrics import teacher_metrics
from trace_rl.training_batch import Evidence


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
        """Of the rollouts that were begun."""
        self._config, self._roles, self._step = config, roles, step
        self._views = teacher_views(config, step)
        self._is_refreshed = False
        self._calls: list[Sequence[TeacherRequest]] = []
        self._rows: list[TeacherRows] = []
        self._work: SimpleQueue[Callable[[], Sequence[TeacherRows]] | None] = SimpleQueue()
        self._answers: SimpleQueue[Sequence[TeacherRows] | BaseException] = SimpleQueue()
        self._num_open = 0
        self._waiting: dict[int, dict[int, Sequence[AnnotatedRollout]]] = {}
        """Prompts by their place, of calls that are not complete yet."""
        self._is_left = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True, name=f"teacher of step {step}")

    def __enter__(self) -> TeacherScoring:
        if self._views:
            self._thread.start()
            if self._config.scores_early:
                self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_left.set()
        self._work.put(None)
        if self._views and isinstance(error, PreemptedError):
            self._thread.join()

    def begin(self, place: int, group: Sequence[AnnotatedRollout]) -> None:
        """All completions of a prompt are there, and the step trains on them.

        Args:
            place: of the prompt among those of the step; neighbours share a call.

        Raises:
            TraceError: what the teacher raised since the step began.
        """
        if not (self._views and self._config.scores_early):
            return
        while not self._answers.empty():
            self._take_answer()
        size = self._config.prompts_scored_together
        together = self._waiting.setdefault(place // size, {})
        together[place] = group
        if len(together) == size:
            del self._waiting[place // size]
            routed = route_rollouts(chain.from_iterable(together.values()), self._config, self._step)
            self.routes |= {item.key: item.routed for item in routed}
            self._ask(routed)

    def finish(self, routed: Sequence[RoutedRollout]) -> tuple[Evidence, Metrics]:
        """What the teacher says of all rollouts, and what that took; what was not begun is asked for now, in one call.

        Raises:
            TraceError: what the teacher raised, now or since the step began.
        """
        if self._views:
            self._refresh()
            self._ask([item for item in routed if item.key not in self.routes])
        while self._num_open:
            self._take_answer()
        cost = teacher_metrics(routed, self._calls, self._rows, len(self._views), self._roles.teacher_cost)
        return Evidence(self._views, {(item.key, item.view): item for item in self._rows}), cost

    def _refresh(self) -> None:
        """Have the weights brought up to date, unless that was done."""

        def refresh() -> Sequence[TeacherRows]:
            self._roles.teacher.refresh(self._step)
            return ()

        if not self._is_refreshed:
            self._is_refreshed = True
            self._submit(refresh)

    def _ask(self, routed: Sequence[RoutedRollout]) -> None:
        requests = self._roles.encoder.teacher_requests(routed, self._views)
        if requests:
            self._calls.append(requests)
            self._submit(lambda: self._roles.teacher.score(requests))

    def _submit(self, work: Callable[[], Sequence[TeacherRows]]) -> None:
        self._num_open += 1
        self._work.put(work)

    def _take_answer(self) -> None:
        answer = self._answers.get()  # comes in any case: the teacher bounds its waits
        if isinstance(answer, BaseException):
            raise answer
        self._rows += answer
        self._num_open -= 1

    def _serve(self) -> None:
        """Make the calls until one fails."""
        try:
            while (work := self._work.get()) is not None and not self._is_left.is_set():
                self._answers.put(work())
        except BaseException as error:  # raised again where answers are taken
            self._answers.put(error)
