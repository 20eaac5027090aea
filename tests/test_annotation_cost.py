"""What a run would ask of its annotator: rollouts a step, times steps whose schedule is above 0, by class of spans."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from recorded import OFF_FORM, SLIPPED, SUM, graded

from trace_rl.batch import GradedRollout
from trace_rl.config.annotator import TypeLists
from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.errors import DataError
from trace_rl.launch.annotation_cost import Cost, estimate, with_verdict
from trace_rl.launch.annotation_report import cost_lines, num_answers
from trace_rl.launch.model_files import EMBEDDED, load_tokenizer, resolve_model
from trace_rl.workers.span_annotator import Surroundings
from trace_rl.workers.token_reader import TokenReader, reader_of

TYPES = TypeLists()
SURROUNDINGS = Surroundings({"key": TYPES.key, "error": TYPES.error}, seed=0, run="", cache_path="")
API = {"type": "api", "base_url": "http://127.0.0.1:1/v1", "name": "m", "max_reply_tokens": 100}
FIVE_STEPS = {"type": "hold_then_linear", "initial": 0.5, "hold_steps": 2, "decay_steps": 3}
"""1/2 at steps 0, 1 and 2, 1/3 at 3, 1/6 at 4, then 0."""
TWO_STEPS = {"type": "linear", "initial": 1.0, "final": 0.0, "steps": 2}
"""1 at step 0, 1/2 at 1, then 0."""
KEY = {"selector": {"rollouts": "correct", "tokens": "key_spans"}, "action": "fkl", "schedule": FIVE_STEPS}
ERROR = {"selector": {"rollouts": "wrong", "tokens": "error_spans"}, "action": "rkl", "schedule": TWO_STEPS}


@dataclass(frozen=True)
class FiftyEach:
    """Reads as the embedded tokenizer; every text counts 50 tokens, so a request of two messages 100."""

    reader: TokenReader

    def convert_ids_to_tokens(self, ids: list[int]) -> Sequence[str | None]:
        return self.reader.convert_ids_to_tokens(ids)

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return self.reader.decode(token_ids, **options)

    def count(self, text: str) -> int:
        return 50

    def special_tokens(self) -> Sequence[str]:
        return self.reader.special_tokens()


@pytest.fixture(scope="module")
def reader() -> FiftyEach:
    return FiftyEach(reader_of(load_tokenizer(resolve_model(Model(path=EMBEDDED)))))


@pytest.fixture(scope="module")
def rollouts() -> list[GradedRollout]:
    """Three correct ones and a wrong one, and one that nobody could grade."""
    return [*(graded(SUM.solution, sample, 1.0) for sample in range(3)), graded(SLIPPED, 3, 0.0),
            graded(OFF_FORM, 4, 0.0, "timeout")]  # fmt: skip


def configured(backend: Any, **routes: Any) -> RunConfig:
    """Ten steps of 16 rollouts."""
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "sampling": {"prompts_per_step": 4, "samples_per_prompt": 4},
            "algorithm": {"routes": routes},
            "annotator": {"backend": backend},
            "run": {"steps": 10},
        }
    )


def test_only_rollouts_of_the_class_are_asked_for_and_only_while_the_schedule_is_on(
    reader: FiftyEach, rollouts: list[GradedRollout]
) -> None:
    cost = estimate(configured(API, key=KEY), rollouts, reader, SURROUNDINGS)
    # 3 of 4 rollouts are correct: 12 of 16 a step, at 5 of 10 steps; 100 tokens each, and at most 100 of an answer
    assert cost == Cost(5, 60, 6000, 6000, is_measured=False, money=0, minutes_at_rate=0)


def test_each_class_has_its_own_steps(reader: FiftyEach, rollouts: list[GradedRollout]) -> None:
    cost = estimate(configured(API, key=KEY, error=ERROR), rollouts, reader, SURROUNDINGS)
    # and 4 wrong ones a step at steps 0 and 1
    assert (cost.steps, cost.requests, cost.prompt_tokens) == (5, 68, 6800)


def test_a_route_whose_schedule_is_never_on_costs_nothing(reader: FiftyEach, rollouts: list[GradedRollout]) -> None:
    off = {**KEY, "schedule": {"type": "constant", "value": 0.0}}
    config = configured(API, key=off)
    cost = estimate(config, rollouts, reader, SURROUNDINGS)
    assert (cost.steps, cost.requests, cost.completion_tokens) == (0, 0, 0)
    (line,) = cost_lines(config, cost, 4)
    assert line.startswith("A run of 10 steps asks its annotator nothing: no route reads spans")


def test_answers_are_as_long_as_measured_and_have_a_price(reader: FiftyEach, rollouts: list[GradedRollout]) -> None:
    budget = {"price_per_million_prompt_tokens": 2.0, "price_per_million_completion_tokens": 10.0}
    config = configured({**API, "budget": budget, "limits": {"requests_per_minute": 30}}, key=KEY)
    at_most = estimate(config, rollouts, reader, SURROUNDINGS)
    # 6,000 prompt tokens at 2 and 6,000 completion tokens at 10 a million; 60 requests at 30 a minute
    assert at_most.money == pytest.approx(0.012 + 0.06)
    assert at_most.minutes_at_rate == 2
    measured = estimate(config, rollouts, reader, SURROUNDINGS, completion_tokens=7.5)
    assert (measured.completion_tokens, measured.is_measured) == (450, True)
    assert measured.money == pytest.approx(0.012 + 0.0045)
    assert cost_lines(config, at_most, 4) == [
        "A run of 10 steps asks its annotator at 5 of them. With rollouts like the 4 recorded ones, and without "
        "repeated requests, that is",
        "  60 requests, 12 a step",
        "  6,000 prompt tokens, by the policy's tokenizer",
        "  6,000 completion tokens, at most, by annotator.backend.max_reply_tokens",
        "  0.07 at the prices of annotator.backend.budget",
        "  2 minutes at annotator.backend.limits.requests_per_minute",
    ]
    assert "  450 completion tokens, by the answers above" in cost_lines(config, measured, 4)


def test_requests_that_failed_are_no_answers() -> None:
    metrics = {"annotation/requests": 9.0, "annotation/faults/timeout": 1.0, "annotation/faults/unreachable": 3.0}
    assert num_answers(metrics) == 5
    assert num_answers({"annotation/annotated": 3.0}) == 0


def test_a_control_costs_what_the_model_costs_that_it_asks(reader: FiftyEach, rollouts: list[GradedRollout]) -> None:
    asked = estimate(configured(API, key=KEY), rollouts, reader, SURROUNDINGS)
    assert estimate(configured({"type": "inverted", "of": API}, key=KEY), rollouts, reader, SURROUNDINGS) == asked


def test_what_the_request_holds_is_counted_by_the_tokenizer(rollouts: list[GradedRollout]) -> None:
    reader = reader_of(load_tokenizer(resolve_model(Model(path=EMBEDDED))))
    tokens = {}
    for privileges in ([], ["reference", "answer"]):
        config = configured(API, key=KEY)
        annotator = config.annotator.model_copy(update={"privileges": tuple(privileges)})
        config = config.model_copy(update={"annotator": annotator})
        tokens[len(privileges)] = estimate(config, rollouts, reader, SURROUNDINGS).prompt_tokens / 60
    # what a request gains: "reference_solution" and "answer" with their texts of 26 and 2 tokens
    assert 28 < tokens[2] - tokens[0] < 28 + 60
    assert tokens[0] == int(tokens[0]) > 100


def test_rules_cost_nothing(reader: FiftyEach, rollouts: list[GradedRollout]) -> None:
    for backend in ("oracle", "random"):
        with pytest.raises(DataError, match=f"annotator.backend is {backend}, which asks no model and costs nothing"):
            estimate(configured(backend, key=KEY), rollouts, reader, SURROUNDINGS)


def test_rollouts_without_a_verdict_say_nothing(reader: FiftyEach) -> None:
    ungraded = [graded(OFF_FORM, 0, 0.0, "timeout"), graded("", 1, 0.0, "graded", "length")]
    with pytest.raises(DataError, match="none of the 2 recorded rollouts has tokens and a verdict"):
        estimate(configured(API, key=KEY), ungraded, reader, SURROUNDINGS)
    truncated = graded(SLIPPED, 2, 0.0, "truncated", "length")
    assert with_verdict([*ungraded, truncated]) == [truncated]
