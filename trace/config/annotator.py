"""Settings of the annotator: who it is, what it is told, how long it is waited for, and when its answers are suspect.

This module must not know how annotators are reached or what spans are used for.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trace_rl.annotators import AllToken, Backend, Oracle
from trace_rl.config.base import Section
from trace_rl.segments import Segmentation

Privilege = Literal["reference", "answer"]
MAX_TYPES = 12
"""Entries of a closed list at most: log2(12) bits a span."""


class TypeLists(Section):
    """The closed lists of types, name -> one line of meaning. Coarse on purpose: the teacher is told the names."""

    key: dict[str, str] = {
        "key_insight": "the idea that makes the rest work",
        "case_analysis": "splits the problem into cases that cover it",
        "substitution": "replaces an expression by another one that helps",
        "invariant": "a quantity or a bound that holds throughout",
        "verification": "checks a result",
    }
    """Of correct responses."""
    error: dict[str, str] = {
        "missing_case": "a case is left out",
        "arithmetic_slip": "a calculation with numbers is wrong",
        "algebra_error": "an expression is transformed wrongly",
        "misread_problem": "the problem is not the one that was asked",
        "wrong_theorem": "a rule is used where it does not hold",
        "invalid_inference": "a conclusion does not follow",
        "premature_conclusion": "the answer is given before the work is done",
        "format": "the answer is not given as asked",
    }
    """Of wrong responses."""

    @model_validator(mode="after")
    def _lists_are_coarse(self) -> TypeLists:
        for name, types in (("key", self.key), ("error", self.error)):
            if not 1 <= len(types) <= MAX_TYPES:
                raise ValueError(
                    f"annotator.types.{name} has {len(types)} entries; give 1 to {MAX_TYPES}, because a finer list "
                    "would tell the teacher more than a coarse type"
                )
        return self


class Audit(Section):
    """When the annotator's answers are suspect: a limit that is passed in `for_steps` steps in a row is warned of.

    Shares are of a step's annotated rollouts, but for failed_frac, which is of those that were asked for."""

    for_steps: int = Field(3, ge=1)
    max_failed_frac: float = Field(0.2, ge=0, le=1)
    """Rollouts without an annotation, whatever the cause."""
    max_empty_frac: float = Field(0.5, ge=0, le=1)
    """Annotations without a span."""
    max_out_of_range_frac: float = Field(0.05, ge=0, le=1)
    """Spans that name segments that do not exist or were not shown, of all spans."""
    max_unknown_type_frac: float = Field(0.05, ge=0, le=1)
    """Spans of a type outside of the closed list, of all spans."""
    max_cut_frac: float = Field(0.5, ge=0, le=1)
    """Marked tokens that the cap cuts off, of all marked tokens."""
    compare_with_rule: bool = True
    """Whether the spans are compared with those of the task's rule, for information, where the annotator is another
    one."""


class Annotator(Section):
    backend: Backend = Oracle()
    """Who annotates: oracle, api, self, static, frozen, replay, and the controls random, inverted and all_token."""
    types: TypeLists | None = None
    """Closed lists that a language model chooses from; by default the task's own where the data is a task, else those
    of `TypeLists`. Rules have types of their own."""
    privileges: tuple[Privilege, ...] = ("reference", "answer")
    """What a language model is shown beside question, verdict and response: the reference solution, the answer."""
    segmentation: Segmentation = Segmentation()
    coverage_cap: float = Field(0.25, gt=0, le=1)
    """Largest share of a response's tokens that may be in spans (arXiv:2605.10194)."""
    timeout_s: float = Field(120.0, gt=0)
    """Deadline of one rollout's annotation, repeated requests included."""
    step_wait_s: float = Field(60.0, gt=0)
    """Longest that a step waits for annotations once its last rollout is graded; what is late goes to the policy
    gradient alone."""
    cache_path: str | None = None
    """File of the answers that models have given, so that none is asked for twice; several runs may share one. Without
    it `annotations.sqlite` in the run folder."""
    record_path: str | None = None
    """File that every reply is appended to, for annotator.backend = {type: replay, path: ...}; without it none is."""
    audit: Audit = Audit()

    @model_validator(mode="after")
    def _everything_may_be_marked(self) -> Annotator:
        if isinstance(self.backend, AllToken) and self.coverage_cap < 1:
            raise ValueError(
                f"annotator.backend all_token marks whole responses, but annotator.coverage_cap is "
                f"{self.coverage_cap:g}; set annotator.coverage_cap=1"
            )
        return self
