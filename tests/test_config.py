"""RunConfig: strict sections, and the checks that need more than one of them."""

from typing import Any

import pytest
from pydantic import ValidationError

from trace_rl.advantages import GroupAdvantage
from trace_rl.config.run import RunConfig
from trace_rl.config.teacher import Periodic
from trace_rl.contexts import Context
from trace_rl.policy_gradients import Clipped, Gspo
from trace_rl.segments import Segmentation


def build(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "m"}, "data": {"path": "d"}, **sections})


def route(rollouts: str, tokens: str, **settings: Any) -> dict[str, Any]:
    return {"selector": {"rollouts": rollouts, "tokens": tokens}, "action": "fkl", **settings}


def test_defaults_are_the_papers() -> None:
    config = build(algorithm={"routes": {"r": route("correct", "key_spans")}})
    settings = config.algorithm.routes["r"]
    assert config.algorithm.advantage == GroupAdvantage(std="sample")
    assert config.algorithm.policy_gradient == Clipped(clip_low=0.2, clip_high=0.28)
    assert settings.schedule.model_dump() == {
        "type": "hold_then_linear", "initial": 0.5, "hold_steps": 10, "decay_steps": 30,
    }  # fmt: skip
    assert (settings.action.clip.threshold, settings.multiplier, settings.on_routed) == (0.05, 1.0, "ramp")
    assert config.annotator.coverage_cap == 0.25
    assert config.teacher.context == Context(pieces=("type_label",))
    assert config.teacher.weights == Periodic(every=10)
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
        {"run": {"steps": -1}},
        {"run": {"steps": "many"}},
        {"sampling": {"samples_per_prompt": 1}},
        {"sampling": {"samples_per_prompt": 0}},
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
    with pytest.raises(ValidationError, match=f"spans exist on {right} rollouts only; set rollouts: {right}"):
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


NO_PG = {"advantage": "none", "policy_gradient": "none"}
ALL = {"tokens": "all"}
NLL = {"routes": {"r": {"selector": ALL, "action": "nll"}}, **NO_PG}


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"sampling": {"top_p": 0.9}}, "sampling.top_p is 0.9, but a policy gradient"),
        ({"sampling": {"top_k": 20}}, "set sampling.top_p=1 and sampling.top_k=0, or algorithm.policy_gradient=none"),
        ({"sampling": {"source": "solutions"}}, "needs completions that the policy has sampled"),
        ({"sampling": {"samples_per_prompt": 1}}, "compares the completions of one prompt"),
        ({"sampling": {"off_policy_frac": 0.5}}, "sampling.off_policy_frac is 0.5, but sampling.source is policy"),
        ({"algorithm": NO_PG}, "no route adds a term to the loss, so nothing is trained"),
        (
            {
                "algorithm": {
                    **NO_PG,
                    "routes": {
                        "a": {"selector": ALL, "action": "ktae"},
                        "b": {"selector": ALL, "action": "fkl"},
                    },
                }
            },
            "algorithm.routes.a.action ktae changes the advantage",
        ),
        (
            {"algorithm": {"routes": {"r": {"selector": {"tokens": "top"}, "action": "ktae"}}}},
            "selector.tokens top goes with an action that adds a term to the loss",
        ),
        (
            {"algorithm": NLL, "sampling": {"source": "teacher"}},
            "teacher.weights.type = periodic moves with the policy",
        ),
        (
            {
                "algorithm": {**NLL, "routes": {"r": {**NLL["routes"]["r"], "token_weight": "student_perplexity"}}},
                "sampling": {"source": "solutions"},
            },
            "token_weight student_perplexity reads the sampler's log-probs",
        ),
        (
            {"algorithm": {"routes": {"r": {"selector": ALL, "action": {"type": "jsd", "support": "sampled"}}}}},
            "action jsd has no estimator from the sampled token",
        ),
        (
            {
                "algorithm": {"routes": {"r": {"selector": ALL, "action": "pg_logratio"}}},
                "sampling": {"temperature": 0.6},
            },
            "at algorithm.routes.r.temperature = 1, but they were sampled at sampling.temperature = 0.6",
        ),
        (
            {
                "algorithm": {
                    "policy_gradient": "none",
                    "routes": {"r": {"selector": ALL, "action": {"type": "rkl", "support": "sampled"}}},
                },
                "sampling": {"top_k": 20},
            },
            "averages over tokens as samples of the policy's whole distribution, but sampling.source is policy, "
            "sampling.top_p 1 and sampling.top_k 20",
        ),
        (
            {
                "algorithm": {
                    "policy_gradient": "none",
                    "routes": {"r": {"selector": ALL, "action": {"type": "rkl", "support": "sampled"}}},
                },
                "scheduling": {"max_staleness": 1},
            },
            "averages over tokens as samples of the policy, but scheduling.max_staleness is 1",
        ),
        (
            {"scheduling": {"oversampling_frac": 0.5}},
            "scheduling.oversampling_frac is 0.5, but scheduling.late is wait",
        ),
        ({"algorithm": {"advantage": "gruop"}}, "the type 'gruop'; did you mean 'group'?"),
        (
            {"watch": {"action": "stop"}, "evaluation": {"every": 0}},
            "watch.action is stop, but evaluation.every is 0",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**sections)
    assert sentence in str(caught.value)


