"""What the loop needs of each role. `workers/` supplies Ray actors, tests supply fakes that behave.

Streaming roles are iterator transformers: they pull from the stage before and yield what is ready, so that a
rollout is graded and annotated while others are still being generated. Order of the output is unspecified;
identity is `RolloutKey`. Every implementation bounds its waits and raises `WorkerError` naming the suspect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from trace_rl.batch import (
    AnnotatedRollout,
    GradedRollout,
    Prompt,
    Rollout,
    RolloutKey,
    RolloutRequest,
    RoutedRollout,
    SpanClass,
    TeacherRequest,
    TeacherRows,
    TokenFigures,
    TokenStatistics,
    TrainingBatch,
)

Metrics = Mapping[str, float]
Fate = Literal["issued", "finished", "graded", "annotated", "trained", "dropped"]
"""What becomes of a prompt. `finished`, `graded`, `annotated`: all of its completions were; `dropped`: given up on
purpose."""
Mark = Literal["started", "checkpoint", "resumed", "ended"]
"""Of a run itself. `resumed`: it goes on after so many steps, whatever came after them; `ended`: all steps are done."""


def is_evaluation(record: Mapping[str, float]) -> bool:
    """Whether recorded metrics are those of an evaluation, and not of a training step."""
    return any(name.startswith("heldout/") for name in record)


class PromptSource(Protocol):
    """Training prompts in a reproducible order, with a position that can be saved."""

    def take(self, count: int) -> Sequence[Prompt]: ...

    def heldout(self, count: int) -> Sequence[Prompt]: ...

    def position(self) -> dict[str, int]: ...

    def seek(self, position: Mapping[str, int]) -> None: ...


@dataclass(frozen=True)
class Drawn:
    """How to get a prompt from its source again: seek the position, take so many, and it is this one of them."""

    position: Mapping[str, int]
    count: int
    index: int


@dataclass(frozen=True)
class Decoding:
    """How completions are sampled; log-probs are those of the distribution that results."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    goes_first: bool = False
    """Whether these completions are begun before others that wait for a place on an engine."""


class Generator(Protocol):
    def generate(self, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        """Submit everything now; iterate to receive. Several calls may be open at a time."""
        ...

    def cancel(self, keys: Sequence[RolloutKey]) -> None:
        """Give up completions of open calls, which end without them; what is not open is left alone."""
        ...


class Grader(Protocol):
    def grade(self, rollouts: Iterable[Rollout]) -> Iterator[GradedRollout]: ...


class Annotator(Protocol):
    def annotate(
        self, graded: Iterable[GradedRollout], span_classes: frozenset[SpanClass]
    ) -> Iterator[AnnotatedRollout]:
        """Annotate the rollouts whose class is wanted at this step; the others pass as `not_requested`."""
        ...

    def metrics(self) -> Metrics:
        """Counters since the last call."""
        ...


class ErrorRule(Protocol):
    """A task's rule that an oracle annotator uses: pure text in, spans over characters out."""

    types: Mapping[str, str]
    """Closed list of diagnostic types: name -> one line of meaning."""

    def key_spans(self, prompt: Prompt, text: str) -> Sequence[tuple[int, int, str, float]]:
        """Decisive pieces of a correct response as (char start, char end, type, importance)."""
        ...

    def error_spans(self, prompt: Prompt, text: str) -> Sequence[tuple[int, int, str, float]]:
        """The first wrong piece of a wrong response as (char start, char end, type, importance)."""
        ...


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint as it was written."""

    num_bytes: int
    digest: str


class Teacher(Protocol):
    """Scores the student's tokens under privileged context with weights of its own.

    `refresh` and `score` are called by a thread, one after the other, while the loop waits for rollouts.
    """

    def refresh(self, step: int) -> bool:
        """Bring the teacher's weights up to date if its policy asks for it at this step."""
        ...

    def score(self, requests: Sequence[TeacherRequest]) -> Sequence[TeacherRows]:
        """Return one `TeacherRows` per request, in the order of the requests."""
        ...

    def save(self, path: Path) -> Mapping[str, StoredFile]:
        """Write to a folder what `load` goes on from; returns the files by their path in it."""
        ...

    def load(self, path: Path) -> None: ...


class Learner(Protocol):
    def train_step(self, batch: TrainingBatch) -> Metrics: ...

    def score(self, batch: TrainingBatch) -> Sequence[TokenStatistics]:
        """What the policy says of the rows of routes under its present weights; takes no step."""
        ...

    def inspect(self, batch: TrainingBatch) -> Sequence[TokenFigures]:
        """What can be shown of every token under the present weights; takes no step."""
        ...

    def gradient_parts(self, batch: TrainingBatch) -> Metrics:
        """Norms of the two parts of the gradient and their cosine; empty where they cannot be had. Takes no step."""
        ...

    def save(self, path: Path) -> Mapping[str, StoredFile]:
        """Write to a folder what `load` goes on from; returns the files by their path in it."""
        ...

    def load(self, path: Path) -> None: ...


class WeightSync(Protocol):
    """Moves the learner's weights to every engine and proves that they arrived."""

    def sync(self, version: int) -> Metrics: ...


class Utilisation(Protocol):
    """How much the roles had to do."""

    def metrics(self) -> Metrics:
        """Shares of the time since the last call, by role."""
        ...


class Journal(Protocol):
    """Where a run leaves its trace; also the only clock."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time a stage of the current step; reported as `time/{name}_s`."""
        ...

    def log_step(self, step: int, metrics: Metrics) -> None: ...

    def log_evaluation(self, step: int, metrics: Metrics) -> None: ...

    def log_rollouts(
        self, step: int, routed: Sequence[RoutedRollout], batch: TrainingBatch, figures: Sequence[TokenFigures]
    ) -> None:
        """Keep a sample of the rollouts; `batch` holds what was trained on, in the same order.

        Args:
            figures: of the rollouts that were measured, in any order.
        """
        ...


class PromptLedger(Protocol):
    """Keeps account of every prompt (`trace_rl.ledger`); may be called by several threads."""

    def note(self, fate: Fate, step: int, prompts: Mapping[str, str]) -> None:
        """Args:
        prompts: how each was drawn (`trace_rl.ledger.drawn_key`) -> its id.
        """
        ...

    def mark(self, mark: Mark, step: int) -> None:
        """Args:
        step: training steps that are done.
        """
        ...

    def settle(self) -> None:
        """Return once what was noted is safe from a crash of the machine."""
        ...


class Checkpoints(Protocol):
    """Complete or absent, never half: a checkpoint is everything that the next step depends on."""

    def save(self, step: int, position: Mapping[str, int], pending: Sequence[Drawn]) -> None:
        """Args:
        pending: prompts before the position that are not trained on yet.
        """
        ...
