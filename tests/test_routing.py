"""Routing: advantages per group, which tokens take which route with which weight, and who is asked."""

from dataclasses import replace

import numpy as np
import pytest
from rollouts import ALL, ERROR, KEY, NO_POLICY_GRADIENT, annotated, configured, error, key

from trace_rl.absent import AbsentAnnotator, AbsentTeacher
from trace_rl.batch import AnnotatedRollout, RolloutKey, RoutedRollout, ScoredTokens, TeacherRequest
from trace_rl.config.run import RunConfig
from trace_rl.routing import (
    active_span_classes,
    keep_top_tokens,
    policy_weights,
    route_rollouts,
    teacher_views,
)

GRPO = configured()
TRACE = configured({"key_spans": KEY, "error_spans": ERROR})
# A mixed group with spans of both classes on each rollout: only the class that fits the reward may be routed.
MIXED = [
    annotated("p", 0, 6, 1.0, key(1, 3), error(4, 5)),
    annotated("p", 1, 4, 0.0, key(0, 1), error(2, 4)),
]


def taken(item: RoutedRollout) -> dict[int, list[int]]:
    return {tokens.route: tokens.positions.tolist() for tokens in item.routed}


def weights(item: RoutedRollout, config: RunConfig, step: int) -> list[float]:
    return policy_weights(item, config.algorithm, step).tolist()


def test_key_spans_are_routed_on_correct_rollouts_and_error_spans_on_wrong_ones() -> None:
    correct, wrong = route_rollouts(MIXED, TRACE, step=0)
    assert taken(correct) == {0: [1, 2]}
    assert taken(wrong) == {1: [2, 3]}


def test_a_class_without_a_route_keeps_its_policy_gradient() -> None:
    config = configured({"key_spans": KEY})
    correct, wrong = route_rollouts(MIXED, config, step=0)
    assert weights(correct, config, 0) == [1, 0, 0, 1, 1, 1]
    assert weights(wrong, config, 0) == [1, 1, 1, 1]
    assert taken(wrong) == {}


# lambda and the ramp 1 - lambda/lambda_0 at steps of the published schedule (0.5, hold 10, decay 30)
@pytest.mark.parametrize(("step", "kl", "pg"), [(0, 0.5, 0.0), (10, 0.5, 0.0), (25, 0.25, 0.5), (39, 1 / 60, 29 / 30)])
def test_weights_follow_the_schedule(step: int, kl: float, pg: float) -> None:
    correct, _ = route_rollouts(MIXED, TRACE, step)
    assert correct.routed[0].weight == pytest.approx(kl, abs=1e-12)
    assert weights(correct, TRACE, step) == pytest.approx([1, pg, pg, 1, 1, 1], abs=1e-12)


@pytest.mark.parametrize(("on_routed", "pg"), [("ramp", 0.0), ("keep", 1.0), ("replace", 0.0)])
def test_policy_gradient_on_routed_tokens(on_routed: str, pg: float) -> None:
    config = configured({"r": {**KEY, "on_routed": on_routed, "multiplier": 3.0}})
    correct, _ = route_rollouts(MIXED, config, step=0)
    assert weights(correct, config, 0) == [1, pg, pg, 1, 1, 1]
    assert correct.routed[0].weight == 1.5  # 0.5 x 3


def test_a_token_belongs_to_the_first_exclusive_route_that_selects_it() -> None:
    config = configured({"first": KEY, "second": {**ALL, "action": "rkl", "on_routed": "replace"}})
    correct, _ = route_rollouts(MIXED, config, step=0)
    assert taken(correct) == {0: [1, 2], 1: [0, 3, 4, 5]}
    # at step 40 the first route has ended, and the second one has its place
    correct, _ = route_rollouts(MIXED, config, step=40)
    assert taken(correct) == {1: [0, 1, 2, 3, 4, 5]}


def test_routes_that_keep_the_policy_gradient_share_tokens() -> None:
    config = configured({"first": KEY, "second": {**ALL, "action": "rkl"}})
    correct, _ = route_rollouts(MIXED, config, step=25)
    assert taken(correct) == {0: [1, 2], 1: [0, 1, 2, 3, 4, 5]}
    assert weights(correct, config, 25) == [1, 0.5, 0.5, 1, 1, 1]


def test_an_advantage_is_changed_once_and_its_action_takes_the_policy_weight_into_account_itself() -> None:
    mult, ktae = {**ALL, "action": "adv_mult"}, {**ALL, "action": "ktae"}
    config = configured({"first": {**mult, "on_routed": "replace"}, "second": ktae})
    correct, _ = route_rollouts(MIXED, config, step=0)
    assert taken(correct) == {0: [0, 1, 2, 3, 4, 5]}
    assert weights(correct, config, 0) == [1.0] * 6


def test_overlapping_spans_count_once() -> None:
    (item,) = route_rollouts([annotated("p", 0, 6, 1.0, key(1, 4), key(3, 5))], TRACE, step=0)
    assert taken(item) == {0: [1, 2, 3, 4]}


