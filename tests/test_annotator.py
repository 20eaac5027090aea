"""The annotator: what is annotated, what is left out, what fails without harm, and the actor behind it."""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trace_rl.batch import AnnotatedRollout, FinishReason, GradeCause, GradedRollout, Prompt, Rollout, SpanClass
from trace_rl.config.annotator import Annotator
from trace_rl.segments import Segmentation
from trace_rl.tasks.arithmetic import ArithmeticRule
from trace_rl.workers.annotator import RayAnnotator
from trace_rl.workers.span_annotator import AnnotationTask, SpanAnnotator, Surroundings
from trace_rl.workers.token_reader import CoreReader, reader_of

EOS = 256
BOTH: frozenset[SpanClass] = frozenset({"key", "error"})
SETTINGS = Annotator(segmentation=Segmentation(boundary=r"(?<== )|(?=\n)", min_tokens=1))
PROMPT = Prompt("p", "Start with 47. Step 1: add 38. Step 2: subtract 15.", "70")
RIGHT = "Step 1: 47 + 38 = 85\nStep 2: 85 - 15 = 70\n\\boxed{70}"
SLIP = "Step 1: 47 + 38 = 86\nStep 2: 86 - 15 = 71\n\\boxed{71}"


def bytes_tokenizer() -> Tokenizer:
    """One token a byte, and an end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    assert tokenizer.token_to_id("<eos>") == EOS
    return tokenizer


TOKENIZER = bytes_tokenizer()


SURROUNDINGS = Surroundings({"key": ArithmeticRule.types, "error": ArithmeticRule.types}, 0, "run", "")


class Direct:
    """Stands in for the actor handle: `annotate.remote(tasks).future()` runs the real annotator at once."""

    def __init__(self, annotator: SpanAnnotator) -> None:
        self._annotator = annotator
        self.num_tasks = 0

    @property
    def annotate(self) -> "Direct":
        return self

    def remote(self, tasks: Sequence[Any]) -> "Direct":
        self.num_tasks += len(tasks)
        self._future: Future[Any] = Future()
        self._future.set_result(asyncio.run(self._annotator.annotate(tasks)))
        return self

    def future(self) -> "Future[Any]":
        return self._future


class BrokenRule:
    types: Mapping[str, str] = {"x": "anything"}

    def key_spans(self, prompt: Prompt, text: str) -> Sequence[tuple[int, int, str, float]]:
        raise RuntimeError("this rule knows no responses")

    error_spans = key_spans


class Recorder(ArithmeticRule):
    """Remembers the texts that the rule is given."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def error_spans(self, prompt: Prompt, text: str) -> Sequence[tuple[int, int, str, float]]:
        self.texts.append(text)
        return super().error_spans(prompt, text)


def graded(
    text: str, reward: float, sample: int = 0, cause: GradeCause = "graded", finish: FinishReason = "stop"
) -> GradedRollout:
    ids = (*TOKENIZER.encode(text).ids, *([EOS] if finish == "stop" else []))
    versions = np.where(np.arange(len(ids)) < 3, 4, 5)  # a sync came after three tokens
    return GradedRollout(Rollout(PROMPT, sample, (1,), ids, np.zeros(len(ids)), finish, versions, text), reward, cause)


def annotator(rule: Any = None, settings: Annotator = SETTINGS) -> RayAnnotator:
    return RayAnnotator(Direct(actor_for(settings, rule)), settings)


def actor_for(settings: Annotator = SETTINGS, rule: Any = None) -> SpanAnnotator:
    return SpanAnnotator(CoreReader(TOKENIZER), settings, rule or ArithmeticRule(), SURROUNDINGS)


def texts(item: AnnotatedRollout) -> list[tuple[str, str, str]]:
    """One token a byte: positions are positions in the text."""
    text = item.graded.rollout.text
    return [(text[span.start : span.end], span.span_class, span.type) for span in item.spans]


def test_a_policy_that_annotates_itself_is_asked_at_the_newest_version_that_wrote_the_rollout() -> None:
    assert AnnotationTask.of(graded(RIGHT, 1.0)).policy_version == 5


def test_key_spans_on_right_and_error_spans_on_wrong_rollouts() -> None:
    role = annotator()
    right, wrong = sorted(role.annotate([graded(RIGHT, 1.0), graded(SLIP, 0.0)], BOTH), key=lambda i: -i.graded.reward)
    assert texts(right) == [("85", "key", "arith"), ("70", "key", "arith")]
    assert texts(wrong) == [("86", "error", "arith")]
    assert right.cause == wrong.cause == "annotated"
    # both texts have 52 characters, and 53 tokens with end-of-sequence: 4/53 and 2/53 are covered
    assert len(RIGHT) == len(SLIP) == 52
    metrics = role.metrics()
    assert metrics["annotation/coverage_frac"] == metrics["annotation/coverage_before_cap_frac"] == 3 / 53
    assert metrics["annotation/types/arith"] == 3.0 and metrics["annotation/annotated"] == 2.0
    assert metrics["annotation/empty_frac"] == metrics["annotation/round_trip_errors"] == 0.0


def test_the_cap_shows_in_the_metrics() -> None:
    """floor(0.05 * 53) = 2 of the 4 tokens that the rule marks."""
    role = annotator(settings=SETTINGS.model_copy(update={"coverage_cap": 0.05}))
    (item,) = role.annotate([graded(RIGHT, 1.0)], BOTH)
    assert texts(item) == [("85", "key", "arith")]  # 47 + 38 carries and so does 85 - 15; the first comes first
    metrics = role.metrics()
    assert metrics["annotation/coverage_before_cap_frac"] == 4 / 53
    assert metrics["annotation/coverage_frac"] == 2 / 53


