"""What the token viewer reads of a line of stored rollouts; older dumps, which tell less, are read too.

Must not know how a page shows it.
"""

from __future__ import annotations

from itertools import chain, repeat
from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from trace_rl.launch.rollout_dump import SpanRecord, read_lines

Numbers = tuple[float | None, ...]
Candidates = tuple[tuple[tuple[int, float | None], ...], ...]
"""[row][candidate] -> (token id, log-prob)."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class RouteRecord(_Part):
    """The tokens of one route; what was not measured has no rows."""

    route: int
    weight: float
    positions: tuple[int, ...]
    token_weights: Numbers = ()
    divergence: Numbers = ()
    policy_logprobs: Numbers = ()
    teacher_logprobs: Numbers = ()
    policy_candidates: Candidates = ()
    teacher_candidates: Candidates = ()


class RolloutRecord(_Part):
    """One rollout."""

    prompt_id: str
    sample: int
    question: str
    answer: str
    response: str
    token_ids: tuple[int, ...]
    finish_reason: str
    reward: float
    grade_cause: str
    advantage: float
    feedback: str = ""
    annotation_cause: str = ""
    reflection: str = ""
    spans: tuple[SpanRecord, ...]
    token_versions: tuple[tuple[int, int], ...] = ()
    policy_version: int | None = None
    """Of every token, in dumps that were written before versions were kept for each of them."""
    token_advantages: Numbers = ()
    pg_weight: Numbers = ()
    rollout_logprobs: Numbers = ()
    policy_logprobs: Numbers = ()
    policy_entropy: Numbers = ()
    routes: tuple[RouteRecord, ...] = ()

    @property
    def versions(self) -> Numbers:
        """Of the weights that wrote each token."""
        if self.policy_version is not None:
            return tuple(repeat(float(self.policy_version), len(self.token_ids)))
        return tuple(chain.from_iterable(repeat(float(version), count) for version, count in self.token_versions))

    @model_validator(mode="after")
    def _figures_belong_to_tokens(self) -> RolloutRecord:
        count = len(self.token_ids)
        columns = {name: getattr(self, name) for name in _PER_TOKEN} | {"token_versions": self.versions}
        wrong = next((name for name, values in columns.items() if len(values) not in (0, count)), None)
        if wrong:
            raise ValueError(f"{wrong} has {len(columns[wrong])} numbers, but token_ids has {count}")
        for route in self.routes:
            outside = next((position for position in route.positions if not 0 <= position < count), None)
            if outside is not None:
                raise ValueError(f"route {route.route} has position {outside}, but there are {count} tokens")
            rows = {name: len(getattr(route, name)) for name in _PER_ROW}
            wrong = next((name for name, found in rows.items() if found not in (0, len(route.positions))), None)
            if wrong:
                raise ValueError(f"{wrong} of route {route.route} has {rows[wrong]} rows, not {len(route.positions)}")
        return self


_PER_TOKEN = ("token_advantages", "pg_weight", "rollout_logprobs", "policy_logprobs", "policy_entropy")
_PER_ROW = (
    "token_weights",
    "divergence",
    "policy_logprobs",
    "teacher_logprobs",
    "policy_candidates",
    "teacher_candidates",
)


def read_records(file: Path) -> list[RolloutRecord]:
    """The rollouts of one step.

    Raises:
        DataError: a line is not a rollout that a run has written; names file and line.
    """
    return read_lines(file, RolloutRecord)
