"""The layout of a run: who shares a bundle, who is whose guest, and what a cluster lacks for it, in a sentence."""

from typing import Any

import pytest
from pydantic import ValidationError

from trace_rl.config.run import RunConfig
from trace_rl.launch.placement import Node, PlacementPlan, missing, plan_annotation, plan_placement

GPU = {"num_gpus": 1}
ROUTES = {"r": {"selector": {"rollouts": "correct", "tokens": "key_spans"}, "action": "fkl"}}


def configured(**sections: Any) -> RunConfig:
    defaults = {"model": {"path": "m"}, "data": {"path": "d"}, "algorithm": {"routes": ROUTES}}
    return RunConfig.model_validate(defaults | sections)


def laid_out(**sections: Any) -> PlacementPlan:
    return plan_placement(configured(**sections))


def table(plan: PlacementPlan) -> list[tuple[list[str], dict[str, float]]]:
    return [(plan.roles_of(number), dict(bundle)) for number, bundle in enumerate(plan.bundles)]


def test_every_role_has_a_bundle_of_its_own() -> None:
    plan = laid_out(
        generator={"num_engines": 2, "tensor_parallel": 2},
        learner={"world_size": 2},
        placement={"generator": {"num_cpus": 3, "num_gpus": 1, "custom": {"a100": 0.5}}, "learner": GPU},
    )
    # an engine of two workers takes twice what one takes, on one node: 2 x (3 CPU, 1 GPU, 0.5 a100)
    engine = {"CPU": 6.0, "GPU": 2.0, "a100": 1.0}
    assert table(plan) == [
        (["generator engine 0"], engine),
        (["generator engine 1"], engine),
        (["learner rank 0"], {"CPU": 1.0, "GPU": 1.0}),
        (["learner rank 1"], {"CPU": 1.0, "GPU": 1.0}),
        (["the teacher"], {"CPU": 1.0}),
        (["the rewarder"], {"CPU": 1.0}),
        (["the annotator"], {"CPU": 0.5}),
    ]
    assert plan.total() == {"CPU": 16.5, "GPU": 6.0, "a100": 2.0}
    assert plan.uses_gpu("generator engine 1") and not plan.uses_gpu("the teacher")


@pytest.mark.parametrize("gpus", [0, 1])
def test_colocated_engines_are_guests_of_as_many_ranks_as_they_have_workers(gpus: int) -> None:
    plan = laid_out(
        generator={"num_engines": 2, "tensor_parallel": 2},
        learner={"world_size": 4},
        placement={
            "mode": "colocated",
            "learner": {"num_cpus": 2, "num_gpus": gpus},
            "generator": {"num_cpus": 1, "num_gpus": gpus},
        },
    )
    # two ranks of 2 CPUs and two workers of 1 CPU; GPUs are those of the ranks alone
    shared = {"CPU": 6.0} | ({"GPU": 2.0} if gpus else {})
    assert table(plan)[:2] == [
        (["learner rank 0", "learner rank 1", "generator engine 0"], shared),
        (["learner rank 2", "learner rank 3", "generator engine 1"], shared),
    ]
    engine = plan.seats["generator engine 1"]
    assert engine.hosts == ("learner rank 2", "learner rank 3")
    assert (engine.num_cpus, engine.num_gpus) == (2, 0)
    assert plan.uses_gpu("generator engine 1") == bool(gpus)


@pytest.mark.parametrize(
    ("mode", "place", "hosts"),
    [
        ("disaggregated", "with_learner", ("learner rank 1",)),
        ("disaggregated", "with_generator", ("generator engine 0",)),
        ("colocated", "with_learner", ("learner rank 1",)),
        ("colocated", "with_generator", ("learner rank 0",)),
    ],
)
def test_a_teacher_that_is_a_guest_takes_no_gpu(mode: str, place: str, hosts: tuple[str, ...]) -> None:
    placement = {"mode": mode, "teacher_place": place, "teacher": GPU, "learner": GPU, "generator": GPU}
    plan = laid_out(generator={"num_engines": 2}, learner={"world_size": 2}, placement=placement)
    teacher = plan.seats["the teacher"]
    assert (teacher.hosts, teacher.num_gpus) == (hosts, 0)
    assert teacher.bundle == plan.seats[hosts[0]].bundle and plan.uses_gpu("the teacher")
    assert plan.total()["GPU"] == (2 if mode == "colocated" else 4)


def test_roles_that_a_method_does_not_need_take_nothing() -> None:
    roles = list(laid_out(algorithm={}).seats)
    assert roles == ["generator engine 0", "learner rank 0", "the rewarder"]


def test_engines_beside_the_policys_have_bundles_too() -> None:
    backend = {"type": "static", "engine": {"tensor_parallel": 2}}
    plan = laid_out(annotator={"backend": backend}, placement={"annotator_engine": GPU})
    assert plan.seats["the engine of the annotator"].demand() == {"CPU": 2.0, "GPU": 2.0}
    plan = laid_out(
        sampling={"source": "teacher"},
        algorithm={
            "advantage": "none",
            "policy_gradient": "none",
            "routes": {"r": {"selector": {"tokens": "all"}, "action": "nll"}},
        },
        teacher={"weights": "frozen"},
    )
    assert "the engine of the teacher" in plan.seats
    plan = plan_annotation(configured(annotator={"backend": "self"}))
    assert list(plan.seats) == ["the annotator", "the engine of the policy"]


def test_a_bundle_is_never_empty() -> None:
    plan = laid_out(placement={"rewarder": {"num_cpus": 0}})
    assert dict(plan.bundles[plan.seats["the rewarder"].bundle]) == {"CPU": 0.001}


