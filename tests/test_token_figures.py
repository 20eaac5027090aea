"""Figures of single tokens: by hand, from learner ranks against plain torch, and as they are stored."""

import json
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from learner_harness import BATCHES, ROUTE_TEMPERATURE, TEMPERATURE, Group, load, run_config, sequence_logits
from learner_harness import teacher_logits as teacher_logits_of
from rollouts import KEY, annotated, configured, key, member

from trace_rl.batch import (
    Candidates,
    RolloutKey,
    RoutedRollout,
    RoutedTokens,
    RouteFigures,
    TokenFigures,
    TokenStatistics,
    TrainingSequence,
)
from trace_rl.head_figures import head_figures
from trace_rl.head_loss import Projection
from trace_rl.launch.rollout_dump import record_of
from trace_rl.objective import LossRows, Objective, objective_of
from trace_rl.workers.learner import learner_spec
from trace_rl.workers.token_figures import cut_figures

POLICY = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.75 - 1e-9, 1e-9], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
TEACHER = torch.tensor([[0.125, 0.75, 0.125]], dtype=torch.float64).log()
HEAD = torch.eye(3, dtype=torch.float64)
"""Hidden states are logits."""


def objective(*routes: dict[str, Any]) -> Objective:
    config = configured({f"r{number}": route for number, route in enumerate(routes)})
    return objective_of(config.algorithm, 1.0)


def rows(route_row: list[int], teacher_row: list[int]) -> LossRows:
    """Three tokens 0, 1, 1, of which some take route 0."""
    zeros, count = torch.zeros(3), len(route_row)
    return LossRows(
        targets=torch.tensor([0, 1, 1]),
        sequence=torch.zeros(3, dtype=torch.long),
        num_sequences=1,
        advantages=zeros,
        rollout_logprobs=zeros,
        is_stale=zeros.bool(),
        pg_weight=zeros,
        route_row=torch.tensor(route_row, dtype=torch.long),
        route_index=torch.zeros(count, dtype=torch.long),
        route_weight=torch.zeros(count),
        teacher_row=torch.tensor(teacher_row, dtype=torch.long),
    )


@pytest.mark.parametrize("tile_bytes", [1, 10**6])
def test_figures_are_those_of_the_two_distributions(tile_bytes: int) -> None:
    route = {**KEY, "action": {"type": "fkl", "clip": {"mode": "none"}}}
    policy, teacher = Projection(POLICY, HEAD), Projection(TEACHER, HEAD)
    tokens, by_route = head_figures(policy, rows([2], [0]), objective(route), teacher, tile_bytes)
    assert tokens["policy_logprobs"].tolist() == pytest.approx([log(0.5), log(0.75), log(0.3)])
    # entropy of (1/2, 1/4, 1/4) is 1.5 ln 2
    assert tokens["policy_entropy"][0].item() == pytest.approx(1.5 * log(2))
    ((number, found),) = by_route
    assert number == 0
    assert found["policy_ids"].tolist() == [[2, 1, 0]]
    assert found["policy_top"].exp().tolist()[0] == pytest.approx([0.5, 0.3, 0.2])
    assert found["teacher_ids"].tolist()[0][0] == 1
    assert found["teacher_top"].exp().tolist()[0] == pytest.approx([0.75, 0.125, 0.125])
    assert found["teacher_logprobs"].tolist() == pytest.approx([log(0.75)])
    divergence = 0.75 * log(0.75 / 0.3) + 0.125 * log(0.125 / 0.2) + 0.125 * log(0.125 / 0.5)
    assert found["divergence"].tolist() == pytest.approx([divergence])


def test_a_route_without_a_teacher_has_the_students_candidates_only() -> None:
    nothing = Projection(POLICY[:0], HEAD)
    nll = {"selector": {"tokens": "all"}, "action": "nll"}
    _, ((_, found),) = head_figures(Projection(POLICY, HEAD), rows([0], [-1]), objective(nll), nothing)
    assert found["policy_ids"].tolist()[0][0] == 0
    assert found["teacher_ids"].shape == found["teacher_top"].shape == (0, 3)


def test_no_tokens_have_no_figures() -> None:
    none = Projection(POLICY[:0], HEAD)
    tokens, by_route = head_figures(none, rows([], []).tokens(0, 0), objective(KEY), none)
    assert [len(column) for column in tokens.values()] == [0, 0] and by_route == []


def sequence(number: int, time: int, route_index: list[int]) -> TrainingSequence:
    none, index = np.zeros(0), np.array(route_index, dtype=np.int64)
    return TrainingSequence(
        RolloutKey("p", number), (1,), tuple(range(time)), none, index, none, none, index, index, none, index, none
    )


