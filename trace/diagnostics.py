"""What one training step did to the policy: a step that is measured from both sides.

A measured step costs two scoring passes and one more backward pass, so it is taken every few steps only. Must not know
ranks or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from trace_rl.batch import TokenStatistics, TrainingBatch
from trace_rl.protocols import Learner, Metrics

EXPOSURE = "exposure/routed_grad_norm_sum"
_GRADIENT = "diagnostics/routed_grad_norm"


def measured_step(learner: Learner, batch: TrainingBatch, routes: Sequence[str]) -> dict[str, float]:
    """Train on a batch and say how the two parts of the gradient lie and how far the policy came toward the teacher.

    Args:
        routes: the names of all routes of the run, in order.
    """
    geometry = {f"diagnostics/{name}": value for name, value in learner.gradient_parts(batch).items()}
    before = learner.score(batch)
    metrics = learner.train_step(batch)
    return {**metrics, **geometry, **one_step_lift(before, learner.score(batch), routes)}


def one_step_lift(
    before: Iterable[TokenStatistics], after: Iterable[TokenStatistics], routes: Sequence[str]
) -> dict[str, float]:
    """By route: mean of log p_after(y_t) - log p_before(y_t) in nats over its tokens that the teacher supports.

    A token is supported where q(y_t) >= p_before(y_t). Nothing for routes without such a token. The definition is ours;
    arXiv:2605.10194 reports such a lift for key spans.

    Args:
        routes: the names that `TokenStatistics.route` refers to.
    """
    later = {(item.key, item.route): item for item in after}
    lifts: dict[int, list[np.ndarray]] = {}
    for item in before:
        if len(item.teacher_logprobs):
            lift = later[item.key, item.route].policy_logprobs - item.policy_logprobs
            lifts.setdefault(item.route, []).append(lift[item.teacher_logprobs >= item.policy_logprobs])
    tokens = {routes[index]: np.concatenate(lifts[index]) for index in sorted(lifts)}
    metrics = {}
    for name, values in tokens.items():
        if len(values):
            metrics[f"diagnostics/{name}/one_step_lift_nats"] = float(values.mean())
            metrics[f"diagnostics/{name}/lifted_tokens"] = float(len(values))
    return metrics


class Exposure:
    """Sum over the run of the norm of the routed gradient, each measured step standing for those up to the next.

    Args:
        every: steps between measured steps.
        history: recorded metrics of the steps before; a resumed run goes on from the last sum.
    """

    def __init__(self, every: int, history: Sequence[Mapping[str, float]]) -> None:
        self._every = every
        self._sum = next((record[EXPOSURE] for record in reversed(history) if EXPOSURE in record), 0.0)

    def add(self, metrics: Metrics) -> dict[str, float]:
        """Take in a step's metrics; returns the sum where the step was measured."""
        if _GRADIENT not in metrics:
            return {}
        self._sum += self._every * metrics[_GRADIENT]
        return {EXPOSURE: self._sum}
