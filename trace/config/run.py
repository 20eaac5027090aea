"""RunConfig: the whole configuration of a run, and the checks that need more than one section.

Validators are pure: whether files exist or a tokenizer has a template is checked by `trace_rl.launch.preflight`.
"""

from __future__ import annotations

import math

from pydantic import model_validator

from trace_rl.config.algorithm import Algorithm, Route
from trace_rl.config.base import Section
from trace_rl.config.roles import (
    Annotator,
    Data,
    Evaluation,
    GeneratorSettings,
    LearnerSettings,
    Logging,
    Model,
    Placement,
    Rewarder,
    Run,
    Sampling,
    Sync,
    Teacher,
)


class RunConfig(Section):
    """Everything that decides a run; written resolved to the run folder."""

    model: Model
    data: Data
    sampling: Sampling = Sampling()
    algorithm: Algorithm = Algorithm()
    generator: GeneratorSettings = GeneratorSettings()
    rewarder: Rewarder = Rewarder()
    annotator: Annotator = Annotator()
    teacher: Teacher = Teacher()
    learner: LearnerSettings = LearnerSettings()
    sync: Sync = Sync()
    placement: Placement = Placement()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    run: Run = Run()

    @property
    def needs_teacher(self) -> bool:
        """Whether any route asks for a teacher at any step."""
        return bool(self.algorithm.routes)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest student sequence: prompt budget plus response budget."""
        return self.sampling.max_prompt_tokens + self.sampling.max_response_tokens

    @property
    def cpus_for_roles(self) -> int:
        """Logical CPUs that the roles ask Ray for together, rounded up."""
        roles = self.placement
        total = (
            roles.generator.num_cpus * self.generator.num_engines
            + roles.learner.num_cpus * self.learner.world_size
            + roles.rewarder.num_cpus
            + (roles.teacher.num_cpus + roles.annotator.num_cpus if self.needs_teacher else 0)
        )
        return max(1, math.ceil(total))

    @model_validator(mode="after")
    def _ray_offers_what_roles_ask(self) -> RunConfig:
        offered, needed = self.placement.ray_cpus, self.cpus_for_roles
        if offered is not None and offered < needed:
            raise ValueError(
                f"placement.ray_cpus is {offered}, but the roles ask for {needed} logical CPUs together "
                "(placement.*.num_cpus); raise the former, leave it out, or lower the latter"
            )
        return self

    @model_validator(mode="after")
    def _spans_fit_rollouts(self) -> RunConfig:
        for name, route in self.algorithm.routes.items():
            _check_route(name, route)
        return self

    @model_validator(mode="after")
    def _micro_batch_holds_a_sequence(self) -> RunConfig:
        if self.learner.max_tokens_per_micro_batch < self.max_sequence_tokens:
            raise ValueError(
                f"learner.max_tokens_per_micro_batch is {self.learner.max_tokens_per_micro_batch}, but one sequence "
                f"may have {self.max_sequence_tokens} tokens (sampling.max_prompt_tokens + "
                "sampling.max_response_tokens); raise the former or lower the latter"
            )
        return self

    @model_validator(mode="after")
    def _minibatches_divide_prompts(self) -> RunConfig:
        if self.sampling.prompts_per_step % self.learner.minibatches_per_step:
            raise ValueError(
                f"learner.minibatches_per_step is {self.learner.minibatches_per_step}, which does not divide "
                f"sampling.prompts_per_step = {self.sampling.prompts_per_step}; choose a divisor"
            )
        return self


def _check_route(name: str, route: Route) -> None:
    expected = {"key_spans": "correct", "error_spans": "wrong"}[route.selector.tokens]
    if route.selector.rollouts != expected:
        raise ValueError(
            f"algorithm.routes.{name}.selector asks for {route.selector.tokens} of {route.selector.rollouts} rollouts, "
            f"but {route.selector.tokens} exist on {expected} rollouts only; set rollouts: {expected}"
        )
