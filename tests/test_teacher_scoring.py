"""When the teacher is asked, and that its answers and figures do not depend on it."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from rollouts import ALL, KEY, annotated, configured, key

from trace_rl.absent import AbsentTeacher
from trace_rl.batch import AnnotatedRollout, RolloutKey, TeacherRows
from trace_rl.config.run import RunConfig
from trace_rl.errors import DeadlineError, PreemptedError, WorkerError
from trace_rl.flops import TeacherCost, TransformerShape
from trace_rl.prompts import PromptEncoder
from trace_rl.routing import route_rollouts
from trace_rl.teacher_scoring import TeacherScoring
from trace_rl.training_batch import Evidence

SHAPE = TransformerShape(num_layer_parameters=5, num_layers=1, attention_width=1, hidden=2, vocab=5)
GROUPS = [
    [annotated("p", 0, 6, 1.0, key(1, 3)), annotated("p", 1, 4, 0.0)],
    [annotated("q", 0, 5, 1.0, key(0, 2)), annotated("q", 1, 0, 0.0)],
    [annotated("r", 0, 3, 0.0), annotated("r", 1, 4, 0.0)],
]
SPANS = {"key_spans": KEY}


class Letters:
    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> list[int]:
        return [ord(character) for character in conversation[-1]["content"]]


class Teacher(AbsentTeacher):
    """Says of each row of which step its weights are, and whose it is; blocks while `may_score` is not set."""

    def __init__(self, fails: bool = False) -> None:
        self.log: list[Any] = []
        self.step = -1
        self.is_refreshed, self.is_scoring, self.may_score = (threading.Event() for _ in range(3))
        self.may_score.set()
        self._fails = fails

    def refresh(self, step: int) -> bool:
        self.log.append(f"step {step}")
        self.step = step
        self.is_refreshed.set()
        return True

    def score(self, requests: Any) -> list[TeacherRows]:
        self.is_scoring.set()
        assert self.may_score.wait(60)
        if self._fails:
            raise WorkerError("the teacher died")
        self.log.append([request.key for request in requests])
        return [
            TeacherRows(
                request.key,
                request.view,
                request.positions,
                np.array([[self.step, ord(request.key.prompt_id) + request.key.sample]] * len(request.positions)),
                np.zeros(0),
                np.zeros(0),
            )
            for request in requests
        ]


@dataclass
class Side:
    teacher: Teacher = field(default_factory=Teacher)
    encoder: PromptEncoder = field(default_factory=lambda: PromptEncoder(Letters(), "", {}))
    teacher_cost: TeacherCost = field(default_factory=lambda: TeacherCost((SHAPE,)))


def with_sections(config: RunConfig, **sections: Any) -> RunConfig:
    given = config.model_dump(mode="json", exclude_defaults=True)
    return RunConfig.model_validate({**given, **sections})


ONE_BY_ONE = {"max_tokens_per_batch": 1}
SYNCHRONOUS = with_sections(configured(SPANS), teacher=ONE_BY_ONE)


def found(evidence: Evidence) -> dict[Any, Any]:
    return {name: (rows.positions.tolist(), rows.hidden.tolist()) for name, rows in evidence.teacher_rows.items()}


def all_of(groups: list[list[AnnotatedRollout]]) -> list[AnnotatedRollout]:
    return [item for group in groups for item in group]


def test_each_prompt_is_sent_once_it_is_complete_and_after_the_weights() -> None:
    side = Side()
    with TeacherScoring(SYNCHRONOUS, side, 0) as scoring:
        scoring.add(1, GROUPS[1])
        assert side.teacher.is_scoring.wait(60)  # nothing else was called
        scoring.add(0, GROUPS[0])
        scoring.add(2, GROUPS[2])  # without a span: nobody is asked
        scoring.finish(route_rollouts(all_of(GROUPS), SYNCHRONOUS, 0, scoring.routes))
    assert side.teacher.log == ["step 0", [RolloutKey("q", 0)], [RolloutKey("p", 0)]]


def test_prompts_that_fill_a_batch_together_share_a_call_whatever_comes_first() -> None:
    # of 8 completions of at most 100 tokens each
    together = with_sections(configured(SPANS), teacher={"max_tokens_per_batch": 1600 + 799})
    assert together.prompts_scored_together == 2
    side = Side()
    with TeacherScoring(together, side, 0) as scoring:
        scoring.add(2, GROUPS[2])
        scoring.add(1, GROUPS[1])
        assert not scoring.routes
        scoring.add(0, GROUPS[0])
        assert {key.prompt_id for key in scoring.routes} == {"p", "q"}
        scoring.finish(route_rollouts(all_of(GROUPS), together, 0, scoring.routes))
    # the third prompt, for whose call there is no fourth, has no span
    assert side.teacher.log == ["step 0", [RolloutKey("p", 0), RolloutKey("q", 0)]]


def test_what_is_left_of_the_last_call_is_asked_for_at_the_end() -> None:
    config = with_sections(configured({"all": {**ALL, "action": "fkl"}}), teacher={"max_tokens_per_batch": 1600})
    side = Side()
    with TeacherScoring(config, side, 0) as scoring:
        for place, group in enumerate(GROUPS):
            scoring.add(place, group)
        scoring.finish(route_rollouts(all_of(GROUPS), config, 0, scoring.routes))
    calls = [[key.prompt_id for key in call] for call in side.teacher.log[1:]]
    assert calls == [["p", "p", "q"], ["r", "r"]]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_answers_and_figures_are_those_of_asking_at_the_end(order: tuple[int, ...]) -> None:
    with TeacherScoring(SYNCHRONOUS, Side(), 0) as scoring:
        for index in order:
            scoring.add(index, GROUPS[index][::-1])
        routed = route_rollouts(all_of(GROUPS), SYNCHRONOUS, 0, scoring.routes)
        early, early_cost = scoring.finish(routed)
    with TeacherScoring(SYNCHRONOUS, Side(), 0) as scoring:
        plain = route_rollouts(all_of(GROUPS), SYNCHRONOUS, 0)
        late, late_cost = scoring.finish(plain)
    assert found(early) == found(late) and len(found(late)) == 2
    assert early_cost == late_cost
    assert [(item.key, item.advantage) for item in routed] == [(item.key, item.advantage) for item in plain]
    for one, other in zip(routed, plain, strict=True):
        assert [tokens.positions.tolist() for tokens in one.routed] == [t.positions.tolist() for t in other.routed]


def test_advantages_are_those_of_the_whole_batch() -> None:
    config = with_sections(configured(SPANS, advantage="whitened"), teacher=ONE_BY_ONE)
    with TeacherScoring(config, Side(), 0) as scoring:
        for place, group in enumerate(GROUPS):
            scoring.add(place, group)
        routed = route_rollouts(all_of(GROUPS), config, 0, scoring.routes)
        scoring.finish(routed)
    expected = [item.advantage for item in route_rollouts(all_of(GROUPS), config, 0)]
    assert [item.advantage for item in routed] == expected


LATE = {
    "asynchronous": with_sections(
        SYNCHRONOUS,
        scheduling={"max_staleness": 1},
        algorithm={"routes": SPANS, "rollout_correction": {"level": "stale"}},
    ),
    "oversampling": with_sections(SYNCHRONOUS, scheduling={"oversampling_frac": 0.5, "late": "drop"}),
    "colocated": with_sections(SYNCHRONOUS, placement={"mode": "colocated"}, learner={"zero_stage": 1}),
    "on an engine's GPU": with_sections(SYNCHRONOUS, placement={"teacher_place": "with_generator"}),
    "running average": with_sections(SYNCHRONOUS, teacher={**ONE_BY_ONE, "weights": {"type": "ema", "rate": 0.1}}),
}


@pytest.mark.parametrize("case", LATE)
def test_where_it_is_not_certain_what_is_trained_on_all_are_sent_at_the_end(case: str) -> None:
    side, config = Side(), LATE[case]
    with TeacherScoring(config, side, 3) as scoring:
        for place, group in enumerate(GROUPS):
            scoring.add(place, group)
        assert not side.teacher.is_refreshed.wait(0.2) and not scoring.routes
        scoring.finish(route_rollouts(all_of(GROUPS), config, 3, scoring.routes))
    assert side.teacher.log == ["step 3", [RolloutKey("p", 0), RolloutKey("q", 0)]]


def test_without_an_active_route_the_teacher_is_left_alone() -> None:
    side = Side()
    with TeacherScoring(configured(), side, 0) as scoring:
        scoring.add(0, GROUPS[0])
        evidence, cost = scoring.finish(route_rollouts(GROUPS[0], configured(), 0, scoring.routes))
    assert (side.teacher.log, evidence.views, found(evidence)) == ([], [], {})
    assert cost["teacher/flops_saved_frac"] == 1.0


def test_what_the_teacher_raised_meanwhile_is_raised_at_the_end() -> None:
    with TeacherScoring(SYNCHRONOUS, Side(Teacher(fails=True)), 0) as scoring:
        scoring.add(0, GROUPS[0])
        with pytest.raises(WorkerError, match="the teacher died"):
            scoring.finish(route_rollouts(GROUPS[0], SYNCHRONOUS, 0, scoring.routes))


def test_a_failure_is_raised_as_soon_as_another_prompt_is_complete() -> None:
    side = Side(Teacher(fails=True))
    with pytest.raises(WorkerError, match="the teacher died"), TeacherScoring(SYNCHRONOUS, side, 0) as scoring:
        scoring.add(0, GROUPS[0])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            scoring.add(2, GROUPS[2])
            time.sleep(0.01)
    assert side.teacher.log == ["step 0"]


def test_a_run_that_is_told_to_end_waits_for_the_running_call_only() -> None:
    side = Side()
    side.teacher.may_score.clear()
    with pytest.raises(PreemptedError), TeacherScoring(SYNCHRONOUS, side, 0) as scoring:
        for place, group in enumerate(GROUPS):
            scoring.add(place, group)
        assert side.teacher.is_scoring.wait(60)

        def let_it() -> None:
            scoring._is_closed.wait(60)
            side.teacher.may_score.set()

        threading.Thread(target=let_it).start()
        raise PreemptedError("told to end")
    assert side.teacher.log == ["step 0", [RolloutKey("p", 0)]]


def test_a_teacher_that_failed_meanwhile_does_not_keep_a_run_from_its_checkpoint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    side = Side(Teacher(fails=True))
    with pytest.raises(PreemptedError), TeacherScoring(SYNCHRONOUS, side, 0) as scoring:
        scoring.add(0, GROUPS[0])
        assert side.teacher.is_scoring.wait(60)
        raise PreemptedError("told to end")
    assert "The teacher failed while the run was told to end: the teacher died" in caplog.text


def test_a_run_that_fails_or_is_interrupted_does_not_wait_for_a_teacher_that_hangs() -> None:
    side = Side()
    side.teacher.may_score.clear()
    with pytest.raises(KeyboardInterrupt), TeacherScoring(SYNCHRONOUS, side, 0) as scoring:
        scoring.add(0, GROUPS[0])
        assert side.teacher.is_scoring.wait(60)
        raise KeyboardInterrupt
    assert scoring._thread.is_alive() and scoring._thread.daemon
    side.teacher.may_score.set()
    scoring._thread.join(60)
    assert not scoring._thread.is_alive()


def test_a_teacher_that_hangs_is_named_at_the_deadline_of_the_stage() -> None:
    config, side = with_sections(SYNCHRONOUS, placement={"step_timeout_s": 0.3}), Side()
    side.teacher.may_score.clear()
    with TeacherScoring(config, side, 7) as scoring:
        with pytest.raises(
            DeadlineError, match=r"did not finish scoring within 0.3 s after the last rollout of step 7"
        ):
            scoring.finish(route_rollouts(GROUPS[0], config, 7))
        side.teacher.may_score.set()
