"""Builders of annotated rollouts, shared by the tests of routing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trace_rl.batch import AnnotatedRollout, GradedRollout, GroupMember, Prompt, Rollout, Span, TeacherRows
from trace_rl.config.run import RunConfig
from trace_rl.routing import route_rollouts, teacher_views
from trace_rl.training_batch import Evidence

HIDDEN = 3
KEY = {"selector": {"rollouts": "correct", "tokens": "key_spans"}, "action": "fkl"}
ERROR = {"selector": {"rollouts": "wrong", "tokens": "error_spans"}, "action": "rkl"}
ALL = {"selector": {"tokens": "all"}, "schedule": {"type": "constant", "value": 1.0}, "on_routed": "keep"}
NO_POLICY_GRADIENT = {"advantage": "none", "policy_gradient": "none"}


def configured(routes: dict[str, Any] | None = None, seed: int = 0, **algorithm: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"path": "d"},
            "sampling": {"max_response_tokens": 100},
            "algorithm": {"routes": routes or {}, **algorithm},
            "run": {"seed": seed},
        }
    )


def annotated(
    prompt_id: str,
    sample: int,
    length: int,
    reward: float,
    *spans: Span,
    finish_reason: Any = "stop",
    version: int | Sequence[int] = 0,
    feedback: str = "",
) -> AnnotatedRollout:
    rollout = Rollout(
        prompt=Prompt(prompt_id, "question", "answer"),
        sample=sample,
        prompt_token_ids=(7, 8),
        token_ids=tuple(range(10, 10 + length)),
        rollout_logprobs=-np.ones(length, dtype=np.float32),
        finish_reason=finish_reason,
        token_versions=np.full(length, version),
        text="text",
    )
    return AnnotatedRollout(GradedRollout(rollout, reward, "graded", feedback), spans, "annotated")


def member(*group: AnnotatedRollout, index: int = 0) -> GroupMember:
    return GroupMember(group[index], group)


def key(start: int, end: int) -> Span:
    return Span(start, end, "key", "arith")


def error(start: int, end: int) -> Span:
    return Span(start, end, "error", "copy")


def evidence_of(rollouts: list[AnnotatedRollout], config: RunConfig, step: int = 0) -> Evidence:
    """A teacher that says of token t of sample s: states s + t / 10, log q = -t / 10, entropy s / 10."""
    views = teacher_views(config, step)
    rows = {}
    for item in route_rollouts(rollouts, config, step):
        sample = item.member.rollout.sample
        for number, view in enumerate(views):
            parts = [tokens.positions for tokens in item.routed if tokens.route in view.routes]
            positions = np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
            rows[item.key, number] = TeacherRows(
                key=item.key,
                view=number,
                positions=positions,
                hidden=np.repeat((sample + positions / 10)[:, None], HIDDEN, axis=1).astype(np.float32),
                logprobs=-positions / 10,
                entropy=np.full(len(positions), sample / 10),
            )
    return Evidence(views, rows)