@pytest.mark.parametrize("backend", ["oracle", {"type": "static", "engine": {"tensor_parallel": 3}}])
@pytest.mark.parametrize("source", ["policy", "teacher"])
def test_a_private_ray_has_the_cpus_of_the_layout(backend: Any, source: str) -> None:
    off_policy = {"advantage": "none", "policy_gradient": "none"}
    config = configured(
        algorithm={"routes": ROUTES, **(off_policy if source == "teacher" else {})},
        teacher={"weights": "frozen"},
        sampling={"source": source},
        annotator={"backend": backend},
        generator={"num_engines": 3, "tensor_parallel": 2},
        learner={"world_size": 2},
    )
    total = plan_placement(config).total()["CPU"]
    assert total <= config.cpus_for_roles < total + 1


def test_nothing_is_missing_where_everything_finds_a_place() -> None:
    plan = laid_out()  # 1 + 1 + 1 + 1 + 0.5 CPUs
    assert missing(plan, [Node("a", {"CPU": 4.5})]) == []
    assert missing(plan, [Node("a", {"CPU": 2}), Node("b", {"CPU": 2.5})]) == []


def test_a_role_that_is_larger_than_every_node_is_named_with_what_there_is() -> None:
    plan = laid_out(generator={"tensor_parallel": 4}, placement={"generator": GPU})
    nodes = [Node("10.0.0.1", {"CPU": 8, "GPU": 2}), Node("10.0.0.2", {"CPU": 8, "GPU": 3})]
    assert missing(plan, nodes) == [
        "generator engine 0 needs 4 GPU on one node (placement.generator.num_gpus), but the node with most of it, "
        "10.0.0.2, has 3 GPU free"
    ]
    plan = laid_out(placement={"teacher": {"custom": {"big": 1}}})
    (sentence,) = missing(plan, [Node("10.0.0.1", {"CPU": 8})])
    assert sentence.startswith("the teacher needs 1 big on one node (placement.teacher.custom.big), but the node")


def test_resources_on_different_nodes_do_not_add_up() -> None:
    plan = laid_out(placement={"learner": {"num_cpus": 4, "num_gpus": 1}})
    (sentence,) = missing(plan, [Node("a", {"CPU": 8}), Node("b", {"CPU": 2, "GPU": 1})])
    assert sentence == (
        "learner rank 0 needs 4 CPU and 1 GPU on one node (placement.learner.num_cpus, placement.learner.num_gpus), "
        "and no node has all of that: b has 2 CPU and 1 GPU free; a has 8 CPU and 0 GPU free"
    )


def test_a_sum_that_is_larger_than_the_cluster_is_told_by_role() -> None:
    plan = laid_out(generator={"num_engines": 2}, placement={"generator": GPU, "learner": GPU})
    assert missing(plan, [Node("a", {"CPU": 16, "GPU": 1}), Node("b", {"CPU": 1, "GPU": 1})]) == [
        "all roles together need 3 GPU (1 for generator engine 0, 1 for generator engine 1, 1 for learner rank 0), but "
        "the whole cluster has 2 GPU free: the node with most of it, a, has 1 GPU free"
    ]


def test_bundles_that_do_not_fit_beside_each_other_are_named() -> None:
    # 3 + 3 + 3 CPUs in 5 + 5: the sum fits, but a node holds one engine only
    plan = laid_out(generator={"num_engines": 3}, algorithm={}, placement={"generator": {"num_cpus": 3}})
    nodes = [Node("a", {"CPU": 5.5}), Node("b", {"CPU": 5.5})]
    (sentence,) = missing(plan, nodes)
    assert sentence.startswith("generator engine 2 needs 3 CPU on one node (placement.generator.num_cpus), and no node")


def test_one_node_for_all_must_hold_the_sum() -> None:
    plan = laid_out(placement={"strategy": "STRICT_PACK"})
    assert missing(plan, [Node("a", {"CPU": 4.5})]) == []
    (sentence,) = missing(plan, [Node("a", {"CPU": 4}), Node("b", {"CPU": 4})])
    assert sentence.startswith(
        "placement.strategy is STRICT_PACK, so one node has to hold all roles, which need 4.5 CPU"
    )


def test_a_cluster_without_nodes_is_told() -> None:
    assert missing(laid_out(), []) == [
        "the cluster has no node that is alive; start one, or check placement.ray_address"
    ]


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"learner": {"world_size": 2}}, r"world_size is 2 and .* is 1 x 1 = 1; make them equal"),
        ({"generator": {"tensor_parallel": 2}}, r"world_size is 1 and .* is 1 x 2 = 2; make them equal"),
        ({"scheduling": {"max_staleness": 1}}, r"scheduling\.max_staleness is 1, which wants both to work at once"),
        ({"learner": {"zero_stage": 0}}, r"learner\.zero_stage is 0, whose states DeepSpeed cannot move"),
        ({"placement": {"learner": {"num_gpus": 2}}}, r"learner\.num_gpus is 2 and .*generator\.num_gpus is 0; give a"),
        ({"placement": {"generator": GPU}}, r"learner\.num_gpus is 0 and placement\.generator\.num_gpus is 1; give a"),
    ],
)
def test_turns_need_two_sides_that_can_take_them(sections: dict[str, Any], sentence: str) -> None:
    placement = {"mode": "colocated", **sections.pop("placement", {})}
    with pytest.raises(ValidationError, match=sentence):
        configured(placement=placement, **sections)
