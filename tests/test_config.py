"""RunConfig: strict sections, and the checks that need more than one of them."""

from typing import Any

import pytest
from pydantic import ValidationError

from trace_rl.config.roles import Segmentation
from trace_rl.config.run import RunConfig


def build(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, **sections})


def route(rollouts: str, tokens: str, **settings: Any) -> dict[str, Any]:
    return {"selector": {"rollouts": rollouts, "tokens": tokens}, "action": "fkl", **settings}


def test_defaults_are_the_papers() -> None:
    config = build(algorithm={"routes": {"r": route("correct", "key_spans")}})
    policy_gradient, settings = config.algorithm.policy_gradient, config.algorithm.routes["r"]
    assert (policy_gradient.clip_low, policy_gradient.clip_high, policy_gradient.std) == (0.2, 0.28, "sample")
    assert settings.schedule.model_dump() == {
        "type": "hold_then_linear", "initial": 0.5, "hold_steps": 10, "decay_steps": 30,
    }  # fmt: skip
    assert (settings.clip.threshold, settings.multiplier, settings.on_routed) == (0.05, 1.0, "ramp")
    assert config.annotator.coverage_cap == 0.25
    assert (config.teacher.context, config.teacher.weights.type, config.teacher.weights.every) == (
        "type_label", "periodic", 10,
    )  # fmt: skip
    assert config.algorithm.aggregation == "seq-mean-token-mean"


def test_without_routes_there_is_no_teacher() -> None:
    assert not build().needs_teacher
    assert build(algorithm={"routes": {"r": route("correct", "key_spans")}}).needs_teacher


def test_the_longest_sequence_is_prompt_plus_response() -> None:
    config = build(sampling={"max_prompt_tokens": 100, "max_response_tokens": 23})
    assert config.max_sequence_tokens == 123


def test_sections_are_frozen() -> None:
    config = build()
    with pytest.raises(ValidationError, match="frozen"):
        config.run.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "sections",
    [
        {"typo": {}},
        {"run": {"stepz": 3}},
        {"algorithm": {"routes": {"r": route("correct", "key_spans", lambda_0=0.5)}}},
        {"run": {"steps": 0}},
        {"run": {"steps": "many"}},
        {"sampling": {"samples_per_prompt": 1}},
        {"sampling": {"temperature": 0.0}},
        {"learner": {"optimizer": {"learning_rate": float("nan")}}},
        {"sync": {"timeout_s": float("inf")}},
        {"learner": {"zero_stage": 4}},
        {"annotator": {"coverage_cap": 0.0}},
        {"annotator": {"coverage_cap": 1.1}},
        {"algorithm": {"policy_gradient": {"dual_clip": 1.0}}},
        {"algorithm": {"routes": {"r": route("correct", "key_spans", schedule={"type": "cosine"})}}},
        {"algorithm": {"routes": {"r": {"action": "fkl"}}}},
    ],
    ids=str,
)
def test_what_is_unknown_or_out_of_range_is_refused(sections: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build(**sections)


@pytest.mark.parametrize(
    ("rollouts", "tokens", "right"), [("wrong", "key_spans", "correct"), ("correct", "error_spans", "wrong")]
)
def test_spans_must_exist_on_the_rollouts_of_a_route(rollouts: str, tokens: str, right: str) -> None:
    with pytest.raises(ValidationError, match=f"{tokens} exist on {right} rollouts only; set rollouts: {right}"):
        build(algorithm={"routes": {"r": route(rollouts, tokens)}})


def test_a_micro_batch_must_hold_the_longest_sequence() -> None:
    sampling = {"max_prompt_tokens": 100, "max_response_tokens": 50}
    build(sampling=sampling, learner={"max_tokens_per_micro_batch": 150})
    with pytest.raises(ValidationError, match="is 149, but one sequence may have 150 tokens"):
        build(sampling=sampling, learner={"max_tokens_per_micro_batch": 149})


def test_minibatches_must_divide_the_prompts() -> None:
    build(sampling={"prompts_per_step": 6}, learner={"minibatches_per_step": 3})
    with pytest.raises(ValidationError, match=r"is 4, which does not divide sampling\.prompts_per_step = 6"):
        build(sampling={"prompts_per_step": 6}, learner={"minibatches_per_step": 4})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{question} {hint}", "unknown field 'hint'"),
        ("{question} {reference}", "unknown field 'reference'; known: {question}, {types}"),
        ("Beware of {types}.", "lacks {question}"),
        ("{question} {", "not a valid template"),
    ],
)
def test_a_teachers_template_must_be_one(template: str, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        build(teacher={"templates": {"type_label": template}})


def test_the_run_folder_knows_one_field() -> None:
    assert build(run={"folder": "here/{name}-x"}).run.folder == "here/{name}-x"
    with pytest.raises(ValidationError, match=r"run\.folder .* unknown field 'date'"):
        build(run={"folder": "here/{date}"})


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ({"boundary": "("}, r"annotator\.segmentation\.boundary '\(' is not a regular expression"),
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens is 9, above max_tokens 8"),
    ],
)
def test_a_segmentation_that_cannot_work_is_refused(segmentation: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Segmentation.model_validate(segmentation)


def test_a_ray_that_is_too_small_for_its_roles_is_refused() -> None:
    # generator 1 + 2 ranks + rewarder 1 = 4; with routes also teacher 1 and annotator 0.5
    sections = {"learner": {"world_size": 2}, "placement": {"ray_cpus": 4}}
    assert build(**sections).cpus_for_roles == 4
    with pytest.raises(ValidationError, match=r"placement\.ray_cpus is 4, but the roles ask for 6 logical CPUs"):
        build(**sections, algorithm={"routes": {"r": route("correct", "key_spans")}})
