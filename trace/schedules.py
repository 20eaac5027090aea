"""Weights of a route by training step; pure functions of the step, so a resumed run needs no state of theirs."""

from __future__ import annotations

from trace_rl.config.algorithm import Constant, HoldThenLinear, Route, Schedule


def schedule_value(schedule: Schedule, step: int) -> float:
    """Return lambda_k at the 0-based training step k.

    hold_then_linear: w0 for k < hold, w0 (1 - (k - hold) / decay) for hold <= k < hold + decay, then 0
    (arXiv:2605.10194; with w0 = 0.5, 10 and 30: sum 12.75, sum of squares 5.12639).
    """
    match schedule:
        case HoldThenLinear(initial=initial, hold_steps=hold, decay_steps=decay):
            if step < hold:
                return initial
            return initial * max(0.0, 1 - (step - hold) / decay) if decay else 0.0
        case Constant(value=value):
            return value


def peak_value(schedule: Schedule) -> float:
    """Return lambda_0, the weight that the ramp is measured against."""
    return schedule.initial if isinstance(schedule, HoldThenLinear) else schedule.value


def routed_policy_weight(route: Route, step: int) -> float:
    """Return g_k, the policy-gradient weight of routed tokens: 1 - lambda_k / lambda_0 under `ramp`."""
    if route.on_routed == "keep":
        return 1.0
    if route.on_routed == "replace":
        return 0.0
    peak = peak_value(route.schedule)
    return 1 - schedule_value(route.schedule, step) / peak if peak else 1.0


def is_active(route: Route, step: int) -> bool:
    """Whether the route asks for annotation and teacher scores at this step."""
    return schedule_value(route.schedule, step) * route.multiplier > 0
