"""What is optimised: `policy gradient + [route, ...]`, each route `selector x action x schedule`.

A method is data: everything that tells TRACE (arXiv:2605.10194) from GRPO (arXiv:2402.03300) stands in this section,
and presets in `configs/methods/` fill it. This module must not know how a term is computed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trace_rl.config.base import Section


class PolicyGradient(Section):
    """Clipped policy gradient with group-relative advantages (Shao et al. 2024, arXiv:2402.03300, eq. 3)."""

    type: Literal["grpo"] = "grpo"
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip range: the ratio is clipped at 1 - clip_low."""
    clip_high: float = Field(0.28, gt=0)
    """Upper clip range: 1 + clip_high ("clip-higher", Yu et al. 2025, arXiv:2503.14476)."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the term for negative advantages (Ye et al. 2019, arXiv:1912.09729); none by default."""
    std: Literal["sample", "population", "none"] = "sample"
    """Which standard deviation of the group divides the advantage (`none`: Dr.GRPO, arXiv:2503.20783)."""
    std_epsilon: float = Field(1e-6, gt=0)
    """Added to the standard deviation."""


class KlClip(Section):
    """How the divergence of one position is bounded (method: pointwise clip of arXiv:2601.18734)."""

    mode: Literal["none", "vocab_clamp", "token_rescale"] = "token_rescale"
    """`vocab_clamp`: min(term, threshold) per vocabulary entry, whose clipped entries lose their gradient and can
    push the probability the wrong way; `token_rescale`: the position's divergence scaled to at most the threshold,
    which keeps the direction; `none`: no bound."""
    threshold: float = Field(0.05, gt=0)
    """In nats: per vocabulary entry (`vocab_clamp`) or per position (`token_rescale`)."""


class Selector(Section):
    """Which tokens of which rollouts take the route."""

    rollouts: Literal["correct", "wrong"]
    """Rollouts that the route looks at."""
    tokens: Literal["key_spans", "error_spans"]
    """Which of the annotator's spans are routed; key spans exist on correct rollouts, error spans on wrong ones."""


class HoldThenLinear(Section):
    """w(k) = initial for k < hold, then linear to 0 over `decay` steps; 0 afterwards. k counts from 0."""

    type: Literal["hold_then_linear"] = "hold_then_linear"
    initial: float = Field(0.5, ge=0)
    hold_steps: int = Field(10, ge=0)
    decay_steps: int = Field(30, ge=0)


class Constant(Section):
    """w(k) = value at every step."""

    type: Literal["constant"] = "constant"
    value: float = Field(0.5, ge=0)


Schedule = Annotated[HoldThenLinear | Constant, Field(discriminator="type")]


class Route(Section):
    """selector x action x schedule: a divergence toward the teacher on the selected tokens."""

    selector: Selector
    action: Literal["fkl", "rkl"]
    """`fkl` = KL(teacher || policy), `rkl` = KL(policy || teacher), over the full vocabulary."""
    clip: KlClip = KlClip()
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both sides before the divergence; independent of the sampling temperature."""
    multiplier: float = Field(1.0, ge=0)
    """Class multiplier (mu) on top of the schedule."""
    schedule: Schedule = HoldThenLinear()
    """Weight (lambda) of the divergence by training step."""
    on_routed: Literal["ramp", "keep", "replace"] = "ramp"
    """Policy-gradient weight of routed tokens: 1 - lambda/lambda_0 | 1 | 0."""


class Algorithm(Section):
    """The loss of a run. Without routes no annotator and no teacher is started."""

    policy_gradient: PolicyGradient = PolicyGradient()
    aggregation: Literal["seq-mean-token-mean", "token-mean"] = "seq-mean-token-mean"
    """Mean over the tokens of a rollout, then over rollouts (GRPO, TRACE); or one mean over all tokens (DAPO)."""
    routes: dict[str, Route] = {}
    """Named routes in order; a token belongs to the first route that selects it."""
