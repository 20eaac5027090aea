"""When the teacher is asked: of each prompt once its completions are annotated, or of a whole step at its end.

A teacher computes on a place of its own and would wait there while rollouts are sampled. Where it is certain which
completions a step trains on (`RunConfig.scores_early`), those of a prompt are sent to it together once the last of them
has come, and the step waits for the last prompts only. Must not know what is asked for (`trace_rl.prompts`), nor who
answers.

Invariants: which requests share a call does not depend on time, so that what the teacher computes does not either; its
weights are brought up to date before the first call of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

from trace_rl.batch import AnnotatedRollout, RolloutKey, RoutedRollout, TeacherRequest, TeacherRows
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
    """What the teacher says of one step's routed tokens.

    To be entered for the step. Calls are served one after the other by a thread; leaving drops those that nobody waits
    for. Who is told to end writes a checkpoint next, of the teacher too, and so waits for the one that is being served.
    """

    def __init__(self, config: RunConfig, roles: TeacherSide, step: int) -> None:
        self.routed: dict[RolloutKey, RoutedRollout] = {}
        """The rollouts that were begun, with their routes; advantages are those within their prompt only."""
        self._config, self._roles, self._step = config, roles, step
        self._views = teacher_views(config, step)
        self._requests: list[TeacherRequest] = []
        self._calls: list[Future[Sequence[TeacherRows]]] = []
        self._refreshed: Future[bool] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")

    def __enter__(self) -> TeacherScoring:
        if self._config.scores_early:
            self._refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=kind is not None and issubclass(kind, PreemptedError), cancel_futures=True)

    def begin(self, group: Sequence[AnnotatedRollout]) -> None:
        """All completions of a prompt are there, and the step trains on them."""
        if self._views and self._config.scores_early:
            routed = route_rollouts(group, self._config, self._step)
            self.routed |= {item.key: item for item in routed}
            self._ask(routed)

    def finish(self, routed: Sequence[RoutedRollout]) -> tuple[Evidence, Metrics]:
        """What the teacher says of all rollouts, and what that took; what was not begun is asked for now, in one call.

        Raises:
            TraceError: what the teacher raised, now or in a call that was begun.
        """
        self._refresh()
        self._ask([item for item in routed if item.key not in self.routed])
        if self._refreshed is not None:
            self._refreshed.result()
        rows = [item for call in self._calls for item in call.result()]
        cost = teacher_metrics(routed, self._requests, rows, len(self._views), self._roles.teacher_cost)
        return Evidence(self._views, {(item.key, item.view): item for item in rows}), cost

    def _refresh(self) -> None:
        if self._views and self._refreshed is None:
            self._refreshed = self._thread.submit(self._roles.teacher.refresh, self._step)

    def _ask(self, routed: Sequence[RoutedRollout]) -> None:
        requests = self._roles.encoder.teacher_requests(routed, self._views)
        if requests:
            self._requests += requests
            self._calls.append(self._thread.submit(self._roles.teacher.score, requests))
