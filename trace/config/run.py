"""RunConfig: the whole configuration of a run, and the checks that need more than one section.

Validators are pure: whether files exist or a tokenizer has a template is checked by `trace_rl.launch.preflight`.
"""

from __future__ import annotations

import math

from pydantic import model_validator

from trace_rl.advantages import GroupAdvantage, LeaveOneOut
from trace_rl.annotators import Frozen, Static
from trace_rl.config.algorithm import Algorithm, Method
from trace_rl.config.annotator import Annotator
from trace_rl.config.base import Section
from trace_rl.config.health import Health
from trace_rl.config.learner import LearnerSettings
from trace_rl.config.placement import Placement
from trace_rl.config.roles import (
    Data,
    Evaluation,
    GeneratorSettings,
    Logging,
    Model,
    Rewarder,
    Run,
    Sampling,
    Sync,
)
from trace_rl.config.scheduling import Scheduling
from trace_rl.config.teacher import Teacher
from trace_rl.config.watch import CollapseWatch
from trace_rl.token_weights import StudentPerplexity


class RunConfig(Section):
    """Everything that decides a run; written resolved to the run folder."""

    plugins: tuple[str, ...] = ()
    """Modules that define further kinds (of actions, selectors, ...); imported before this configuration is read."""
    method: Method = Method()
    model: Model
    data: Data
    sampling: Sampling = Sampling()
    scheduling: Scheduling = Scheduling()
    algorithm: Algorithm = Algorithm()
    generator: GeneratorSettings = GeneratorSettings()
    rewarder: Rewarder = Rewarder()
    annotator: Annotator = Annotator()
    teacher: Teacher = Teacher()
    learner: LearnerSettings = LearnerSettings()
    sync: Sync = Sync()
    placement: Placement = Placement()
    health: Health = Health()
    evaluation: Evaluation = Evaluation()
    watch: CollapseWatch = CollapseWatch()
    logging: Logging = Logging()
    run: Run = Run()

    @property
    def needs_teacher(self) -> bool:
        """Whether any route reads a teacher at any step."""
        return bool(self.algorithm.reads)

    @property
    def scores_early(self) -> bool:
        """Whether the teacher scores completions while others are being sampled.

        Only where no prompt that is sampled for a step is given up: synchronous, without oversampling (dynamic sampling
        replaces none while a route is active). Not where engines share their GPUs with the learner or the teacher. Nor
        with a running average of weights: a run that is told to end while it samples would keep one of the next step.
        """
        is_certain = self.scheduling.is_synchronous and not self.scheduling.oversampling_frac
        is_apart = self.placement.mode != "colocated" and self.placement.teacher_place != "with_generator"
        return is_certain and is_apart and not self.teacher.weights.is_average

    @property
    def prompts_scored_together(self) -> int:
        """How many neighbouring prompts the teacher then scores in one call: as many as fill a batch of it with
        responses of full length, so that short ones do not make small batches."""
        longest = self.sampling.samples_per_prompt * self.sampling.max_response_tokens
        return max(1, self.teacher.max_tokens_per_batch // longest)

    @property
    def needs_annotator(self) -> bool:
        """Whether any route reads spans or what an annotator says of them."""
        return any(route.span_classes(self.teacher.context) for route in self.algorithm.routes.values())

    @property
    def reads_reflections(self) -> bool:
        """Whether a teacher is told in the annotator's words what went wrong."""
        contexts = [route.teacher_context(self.teacher.context) for route in self.algorithm.routes.values()]
        return any("reflection" in context.pieces for context in contexts)

    @property
    def has_annotator_engine(self) -> bool:
        """Whether the annotator is a model on an engine of its own."""
        return self.needs_annotator and isinstance(self.annotator.backend.model, Static | Frozen)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest student sequence: prompt budget plus response budget."""
        return self.sampling.max_prompt_tokens + self.sampling.max_response_tokens

    @property
    def cpus_for_roles(self) -> int:
        """Logical CPUs that the roles ask Ray for together, rounded up."""
        roles, annotator = self.placement, self.annotator.backend.model
        num_engines = self.generator.num_engines + (self.sampling.source == "teacher")
        workers = annotator.engine.tensor_parallel if isinstance(annotator, Static | Frozen) else 0
        total = (
            roles.generator.num_cpus * self.generator.tensor_parallel * num_engines
            + roles.learner.num_cpus * self.learner.world_size
            + roles.rewarder.num_cpus
            + (roles.teacher.num_cpus if self.needs_teacher else 0)
            + (roles.annotator.num_cpus if self.needs_annotator else 0)
            + (roles.annotator_engine.num_cpus * workers if self.needs_annotator else 0)
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
    def _turns_have_two_sides(self) -> RunConfig:
        placement, engines, ranks = self.placement, self.generator.num_engines, self.learner.world_size
        if placement.mode != "colocated":
            return self
        workers = engines * self.generator.tensor_parallel
        if ranks != workers:
            raise ValueError(
                f"placement.mode is colocated, where every worker of an engine shares the GPU of a learner rank, but "
                f"learner.world_size is {ranks} and generator.num_engines x generator.tensor_parallel is {engines} x "
                f"{self.generator.tensor_parallel} = {workers}; make them equal, or set placement.mode=disaggregated"
            )
        if self.scheduling.max_staleness:
            raise ValueError(
                f"placement.mode is colocated, where engines sleep while the learner works, but "
                f"scheduling.max_staleness is {self.scheduling.max_staleness}, which wants both to work at once; set "
                "it to 0, or placement.mode=disaggregated"
            )
        if not self.learner.zero_stage:
            raise ValueError(
                "placement.mode is colocated, but learner.zero_stage is 0, whose states DeepSpeed cannot move to CPU "
                "memory while engines have the GPU; set learner.zero_stage to 1, 2 or 3"
            )
        if placement.learner.num_gpus not in (0, 1) or placement.generator.num_gpus > placement.learner.num_gpus:
            raise ValueError(
                f"placement.mode is colocated, but placement.learner.num_gpus is {placement.learner.num_gpus:g} and "
                f"placement.generator.num_gpus is {placement.generator.num_gpus:g}; give a rank 1 GPU, which the "
                "worker of an engine shares, or both none"
            )
        return self

    @model_validator(mode="after")
    def _policy_gradient_knows_its_samples(self) -> RunConfig:
        sampling = self.sampling
        if not self.algorithm.has_policy_gradient:
            return self
        if sampling.top_p < 1 or sampling.top_k:
            found = (
                f"sampling.top_p is {sampling.top_p:g}" if sampling.top_p < 1 else f"sampling.top_k is {sampling.top_k}"
            )
            raise ValueError(
                f"{found}, but a policy gradient and its rollout correction compare the learner's log-probs with those "
                "of the distribution that was sampled from, and the learner's are not truncated; set sampling.top_p=1 "
                "and sampling.top_k=0, or algorithm.policy_gradient=none"
            )
        if sampling.source != "policy":
            raise ValueError(
                f"sampling.source is {sampling.source}, but algorithm.policy_gradient "
                f"{self.algorithm.policy_gradient.type} needs completions that the policy has sampled; set "
                "sampling.source=policy or algorithm.policy_gradient=none"
            )
        compares = isinstance(self.algorithm.advantage, GroupAdvantage | LeaveOneOut)
        if compares and sampling.samples_per_prompt < 2:
            raise ValueError(
                f"algorithm.advantage {self.algorithm.advantage.type} compares the completions of one prompt, but "
                "sampling.samples_per_prompt is 1; set it to at least 2"
            )
        return self

    @model_validator(mode="after")
    def _stale_tokens_are_corrected(self) -> RunConfig:
        staleness = self.scheduling.max_staleness
        if staleness and self.algorithm.has_policy_gradient and self.algorithm.rollout_correction.level == "none":
            raise ValueError(
                f"scheduling.max_staleness is {staleness}, but algorithm.rollout_correction.level is none, so that the "
                "policy gradient would take tokens of older weights for the policy's own; set "
                "algorithm.rollout_correction.level=stale, or scheduling.max_staleness=0"
            )
        return self

    @model_validator(mode="after")
    def _off_policy_completions_are_understood(self) -> RunConfig:
        source = self.sampling.source
        if source == "teacher" and self.teacher.weights.depends_on != "start":
            raise ValueError(
                f"sampling.source is teacher, but teacher.weights.type = {self.teacher.weights.type} moves with the "
                "policy; completions come from an engine that is loaded once: set it to external or frozen"
            )
        for name, route in self.algorithm.routes.items():
            if source != "policy" and isinstance(route.token_weight, StudentPerplexity):
                raise ValueError(
                    f"algorithm.routes.{name}.token_weight student_perplexity reads the sampler's log-probs, but "
                    f"completions of sampling.source = {source} have none of the policy; set sampling.source=policy"
                )
        return self

    @model_validator(mode="after")
    def _estimates_read_samples(self) -> RunConfig:
        sampling = self.sampling
        truncates = sampling.top_p < 1 or sampling.top_k > 0
        for name, route in self.algorithm.routes.items():
            if not route.action.is_estimate:
                continue
            where = f"algorithm.routes.{name}.action {route.action.type}"
            if route.temperature != sampling.temperature:
                raise ValueError(
                    f"{where} compares the log-probs of sampled tokens at algorithm.routes.{name}.temperature = "
                    f"{route.temperature:g}, but they were sampled at sampling.temperature = {sampling.temperature:g}; "
                    "set both to the same value"
                )
            if sampling.source != "policy" or truncates:
                raise ValueError(
                    f"{where} averages over tokens as samples of the policy's whole distribution, but sampling.source "
                    f"is {sampling.source}, sampling.top_p {sampling.top_p:g} and sampling.top_k {sampling.top_k}; set "
                    "them to policy, 1 and 0, or choose a support other than sampled"
                )
            if self.scheduling.max_staleness:
                raise ValueError(
                    f"{where} averages over tokens as samples of the policy, but scheduling.max_staleness is "
                    f"{self.scheduling.max_staleness}, which lets older weights write them, and no weight corrects "
                    "that; set it to 0, or choose a support other than sampled"
                )
        return self

    @model_validator(mode="after")
    def _watch_sees_evaluations(self) -> RunConfig:
        if self.watch.action == "stop" and not self.evaluation.every:
            raise ValueError(
                "watch.action is stop, but evaluation.every is 0, and a collapse is judged at evaluations only; set "
                "evaluation.every above 0 or watch.action=warn"
            )
        return self

    @model_validator(mode="after")
    def _shared_prompts_have_an_attention(self) -> RunConfig:
        if self.learner.shares_prompts and self.model.attention not in ("auto", "sdpa"):
            raise ValueError(
                "learner.layout is shared, whose prompts are shared in torch's attention, but model.attention is "
                f"{self.model.attention}; set model.attention=sdpa, or learner.layout=auto"
            )
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