def test_only_classes_with_an_active_route_are_annotated() -> None:
    assert active_span_classes(GRPO, 0) == frozenset()
    assert active_span_classes(TRACE, 0) == {"key", "error"}
    assert active_span_classes(configured({"r": KEY}), 39) == {"key"}
    assert active_span_classes(TRACE, 40) == frozenset()


@pytest.mark.parametrize(
    ("selector", "context", "action", "classes"),
    [
        ({"rollouts": "correct", "tokens": "all"}, "type_label", "fkl", {"key"}),
        ({"rollouts": "wrong", "tokens": "all"}, "type_label", "rkl", {"error"}),
        ({"tokens": "all"}, "type_label", "fkl", {"key", "error"}),
        ({"tokens": "all"}, "none", "fkl", set()),
        ({"tokens": "all"}, "type_label", "nll", set()),  # nobody reads the label
        ({"rollouts": "longest_wrong", "tokens": "all"}, "reflection", "fkl", {"error"}),
        ({"rollouts": "correct", "tokens": "random"}, "none", "fkl", {"key"}),
        ({"rollouts": "correct", "tokens": {"type": "random", "frac": 0.2}}, "none", "fkl", set()),
        ({"rollouts": "correct", "tokens": {"type": "inverted", "frac": 0.2}}, "none", "fkl", {"key"}),
    ],
)
def test_who_has_to_be_annotated_for_a_route(selector: object, context: str, action: str, classes: set[str]) -> None:
    config = configured({"r": {"selector": selector, "action": action, "context": context}})
    assert active_span_classes(config, 0) == classes


def test_routes_that_look_alike_share_a_view() -> None:
    states, logprobs = {**ALL, "action": "fkl"}, {**ALL, "action": "pg_logratio"}
    config = configured(
        {
            "a": states,
            "b": logprobs,
            "c": {**states, "temperature": 2.0},
            "d": {**states, "context": "answer"},
            "e": {**ALL, "action": "nll"},
            "f": {**states, "token_weight": "teacher_entropy", "context": "answer"},
        }
    )
    shared, warm, told = teacher_views(config, 0)
    assert (shared.routes, shared.outputs) == ({0, 1}, {"states", "logprobs"})
    assert (warm.routes, warm.temperature) == ({2}, 2.0)
    assert (told.routes, told.outputs, told.context.pieces) == ({3, 5}, {"states", "entropy"}, ("answer",))
    assert teacher_views(TRACE, 40) == []


def test_advantages_compare_the_completions_of_one_prompt() -> None:
    # p: 1, 0 -> mean 1/2, sample std sqrt(1/2) -> +-1/sqrt 2; q: all correct -> 0
    rollouts = [
        annotated("q", 1, 2, 1.0),
        annotated("p", 1, 2, 0.0),
        annotated("q", 0, 2, 1.0),
        annotated("p", 0, 2, 1.0),
    ]
    routed = route_rollouts(rollouts, GRPO, step=0)
    assert [item.key for item in routed] == [("p", 0), ("p", 1), ("q", 0), ("q", 1)]
    root = 0.5**0.5
    assert [item.advantage for item in routed] == pytest.approx([root, -root, 0.0, 0.0], abs=2e-6)
    assert routed[2].advantage == routed[3].advantage == 0.0


def test_whitened_advantages_see_the_whole_batch() -> None:
    # rewards 1, 0, 1, 1: mean 3/4, variance 3/16
    rollouts = [
        annotated("p", 0, 2, 1.0),
        annotated("p", 1, 2, 0.0),
        annotated("q", 0, 2, 1.0),
        annotated("q", 1, 2, 1.0),
    ]
    routed = route_rollouts(rollouts, configured(advantage="whitened"), 0)
    root = 3**0.5
    assert [item.advantage for item in routed] == pytest.approx([1 / root, -root, 1 / root, 1 / root], abs=1e-6)


@pytest.mark.parametrize(
    "tokens", ["key_spans", {"type": "random", "like": "key_spans"}, {"type": "inverted", "shape": "spans"}], ids=str
)
def test_the_order_of_arrival_does_not_matter(tokens: object) -> None:
    config = configured({"r": {**KEY, "selector": {"rollouts": "correct", "tokens": tokens}}})
    rollouts = [annotated(prompt, sample, 9, float(sample == 1), key(1, 3)) for prompt in "ba" for sample in (2, 0, 1)]
    one, other = route_rollouts(rollouts, config, 0), route_rollouts(rollouts[::-1], config, 0)
    assert [item.key for item in one] == [item.key for item in other]
    assert [taken(item) for item in one] == [taken(item) for item in other]
    assert [item.advantage for item in one] == [item.advantage for item in other]