def test_only_wanted_classes_with_a_verdict_are_annotated() -> None:
    actor = Direct(actor_for())
    role = RayAnnotator(actor, SETTINGS)
    items = [
        graded(RIGHT, 1.0, 0),
        graded(SLIP, 0.0, 1),
        graded(RIGHT, 0.0, 2, cause="timeout"),
        graded(RIGHT, 0.0, 3, cause="error"),
    ]
    causes = {item.graded.rollout.sample: item.cause for item in role.annotate(items, frozenset({"error"}))}
    assert causes == {0: "not_requested", 1: "annotated", 2: "not_requested", 3: "not_requested"}
    assert actor.num_tasks == 1
    assert all(item.cause == "not_requested" for item in role.annotate(items, frozenset()))


def test_the_rule_reads_the_response_without_end_of_sequence() -> None:
    rule = Recorder()
    cut_short = SLIP[:20]
    items = [graded(SLIP, 0.0, 0), graded(cut_short, 0.0, 1, cause="truncated", finish="length"), graded("", 0.0, 2)]
    assert {item.cause for item in annotator(rule).annotate(items, BOTH)} == {"annotated"}
    assert sorted(rule.texts) == sorted([SLIP, cut_short, ""])


def test_a_rule_that_raises_costs_spans_only(caplog: pytest.LogCaptureFixture) -> None:
    role = annotator(BrokenRule())
    items = list(role.annotate([graded(RIGHT, 1.0, sample) for sample in range(3)], BOTH))
    assert [(item.cause, item.spans) for item in items] == [("failed", ())] * 3
    metrics = role.metrics()
    assert metrics["annotation/failed"] == 3.0 and "annotation/coverage_frac" not in metrics
    assert caplog.text.count("this rule knows no responses") == 1
    assert role.metrics()["annotation/failed"] == 0.0


def test_late_annotations_leave_no_spans() -> None:
    class Silent(Direct):
        def remote(self, tasks: Sequence[Any]) -> "Direct":
            self._future = Future()
            return self

    impatient = SETTINGS.model_copy(update={"step_wait_s": 0.1})
    role = RayAnnotator(Silent(actor_for(impatient)), impatient)
    started = time.monotonic()
    (item,) = role.annotate([graded(RIGHT, 1.0)], BOTH)
    assert (item.cause, item.spans) == ("timeout", ())
    assert time.monotonic() - started < 5
    metrics = role.metrics()
    assert metrics["annotation/failed/timeout"] == 1.0 and metrics["annotation/wait_s"] >= 0.1


def test_a_hugging_face_tokenizer_is_reduced_to_its_core() -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<eos>")
    core = reader_of(fast)
    assert isinstance(core, CoreReader)
    ids = [*TOKENIZER.encode("größer 🙂").ids, EOS]
    assert core.convert_ids_to_tokens(ids) == fast.convert_ids_to_tokens(ids)
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    assert core.decode(ids, **options) == fast.decode(ids, **options) == "größer 🙂<eos>"
    assert core.special_tokens() == ["<eos>"] and core.count("größer<eos>") == len("größer".encode()) + 1


@pytest.mark.engine
def test_over_ray(local_ray: None, caplog: pytest.LogCaptureFixture) -> None:
    """A real actor: results stream while the producer goes on, it needs no torch, and its death costs spans only."""
    import ray

    class Observed(SpanAnnotator):
        async def modules(self) -> list[str]:
            import sys

            return list(sys.modules)

    actor = (
        ray.remote(Observed)
        .options(num_cpus=0.5)
        .remote(CoreReader(TOKENIZER), SETTINGS, ArithmeticRule(), SURROUNDINGS)
    )
    assert ray.get(actor.ready.remote(), timeout=60)
    role = RayAnnotator(actor, SETTINGS)

    def produce() -> Iterator[GradedRollout]:
        for sample in range(40):
            yield graded(RIGHT if sample % 2 else SLIP, float(sample % 2), sample)

    items = list(role.annotate(produce(), BOTH))
    assert sorted(item.graded.rollout.sample for item in items) == list(range(40))
    for item in items:
        assert texts(item)[0] == (("85", "key", "arith") if item.graded.is_correct else ("86", "error", "arith"))
    assert not {"torch", "transformers"} & set(ray.get(actor.modules.remote(), timeout=60))
    ray.kill(actor)
    with pytest.raises(ray.exceptions.RayActorError):
        for _ in range(100):  # a process that is being killed may still answer
            ray.get(actor.ready.remote(), timeout=60)
            time.sleep(0.1)
    left = list(role.annotate(produce(), BOTH))
    assert [(item.cause, item.spans) for item in left] == [("unreachable", ())] * 40
    assert role.metrics()["annotation/failed/unreachable"] == 40.0
    assert caplog.text.count("the annotator's actor has died") == 1


@pytest.mark.engine
def test_an_actor_that_dies_is_started_again(local_ray: None) -> None:
    """A response that kills the process costs its own spans; Ray starts another one for the rollouts that follow."""
    import os

    import ray

    class Deadly(ArithmeticRule):
        def key_spans(self, prompt: Prompt, text: str) -> Sequence[tuple[int, int, str, float]]:
            return super().key_spans(prompt, text) if "deadly" not in text else os._exit(1)

    remote = ray.remote(SpanAnnotator).options(num_cpus=0.5, max_restarts=1)
    role = RayAnnotator(remote.remote(CoreReader(TOKENIZER), SETTINGS, Deadly(), SURROUNDINGS), SETTINGS)
    assert [item.cause for item in role.annotate([graded("deadly", 1.0)], BOTH)] == ["unreachable"]
    started = time.monotonic()
    while [item.cause for item in role.annotate([graded(RIGHT, 1.0)], BOTH)] != ["annotated"]:
        assert time.monotonic() - started < 60
        time.sleep(0.2)