def test_columns_are_cut_at_the_borders_of_sequences_and_routes() -> None:
    sequences = [sequence(0, 2, [0, 1, 1]), sequence(1, 1, []), sequence(2, 3, [0])]
    tokens = {name: torch.arange(6.0) for name in ("policy_logprobs", "policy_entropy")}

    def columns(count: int, has_teacher: bool) -> dict[str, torch.Tensor]:
        names = ("policy_entropy", "divergence", "policy_logprobs", "teacher_logprobs")
        table = torch.arange(2 * count).reshape(count, 2)
        found = {name: torch.arange(float(count)) for name in names}
        found |= {name: table for name in ("policy_ids", "policy_top", "teacher_ids", "teacher_top")}
        lacks = () if has_teacher else ("teacher_logprobs", "teacher_ids", "teacher_top")
        return found | {name: found[name][:0] for name in lacks}

    first, second, third = cut_figures(sequences, tokens, [(0, columns(2, True)), (1, columns(2, False))])
    assert [each.policy_entropy.tolist() for each in (first, second, third)] == [[0, 1], [2], [3, 4, 5]]
    assert [[route.statistics.route for route in each.routes] for each in (first, second, third)] == [[0, 1], [], [0]]
    assert third.routes[0].statistics.divergence.tolist() == [1]
    assert third.routes[0].teacher.token_ids.tolist() == [[2, 3]]
    assert first.routes[1].policy.token_ids.tolist() == [[0, 1], [2, 3]]
    assert len(first.routes[1].teacher.token_ids) == len(first.routes[1].statistics.teacher_logprobs) == 0


def test_stored_figures_belong_to_their_route() -> None:
    own = annotated("p", 0, 3, 1.0, key(1, 3))
    item = RoutedRollout(member(own), 0.5, (RoutedTokens(1, np.array([1, 2]), 0.25),))
    index = np.array([1, 1])
    trained = TrainingSequence(
        item.key, (7, 8), own.graded.rollout.token_ids, np.array([-1.0, np.nan, -0.123456789]), index,
        np.zeros(3), np.ones(3), np.array([1, 2]), index, np.array([0.5, 0.25]), index, np.zeros((0, 0)),
    )  # fmt: skip
    numbers = np.array([0.5, 0.25])
    statistics = TokenStatistics(item.key, 1, numbers, numbers, -numbers, np.zeros(0))
    policy = Candidates(np.array([[4, 5], [6, 7]]), np.array([[-0.5, -1.0], [-0.25, -np.inf]]))
    teacher = Candidates(np.zeros((0, 2), dtype=np.int64), np.zeros((0, 2)))
    figures = TokenFigures(
        item.key, np.array([-1.0, -2.0, -3.0]), np.ones(3), (RouteFigures(statistics, policy, teacher),)
    )
    found = json.loads(json.dumps(record_of(item, trained, figures), allow_nan=False))
    assert found["rollout_logprobs"] == [-1.0, None, -0.12346]
    assert found["policy_logprobs"] == [-1, -2, -3] and found["policy_entropy"] == [1, 1, 1]
    assert found["routes"] == [
        {
            "route": 1,
            "weight": 0.25,
            "positions": [1, 2],
            "token_weights": [0.5, 0.25],
            "divergence": [0.5, 0.25],
            "policy_logprobs": [-0.5, -0.25],
            "teacher_logprobs": [],
            "policy_candidates": [[[4, -0.5], [5, -1.0]], [[6, -0.25], [7, None]]],
            "teacher_candidates": [],
        }
    ]
    assert "policy_entropy" not in record_of(item, trained)


@pytest.mark.engine
@pytest.mark.parametrize("settings", [{"world_size": 1}, {"world_size": 2, "zero_stage": 3}], ids=str)
def test_ranks_find_what_plain_torch_finds(groups: dict[int, Group], model_path: str, settings: dict[str, Any]) -> None:
    group = groups[settings["world_size"]].build(learner_spec(run_config(model_path, **settings)))
    check_figures([item for rank in group.all("call", "inspect", BATCHES[0]) for item in rank], model_path)


def check_figures(found: list[TokenFigures], model_path: str) -> None:
    by_key = {item.key: item for item in found}
    assert len(by_key) == len(found) == len(BATCHES[0].sequences)
    model = load(model_path)
    for item in BATCHES[0].sequences:
        figures = by_key[item.key]
        with torch.no_grad():
            logits = sequence_logits(model, item)
        rows = (logits / TEMPERATURE).log_softmax(-1)
        own = rows.gather(-1, torch.tensor(item.token_ids)[:, None]).squeeze(-1)
        assert figures.policy_logprobs.tolist() == pytest.approx(own.tolist(), abs=1e-5)
        assert figures.policy_entropy.tolist() == pytest.approx((-(rows.exp() * rows).sum(-1)).tolist(), abs=1e-5)
        assert [route.statistics.route for route in figures.routes] == sorted(set(item.route_index.tolist()))
        for route in figures.routes:
            for row, position in enumerate(item.route_positions):
                policy = (logits[position] / ROUTE_TEMPERATURE).log_softmax(-1).topk(5)
                teacher = (teacher_logits_of(item, row) / ROUTE_TEMPERATURE).log_softmax(-1).topk(5)
                assert route.policy.token_ids[row].tolist() == policy.indices.tolist()
                assert route.policy.logprobs[row].tolist() == pytest.approx(policy.values.tolist(), abs=1e-5)
                assert route.teacher.token_ids[row].tolist() == teacher.indices.tolist()
                assert route.teacher.logprobs[row].tolist() == pytest.approx(teacher.values.tolist(), abs=1e-5)