def test_drawn_tokens_change_with_step_seed_and_rollout_and_nothing_else() -> None:
    def drawn(seed: int, step: int, prompt: str = "p") -> list[int]:
        config = configured(
            {"r": {**ALL, "action": "fkl", "selector": {"tokens": {"type": "random", "frac": 0.2}}}}, seed
        )
        (item,) = route_rollouts([annotated(prompt, 0, 60, 1.0)], config, step)
        return taken(item)[0]

    assert drawn(0, 3) == drawn(0, 3)
    assert len({tuple(each) for each in (drawn(0, 3), drawn(0, 4), drawn(1, 3), drawn(0, 3, "q"))}) == 4


def test_an_empty_rollout_counts_in_its_group_and_is_left_out() -> None:
    rollouts = [annotated("p", 0, 0, 0.0), annotated("p", 1, 3, 1.0)]
    (routed,) = route_rollouts(rollouts, GRPO, step=0)
    assert routed.key == ("p", 1)
    assert routed.advantage == pytest.approx(0.5**0.5, abs=2e-6)
    assert len(routed.member.group) == 2


def test_masked_overlong_rollouts_count_in_their_group_and_are_left_out() -> None:
    rollouts = [annotated("p", 0, 100, 0.0, finish_reason="length"), annotated("p", 1, 3, 1.0)]
    (routed,) = route_rollouts(rollouts, configured(overlong={"mask": True}), step=0)
    assert routed.key == ("p", 1)
    assert routed.advantage == pytest.approx(0.5**0.5, abs=2e-6)


def test_length_costs_reward_and_not_correctness() -> None:
    # 100 tokens allowed, penalty over the last 20: 90 tokens cost 1/2. Rewards 1/2 and 0: centred +-1/4
    config = configured(advantage={"type": "group", "std": "none"}, overlong={"penalty_frac": 0.2})
    long, short = route_rollouts([annotated("p", 0, 90, 1.0), annotated("p", 1, 3, 0.0)], config, 0)
    assert (long.advantage, short.advantage) == (0.25, -0.25)
    assert long.member.graded.is_correct


def test_the_highest_scores_of_the_batch_are_kept() -> None:
    top = {"type": "top", "frac": 0.5, "score": "policy_entropy"}
    other = {**ALL, "action": "nll"}
    route = {**ALL, "action": "rkl", "selector": {"tokens": top}, "context": "none"}
    config = configured({"top": route, "other": other}, **NO_POLICY_GRADIENT)
    routed = route_rollouts([annotated("p", 0, 3, 1.0), annotated("p", 1, 3, 1.0)], config, 0)
    # entropies 1 2 9 | 3 4 5: the half that is kept are 9, 5 and 4
    candidates = {item.key: scored(item, values) for item, values in zip(routed, ([1, 2, 9], [3, 4, 5]), strict=True)}
    first, second = keep_top_tokens(routed, {0: candidates}, config)
    assert taken(first) == {0: [2], 1: [0, 1, 2]}
    assert taken(second) == {0: [1, 2], 1: [0, 1, 2]}


def test_candidates_that_are_not_kept_stay_open_to_later_routes() -> None:
    top = {"type": "top", "frac": 0.5, "score": "policy_entropy"}
    constant = {"type": "constant", "value": 1.0}
    first = {"action": "rkl", "selector": {"tokens": top}, "context": "none", "on_routed": "replace"}
    later = {"action": "nll", "selector": {"tokens": "all"}, "on_routed": "replace"}
    config = configured({"top": {**first, "schedule": constant}, "rest": {**later, "schedule": constant}})
    (routed,) = route_rollouts([annotated("p", 0, 4, 1.0)], config, 0)
    assert taken(routed) == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    (kept,) = keep_top_tokens([routed], {0: {routed.key: scored(routed, [1, 8, 2, 9])}}, config)
    assert taken(kept) == {0: [1, 3], 1: [0, 2]}


def scored(item: RoutedRollout, entropies: list[float]) -> ScoredTokens:
    none = np.zeros(0)
    return ScoredTokens(item.member, 0.0, np.arange(len(entropies)), none, none, np.array(entropies, dtype=float), none)


def test_stand_ins_pass_everything_on_and_refuse_real_work() -> None:
    graded = [item.graded for item in MIXED]
    passed = list(AbsentAnnotator().annotate(iter(graded), frozenset()))
    assert [item.graded for item in passed] == graded
    assert {(item.spans, item.cause) for item in passed} == {((), "not_requested")}
    assert AbsentAnnotator().metrics() == {}
    with pytest.raises(ValueError, match="no annotator"):
        list(AbsentAnnotator().annotate(graded, frozenset({"key"})))
    assert AbsentTeacher().score([]) == []
    assert AbsentTeacher().refresh(0) is False
    request = TeacherRequest(RolloutKey("p", 0), 0, (1,), (2,), np.array([0]), frozenset({"states"}))
    with pytest.raises(ValueError, match="no teacher"):
        AbsentTeacher().score([request])


def test_without_spans_nothing_is_routed() -> None:
    bare: list[AnnotatedRollout] = [replace(item, spans=()) for item in MIXED]
    assert [taken(item) for item in route_rollouts(bare, TRACE, 0)] == [{}, {}]
