"""What is wrong with a role's answer, in a few words; nothing is trained on that a role garbled.

Each function returns an empty string for an answer that can be used. Whose answer it is, is known to the caller. These
are checks of shape and range that cost next to nothing beside the work itself; whether weights are the right ones is
proven elsewhere (`trace_rl.protocols.WeightSync`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trace_rl.batch import Rollout, Span, TeacherRequest, TeacherRows
from trace_rl.states import BFLOAT16, states_tensor

_ROUNDING = 1e-4
"""A log-prob may come out above 0 by so much."""


def rollout_fault(rollout: Rollout, prompt_token_ids: Sequence[int]) -> str:
    """Of a completion that the policy has sampled for a prompt."""
    length = len(rollout.token_ids)
    if tuple(rollout.prompt_token_ids) != tuple(prompt_token_ids):
        return "it is for another prompt"
    if len(rollout.rollout_logprobs) != length or len(rollout.token_versions) != length:
        return (
            f"it has {length} tokens, {len(rollout.rollout_logprobs)} log-probs and {len(rollout.token_versions)} "
            "versions"
        )
    if not np.isfinite(rollout.rollout_logprobs).all() or (rollout.rollout_logprobs > _ROUNDING).any():
        return "its log-probs are not finite numbers below 0"
    if min(rollout.token_ids, default=0) < 0:
        return "it has a negative token id"
    return ""


def reward_fault(reward: float) -> str:
    """Of a verdict."""
    is_number = isinstance(reward, int | float) and not isinstance(reward, bool)
    return "" if is_number and 0 <= reward <= 1 else f"its reward is {reward!r}, expected a number in [0, 1]"


def spans_fault(spans: Sequence[Span], length: int) -> str:
    """Of the spans of a response of so many tokens."""
    for span in spans:
        if not (0 <= span.start < span.end <= length):
            return f"it marks the tokens {span.start} to {span.end} of a response of {length}"
        if span.span_class not in ("key", "error") or not np.isfinite(span.importance):
            return f"it holds a span of class {span.span_class!r} and importance {span.importance!r}"
    return ""


def rows_fault(rows: TeacherRows, request: TeacherRequest) -> str:
    """Of what a teacher says to a request."""
    wanted = tuple(request.positions)
    if (rows.key, rows.view) != (request.key, request.view) or tuple(rows.positions) != wanted:
        return "it is for another request"
    parts = {"states": rows.hidden, "logprobs": rows.logprobs, "entropy": rows.entropy}
    for name, values in parts.items():
        expected = len(wanted) if name in request.outputs else 0
        if len(values) != expected:
            return f"it has {len(values)} rows of {name}, expected {expected}"
        numbers = states_tensor(values).float().numpy() if values.dtype == BFLOAT16 else values
        if not np.isfinite(numbers).all():
            return f"its {name} are not all finite"
    return ""