def test_what_goes_together() -> None:
    build(
        algorithm=NLL, sampling={"source": "solutions", "off_policy_frac": 0.5, "samples_per_prompt": 1, "top_p": 0.9}
    )
    build(algorithm=NLL, sampling={"source": "teacher"}, teacher={"weights": "frozen"})
    build(algorithm={"advantage": "whitened"}, sampling={"samples_per_prompt": 1})
    build(watch={"action": "warn"}, evaluation={"every": 0})
    build(watch={"action": "stop"}, evaluation={"every": 1})


def test_kinds_are_given_by_name_mapping_or_instance() -> None:
    by_name = build(algorithm={"policy_gradient": "gspo"})
    by_mapping = build(algorithm={"policy_gradient": {"type": "gspo"}})
    by_instance = build(algorithm={"policy_gradient": Gspo()})
    assert by_name == by_mapping == by_instance


def test_rollout_filters_are_one_or_a_list() -> None:
    one = build(algorithm={"routes": {"r": route("correct", "key_spans")}})
    several = build(algorithm={"routes": {"r": route(["correct", "mixed_group"], "key_spans")}})  # type: ignore[arg-type]
    assert one.algorithm.routes["r"].selector.rollouts == ("correct",)
    assert several.algorithm.routes["r"].selector.rollouts == ("correct", "mixed_group")


def test_who_is_started_follows_from_what_routes_read() -> None:
    ramp = build(algorithm={"routes": {"r": route("correct", "key_spans", action="none")}})
    assert (ramp.needs_teacher, ramp.needs_annotator) == (False, True)
    reference = build(algorithm={"routes": {"r": {"selector": ALL, "action": "fkl"}}}, teacher={"context": "reference"})
    assert (reference.needs_teacher, reference.needs_annotator) == (True, False)
    counted = build(algorithm={"routes": {"r": {"selector": ALL, "action": "ktae"}}})
    assert (counted.needs_teacher, counted.needs_annotator) == (False, False)


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


def test_tokens_of_older_weights_need_a_correction() -> None:
    without = {"rollout_correction": {"level": "none"}}
    with pytest.raises(ValidationError, match=r"max_staleness is 2, but .*level is none, .*level=stale, or"):
        build(scheduling={"max_staleness": 2}, algorithm=without)
    for level in ("stale", "token", "sequence"):
        build(scheduling={"max_staleness": 2}, algorithm={"rollout_correction": {"level": level}})
    assert build(algorithm=without).algorithm.rollout_correction.level == "none"
    likelihood = {"selector": {"tokens": "all"}, "action": "nll"}
    distils = {"policy_gradient": "none", "advantage": "none", "routes": {"all": likelihood}, **without}
    build(scheduling={"max_staleness": 2}, algorithm=distils)
