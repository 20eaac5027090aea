"""What is optimised: `policy gradient + [route, ...]`, each route `selector x action x teacher x weight x schedule`.

A method is data: everything that tells one method from another stands in this section and in `teacher` and `sampling`,
and presets in `configs/methods/` fill them. A new idea is one class: a kind of advantage, policy gradient, token
selector, action, token weight, token score or schedule, defined anywhere before the configuration is loaded.

This module must not know how a term is computed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trace_rl.actions import Action, AdvantageAction, RowAction
from trace_rl.advantage_actions import AdvMult, Ktae, PgLogratio  # noqa: F401  defines kinds
from trace_rl.advantages import Advantage, GroupAdvantage
from trace_rl.batch import SpanClass, TeacherOutput
from trace_rl.config.base import Section
from trace_rl.contexts import Context
from trace_rl.overlong import Overlong
from trace_rl.policy_gradients import Clipped, NoPolicyGradient, PolicyGradient, RolloutCorrection
from trace_rl.row_actions import Fkl, Jsd, Nll, Rkl  # noqa: F401  defines kinds
from trace_rl.schedules import HoldThenLinear, Schedule
from trace_rl.selectors import Selector, Top
from trace_rl.token_scores import TokenScore
from trace_rl.token_weights import TokenWeight, Uniform

Aggregation = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"]


class Method(Section):
    """What a preset is: read by people and by docs/methods.md, not by the run."""

    name: str = ""
    """Short name of the method."""
    source: str = ""
    """Paper or report that it comes from."""
    from_source: str = ""
    """Which of the settings are the source's."""
    ours: str = ""
    """Which of the settings are ours, and where the preset differs from the source."""


class Route(Section):
    """One thing that is done with some of the tokens."""

    selector: Selector
    action: Action
    """What is done there: a divergence to the teacher, a log-likelihood, a change of the advantage, or `none`."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of both sides before a divergence; independent of the sampling temperature."""
    token_weight: TokenWeight = Uniform()
    """Factor of each token."""
    multiplier: float = Field(1.0, ge=0)
    """Class multiplier (mu) on top of the schedule; at 0 the route does not exist."""
    schedule: Schedule = HoldThenLinear()
    """Weight (lambda) by training step; at 0 the route does not exist, and nobody is asked on its behalf."""
    on_routed: Literal["ramp", "keep", "replace"] = "ramp"
    """Policy-gradient weight of routed tokens: 1 - lambda/lambda_0 | 1 | 0. A token belongs to the first route that
    selects it with `ramp` or `replace`, or whose action changes the advantage (of a `top` selector's tokens: that
    keeps it); other routes with `keep` may have it too."""
    normalisation: Literal["policy", "route-mean", "routes-mean"] = "policy"
    """What the sum over tokens is divided by: what algorithm.aggregation divides the policy gradient by; the number of
    tokens of this route in the batch; or that of all routes of the batch that say `routes-mean`."""
    context: Context | None = None
    """What the teacher knows for this route; without it teacher.context."""

    @model_validator(mode="after")
    def _ranked_tokens_get_a_term(self) -> Route:
        if isinstance(self.selector.tokens, Top) and not isinstance(self.action, RowAction):
            raise ValueError(
                f"selector.tokens top goes with an action that adds a term to the loss, such as rkl, not with "
                f"{self.action.type}; select other tokens or choose another action"
            )
        return self

    @property
    def score(self) -> TokenScore | None:
        """What the candidates of a `top` selector are ranked by."""
        return self.selector.tokens.score if isinstance(self.selector.tokens, Top) else None

    @property
    def ranking(self) -> RowAction | None:
        """The divergence that the score reads."""
        tokens = self.selector.tokens
        return tokens.rank_by if isinstance(tokens, Top) and tokens.score.reads_divergence else None

    @property
    def reads(self) -> frozenset[TeacherOutput]:
        """What the route needs of a teacher; empty: it needs none."""
        return self.action.reads | self.token_weight.reads | (self.ranking.reads if self.ranking else frozenset())

    @property
    def is_exclusive(self) -> bool:
        """Whether its tokens are closed to later exclusive routes."""
        return self.on_routed != "keep" or isinstance(self.action, AdvantageAction)

    def is_active(self, step: int) -> bool:
        """Whether the route exists at this step."""
        return self.schedule.at(step) * self.multiplier > 0

    def policy_weight(self, step: int) -> float:
        """What is left of the policy gradient on its tokens."""
        if self.on_routed == "keep" or not self.is_active(step):
            return 1.0
        return 1 - self.schedule.at(step) / self.schedule.peak if self.on_routed == "ramp" else 0.0

    def span_classes(self, default: Context) -> frozenset[SpanClass]:
        """Classes of spans that must be annotated for it, with this teacher.context."""
        return self.selector.span_classes(self.teacher_context(default) if self.reads else Context())

    def teacher_context(self, default: Context) -> Context:
        """What the teacher knows for this route."""
        return default if self.context is None else self.context


class DynamicSampling(Section):
    """Prompts whose completions all earn the same are replaced by others (arXiv:2503.14476)."""

    max_rounds: int = Field(1, ge=1)
    """Rounds of sampling a step; 1 keeps what the first one brings. Rounds end when prompts_per_step prompts with
    different rewards were found; after the last round the step is smaller. Off while any route is active, because
    routes learn from such prompts too."""


class Algorithm(Section):
    """The loss of a run. Nobody is started for what no route reads."""

    advantage: Advantage = GroupAdvantage()
    """What a completion's reward is compared with."""
    policy_gradient: PolicyGradient = Clipped()
    """Term of every token; `none` is pure distillation."""
    rollout_correction: RolloutCorrection = RolloutCorrection()
    """Importance weights for the mismatch between learner and sampler."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """Mean over the tokens of a rollout, then over rollouts (GRPO, TRACE); one mean over all tokens (DAPO); or sum over
    a rollout's tokens divided by sampling.max_response_tokens, then mean over rollouts (Dr. GRPO)."""
    overlong: Overlong = Overlong()
    """What happens to completions that reach sampling.max_response_tokens."""
    dynamic_sampling: DynamicSampling = DynamicSampling()
    """Refilling of prompts without a signal."""
    routes: dict[str, Route] = {}
    """Named routes in order."""

    @property
    def has_policy_gradient(self) -> bool:
        return not isinstance(self.policy_gradient, NoPolicyGradient)

    @property
    def reads(self) -> frozenset[TeacherOutput]:
        """What the routes need of a teacher, together."""
        return frozenset().union(*(route.reads for route in self.routes.values()))

    @model_validator(mode="after")
    def _something_is_optimised(self) -> Algorithm:
        if not self.has_policy_gradient:
            if not any(isinstance(route.action, RowAction) for route in self.routes.values()):
                raise ValueError(
                    "algorithm.policy_gradient is none and no route adds a term to the loss, so nothing is trained; "
                    "choose a policy gradient, or a route with an action such as fkl"
                )
            for name, route in self.routes.items():
                if isinstance(route.action, AdvantageAction):
                    raise ValueError(
                        f"algorithm.routes.{name}.action {route.action.type} changes the advantage, but "
                        "algorithm.policy_gradient is none and reads no advantage; choose reinforce or clipped"
                    )
        return self
