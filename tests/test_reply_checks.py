"""Answers that a role has garbled are found before anything is trained on them."""

from dataclasses import replace

import numpy as np
import pytest

from trace_rl.batch import Prompt, Rollout, RolloutKey, Span, TeacherRequest, TeacherRows
from trace_rl.reply_checks import reward_fault, rollout_fault, rows_fault, spans_fault
from trace_rl.states import BFLOAT16

ROLLOUT = Rollout(Prompt("p", "q", "a"), 0, (1, 2), (3, 4), np.array([-0.5, 0.0]), "stop", np.array([7, 7]), "text")
NAN = np.array([-0.5, np.nan])


def test_a_completion_as_it_should_be() -> None:
    assert rollout_fault(ROLLOUT, (1, 2)) == ""
    empty = replace(ROLLOUT, token_ids=(), rollout_logprobs=np.zeros(0), token_versions=np.zeros(0, dtype=int))
    assert rollout_fault(empty, (1, 2)) == ""


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"prompt_token_ids": (1, 3)}, "it is for another prompt"),
        ({"token_ids": (3,)}, "it has 1 tokens, 2 log-probs and 2 versions"),
        ({"token_versions": np.array([7])}, "it has 2 tokens, 2 log-probs and 1 versions"),
        ({"rollout_logprobs": NAN}, "its log-probs are not finite numbers below 0"),
        ({"rollout_logprobs": np.array([-0.5, 0.1])}, "its log-probs are not finite numbers below 0"),
        ({"rollout_logprobs": np.array([-0.5, -np.inf])}, "its log-probs are not finite numbers below 0"),
        ({"token_ids": (3, -1)}, "it has a negative token id"),
    ],
)
def test_a_garbled_completion(change: dict, fault: str) -> None:
    assert rollout_fault(replace(ROLLOUT, **change), (1, 2)) == fault


@pytest.mark.parametrize("reward", [0, 1, 0.5, 1.0])
def test_rewards_in_range(reward: float) -> None:
    assert reward_fault(reward) == ""


@pytest.mark.parametrize("reward", [-0.1, 1.1, float("nan"), float("inf"), None, "1", True])
def test_rewards_out_of_range(reward: object) -> None:
    assert reward_fault(reward) == f"its reward is {reward!r}, expected a number in [0, 1]"  # type: ignore[arg-type]


def test_spans_lie_within_their_response() -> None:
    assert spans_fault([Span(0, 2, "key", "arith"), Span(2, 5, "error", "arith")], 5) == ""
    for start, end in ((-1, 2), (2, 2), (3, 2), (0, 6)):
        assert "of a response of 5" in spans_fault([Span(start, end, "key", "arith")], 5)
    assert "importance nan" in spans_fault([Span(0, 2, "key", "arith", float("nan"))], 5)
    assert "class 'other'" in spans_fault([Span(0, 2, "other", "arith")], 5)  # type: ignore[arg-type]


def teacher(outputs: tuple[str, ...] = ("states", "logprobs")) -> tuple[TeacherRequest, TeacherRows]:
    key = RolloutKey("p", 0)
    request = TeacherRequest(key, 1, (1, 2), (3, 4, 5), np.array([0, 2]), frozenset(outputs), 1.0)
    rows = TeacherRows(key, 1, np.array([0, 2]), np.ones((2, 3), np.float32), np.array([-1.0, -2.0]), np.zeros(0))
    return request, rows


def test_the_teachers_rows_are_those_that_were_asked_for() -> None:
    request, rows = teacher()
    assert rows_fault(rows, request) == ""
    half = replace(rows, hidden=np.ones((2, 3), np.int16).view(BFLOAT16))
    assert rows_fault(half, request) == ""


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"view": 0}, "it is for another request"),
        ({"key": RolloutKey("p", 1)}, "it is for another request"),
        ({"positions": np.array([0, 1])}, "it is for another request"),
        ({"hidden": np.ones((1, 3), np.float32)}, "it has 1 rows of states, expected 2"),
        ({"entropy": np.zeros(2)}, "it has 2 rows of entropy, expected 0"),
        ({"logprobs": NAN}, "its logprobs are not all finite"),
        ({"hidden": np.full((2, 3), np.inf, np.float32)}, "its states are not all finite"),
        ({"hidden": np.full((2, 3), 0x7F80, np.int16).view(BFLOAT16)}, "its states are not all finite"),
    ],
)
def test_the_teachers_garbled_rows(change: dict, fault: str) -> None:
    request, rows = teacher()
    assert rows_fault(replace(rows, **change), request) == fault
