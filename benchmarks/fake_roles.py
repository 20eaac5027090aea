"""The roles of a run that costs nothing but what the driver does: for benchmarks of scheduling and of the driver.

Loop, `VllmGenerator`, `RayGrader`, `RayAnnotator` and journal are the real ones; behind them are actors that answer at
once, engines that sleep (`sleeping_engine`), a learner that sleeps and a sync that takes its time and moves nothing.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import sleeping_engine
from rich.console import Console
from sleeping_engine import Pace, SleepingEngine

from trace_rl.batch import Prompt, RolloutKey, RolloutRequest, Span, TeacherRequest, TeacherRows, TrainingBatch
from trace_rl.config.run import RunConfig
from trace_rl.flops import TeacherCost, TransformerShape
from trace_rl.launch.display import Display
from trace_rl.launch.journal import RunJournal
from trace_rl.launch.run_folder import RunFolder
from trace_rl.loop import Roles
from trace_rl.prompts import ChatTokenizer, PromptEncoder
from trace_rl.protocols import Decoding, Drawn, StoredFile
from trace_rl.step_metrics import staleness_metrics
from trace_rl.workers.annotator import RayAnnotator
from trace_rl.workers.generator import VllmGenerator
from trace_rl.workers.grading import Verdict
from trace_rl.workers.idle import IdleMeter, IdleShares
from trace_rl.workers.rewarder import RayGrader
from trace_rl.workers.span_annotator import Annotation, AnnotationTask
from trace_rl.workers.waiting import wait_for

for _module in (sleeping_engine, sys.modules[__name__]):
    ray.cloudpickle.register_pickle_by_value(_module)  # workers cannot import them

HIDDEN = 64
_START_S = 600.0
_CALL_S = 60.0
_SPAN_TOKENS = 8
_SHAPE = TransformerShape(num_layer_parameters=1, num_layers=0, attention_width=0, hidden=0, vocab=0)


class QuickRewarder:
    """An actor that grades by the last character."""

    def ready(self) -> bool:
        return True

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        return [Verdict(float(text.endswith(answer)), "graded") for text, answer in pairs]


class QuickAnnotator:
    """An actor that marks the first tokens of whatever it is given."""

    async def ready(self) -> bool:
        return True

    async def annotate(self, tasks: Sequence[AnnotationTask]) -> list[Annotation]:
        return [
            Annotation((Span(0, min(_SPAN_TOKENS, len(task.token_ids)), task.span_class, "arith"),), "annotated")
            for task in tasks
        ]


class CharTokenizer:
    """One token a character."""

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **_: Any) -> list[int]:
        return [ord(character) for character in conversation[-1]["content"]]


class Numbered:
    """Prompts p0, p1, p2, ... without end."""

    def __init__(self) -> None:
        self._index = 0

    def take(self, count: int) -> list[Prompt]:
        first, self._index = self._index, self._index + count
        question = "A shop sells pens at 2 and books at 7. Kim buys {} pens and 3 books. What does she pay?"
        return [Prompt(f"p{number}", question.format(number), "4") for number in range(first, self._index)]

    def heldout(self, count: int) -> list[Prompt]:
        return []

    def position(self) -> dict[str, int]:
        return {"index": self._index}

    def seek(self, position: Mapping[str, int]) -> None:
        self._index = position["index"]


class InstantTeacher:
    """Gives states of zeros for the wanted rows."""

    def refresh(self, step: int) -> bool:
        return False

    def score(self, requests: Sequence[TeacherRequest]) -> list[TeacherRows]:
        return [
            TeacherRows(
                request.key,
                request.view,
                request.positions,
                np.zeros((len(request.positions), HIDDEN), dtype=np.float32),
                np.zeros(0, dtype=np.float32),
                np.zeros(0, dtype=np.float32),
            )
            for request in requests
        ]

    def save(self, path: Path) -> dict[str, StoredFile]:
        return {}

    def load(self, path: Path) -> None: ...


class SleepingLearner:
    """Sleeps for a step, and tells how old the tokens were."""

    def __init__(self, step_s: float, max_staleness: int) -> None:
        self._step_s = step_s
        self._max_staleness = max_staleness
        self.idle = IdleMeter()
        self.lengths: list[int] = []
        """Of every completion that was trained on."""

    def train_step(self, batch: TrainingBatch) -> dict[str, float]:
        with self.idle.busy():
            time.sleep(self._step_s)
        self.lengths += [len(sequence.token_ids) for sequence in batch.sequences]
        return staleness_metrics(batch, self._max_staleness)

    def score(self, batch: TrainingBatch) -> Any:
        raise NotImplementedError

    def gradient_parts(self, batch: TrainingBatch) -> dict[str, float]:
        raise NotImplementedError

    def save(self, path: Path) -> dict[str, StoredFile]:
        return {}

    def load(self, path: Path) -> None: ...


class SleepingSync:
    """Holds the engines up for the time of a transfer, then has them accept the version."""

    def __init__(self, engines: Sequence[Any], duration_s: float) -> None:
        self._engines = list(engines)
        self._duration_s = duration_s
        self.synced_at: list[float] = []
        """Of `time.perf_counter`, when each version was in place."""

    def sync(self, version: int) -> dict[str, float]:
        self._each("receive_weights", self._duration_s)
        self._each("accept", version)
        self.synced_at.append(time.perf_counter())
        return {}

    def _each(self, method: str, argument: float) -> None:
        calls = [getattr(engine, method).remote(argument) for engine in self._engines]
        for call in calls:
            wait_for(call, _CALL_S, "a sleeping engine", method)


class Asked:
    """A sampler that keeps what it is asked for."""

    def __init__(self, generator: VllmGenerator) -> None:
        self._generator = generator
        self.keys: list[RolloutKey] = []

    def generate(self, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Any]:
        self.keys += [RolloutKey(request.prompt.prompt_id, request.sample) for request in requests]
        return self._generator.generate(requests, decoding)

    def cancel(self, keys: Sequence[RolloutKey]) -> None:
        self._generator.cancel(keys)


class NoCheckpoints:
    def save(self, step: int, position: Mapping[str, int], pending: Sequence[Drawn]) -> None: ...


@dataclass
class Crew:
    """A run's roles, with those of them that a benchmark reads."""

    roles: Roles
    learner: SleepingLearner
    sync: SleepingSync
    asked: Asked
    history: Sequence[Mapping[str, float]] = field(default_factory=list)


def quick_actors() -> tuple[Any, Any]:
    """Rewarder and annotator."""
    rewarder = ray.remote(QuickRewarder).options(num_cpus=0, max_concurrency=4).remote()
    annotator = ray.remote(QuickAnnotator).options(num_cpus=0).remote()
    return rewarder, annotator


def start_engines(count: int, pace: Pace) -> list[Any]:
    """Engines that are ready."""
    engines = [ray.remote(SleepingEngine).options(num_cpus=0, max_concurrency=16).remote(i, pace) for i in range(count)]
    for engine in engines:
        wait_for(engine.ready.remote(), _START_S, "a sleeping engine", "starting")
    return engines


@contextlib.contextmanager
def crew(
    config: RunConfig,
    engines: Sequence[Any],
    actors: tuple[Any, Any],
    learner_s: float,
    sync_s: float,
    tokenizer: ChatTokenizer | None = None,
) -> Iterator[Crew]:
    """Roles over these engines, with a journal in a folder that is removed at the end."""
    generator = VllmGenerator(engines, config.sampling.max_response_tokens, timeout_s=600)
    learner = SleepingLearner(learner_s, config.scheduling.max_staleness)
    sync, asked = SleepingSync(engines, sync_s), Asked(generator)
    with tempfile.TemporaryDirectory() as folder:
        journal = RunJournal(
            RunFolder(Path(folder)), config.logging, Display(Console(file=io.StringIO()), config.run.steps), []
        )
        roles = Roles(
            prompts=Numbered(),
            encoder=PromptEncoder(tokenizer or CharTokenizer(), "", {}, types=("arith", "copy")),
            generator=generator,
            sampler=asked,
            grader=RayGrader(actors[0], config.rewarder),
            annotator=RayAnnotator(actors[1], config.annotator),
            teacher=InstantTeacher(),
            teacher_cost=TeacherCost((_SHAPE,) if config.needs_teacher else ()),
            learner=learner,
            policy_shape=_SHAPE,
            weight_sync=sync,
            utilisation=IdleShares({"generator": generator.idle, "learner": [learner.idle]}),
            journal=journal,
            checkpoints=NoCheckpoints(),
        )
        found = Crew(roles, learner, sync, asked)
        yield found
        found.history = journal.history
