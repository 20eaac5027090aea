"""Annotators that answer by themselves: the all-token control, drawn controls, and recordings."""

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_rl.annotation import (
    AnnotationReply,
    AnnotationRequest,
    AnnotatorBackend,
    Answer,
    SegmentSpan,
    resolve,
    span_budget,
)
from trace_rl.batch import Prompt, Span
from trace_rl.errors import AnnotationError, DataError
from trace_rl.rule_annotators import (
    AllTokenBackend,
    InvertedBackend,
    OracleBackend,
    RandomBackend,
    ReplayBackend,
    read_recording,
    recording_key,
    recording_line,
)
from trace_rl.segments import Segment, Segmentation, TokenText, segment
from trace_rl.tasks.arithmetic import ArithmeticRule

TYPES = {"slip": "a wrong result", "gap": "a missing step"}
Entry = tuple[int, int, str, float]


class Fixed:
    """Gives one reply to every request."""

    def __init__(self, *entries: Entry, reflection: str = "", **notes: float) -> None:
        spans = [
            SegmentSpan(start=start, end=end, type=name, importance=weight) for start, end, name, weight in entries
        ]
        self._answer = Answer(AnnotationReply(spans=tuple(spans), reflection=reflection), notes)

    async def answer(self, request: AnnotationRequest) -> Answer:
        return self._answer


class Unreachable:
    async def answer(self, request: AnnotationRequest) -> Answer:
        raise AnnotationError("No server listens there.", "unreachable")


def text_of(sizes: list[int]) -> TokenText:
    return TokenText("a" * sum(sizes), tuple(range(sum(sizes) + 1)))


def request(*sizes: int, prompt_id: str = "p", cap: float = 1.0) -> AnnotationRequest:
    """A response of one-character tokens in segments of these sizes, and an end-of-sequence token."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    segments = [
        Segment(i + 1, start, start + n, "a" * n) for i, (start, n) in enumerate(zip(starts, sizes, strict=True))
    ]
    return AnnotationRequest(
        Prompt(prompt_id, "question", "1"), "error", tuple(segments), TYPES, cap, num_tokens=sum(sizes) + 1
    )


def ask(backend: AnnotatorBackend, asked: AnnotationRequest) -> tuple[SegmentSpan, ...]:
    return asyncio.run(backend.answer(asked)).reply.spans


def numbers(spans: tuple[SegmentSpan, ...]) -> list[int]:
    """Numbers of the segments in the spans, in the order of the spans."""
    return [number for span in spans for number in range(span.start, span.end + 1)]


def resolved(backend: AnnotatorBackend, asked: AnnotationRequest) -> tuple[Span, ...]:
    sizes = [item.token_end - item.token_start for item in asked.segments]
    return resolve(asyncio.run(backend.answer(asked)).reply, asked, text_of(sizes), asked.num_tokens)[0]


def num_tokens(spans: tuple[Span, ...]) -> int:
    return sum(span.end - span.start for span in spans)


def test_all_token_marks_every_segment_with_the_first_type() -> None:
    assert ask(AllTokenBackend(), request(3, 5, 4)) == (SegmentSpan(start=1, end=3, type="slip"),)
    assert ask(AllTokenBackend(), request()) == ()


def test_a_control_marks_as_many_tokens_as_the_annotator_where_segments_are_alike() -> None:
    """Segments 2, 3 and 7 of ten with four tokens each: 12 tokens are three segments."""
    inner = Fixed((2, 3, "slip", 2.0), (7, 7, "gap", 1.0))
    for control in (RandomBackend, InvertedBackend):
        spans = ask(control(inner, 0, 1.0), request(*[4] * 10))
        assert len(numbers(spans)) == len(set(numbers(spans))) == 3
        assert (spans[0].type, spans[0].importance) == ("slip", 2.0)
        assert (spans[-1].type, spans[-1].importance) == ("gap", 1.0)


def test_runs_are_drawn_as_runs() -> None:
    """One span of five segments stays one; of the inverted control too, where only 7 to 12 are free: 7-11 or 8-12."""
    inner = Fixed((2, 6, "slip", 1.0))
    drawn = {numbers(ask(RandomBackend(inner, seed, 1.0), request(*[4] * 12)))[0] for seed in range(40)}
    for seed in range(40):
        (span,) = ask(RandomBackend(inner, seed, 1.0), request(*[4] * 12))
        assert span.end - span.start == 4
    assert drawn == set(range(1, 9))  # every place where five of twelve fit
    starts = {ask(InvertedBackend(inner, seed, 1.0), request(*[4] * 12))[0].start for seed in range(20)}
    assert starts == {7, 8}


def test_what_is_cut_by_the_cap_is_exactly_the_budget() -> None:
    """floor(0.25 * 41) = 10 tokens are left of the 24 that are marked: two and a half segments of four."""
    asked = request(*[4] * 10, cap=0.25)
    inner = Fixed((1, 6, "slip", 1.0))
    assert len(numbers(ask(RandomBackend(inner, 0, 0.25), asked))) == 3  # the third is cut
    for seed in range(20):
        assert num_tokens(resolved(RandomBackend(inner, seed, 0.25), asked)) == 10
        assert num_tokens(resolved(InvertedBackend(inner, seed, 0.25), asked)) == 10


def test_the_rest_is_filled_with_what_comes_nearest() -> None:
    """3 tokens are marked: where a segment of 10 comes first it does not fit, and the one of 3 is nearest."""
    inner = Fixed((2, 2, "slip", 1.0))
    for seed in range(20):
        assert sum(resolved_sizes(inner, seed, 10, 3, 10, 10)) == 3
    # 6 are marked and only 10s are left: one is off by 4, none by 6
    assert {tuple(resolved_sizes(Fixed((1, 1, "slip", 1.0)), seed, 6, 10, 10, inverted=True)) for seed in range(9)} == {
        (10,)
    }
    # of 4 marked one of 10 is off by 6, none by 4
    assert resolved_sizes(Fixed((1, 1, "slip", 1.0)), 0, 4, 10, 10, inverted=True) == []


def resolved_sizes(inner: AnnotatorBackend, seed: int, *sizes: int, inverted: bool = False) -> list[int]:
    control = InvertedBackend if inverted else RandomBackend
    return [num_tokens((span,)) for span in resolved(control(inner, seed, 1.0), request(*sizes))]


def test_a_draw_does_not_look_for_what_a_rule_looks_for() -> None:
    """Results of sums are the short segments: a draw of the best fit would mark all of them, as the oracle does."""
    lines = "\n".join(f"Step {n}: {20 + n} + 1 = {21 + n}" for n in range(1, 7))
    question = "Start with 21." + "".join(f" Step {n}: add 1." for n in range(1, 7))
    text = f"{lines}\n\\boxed{{27}}"
    token_text = TokenText(text, tuple(range(len(text) + 1)))
    cuts = segment(token_text, Segmentation(boundary=r"(?<== )|(?=\n)", min_tokens=1))
    rule = ArithmeticRule()
    asked = AnnotationRequest(Prompt("p", question, "27"), "key", cuts, rule.types, 1.0, num_tokens=len(text) + 1)
    marked = set(numbers(ask(OracleBackend(rule), asked)))
    assert len(marked) == 6
    shared = [
        len(marked & set(numbers(ask(RandomBackend(OracleBackend(rule), seed, 1.0), asked)))) for seed in range(60)
    ]
    # each line has a short and a long segment; 12 tokens are one long one or a few short ones before it
    assert sum(shared) / len(shared) < 3


def test_an_inverted_draw_is_short_where_little_is_left() -> None:
    """9 of 10 segments are marked; one is left."""
    assert numbers(ask(InvertedBackend(Fixed((1, 9, "slip", 1.0)), 0, 1.0), request(*[4] * 10))) == [10]
    assert ask(InvertedBackend(Fixed((1, 10, "slip", 1.0)), 0, 1.0), request(*[4] * 10)) == ()


def test_entries_that_name_nothing_are_not_matched() -> None:
    inner = Fixed((0, 4, "slip", 1.0), (9, 11, "slip", 1.0), (5, 4, "gap", 1.0), (6, 6, "gap", 1.0))
    (span,) = ask(RandomBackend(inner, 0, 1.0), request(*[4] * 10))
    assert (span.start, span.type) == (span.end, "gap")
    assert ask(RandomBackend(Fixed((0, 4, "slip", 1.0)), 0, 1.0), request(*[4] * 10)) == ()
    assert ask(RandomBackend(Fixed((1, 1, "slip", 1.0)), 0, 1.0), request()) == ()


@pytest.mark.parametrize("control", [RandomBackend, InvertedBackend])
def test_reflection_notes_and_failures_pass_through(control: type[RandomBackend] | type[InvertedBackend]) -> None:
    inner = Fixed((1, 1, "slip", 1.0), reflection="A sum is wrong.", repairs=1.0)
    answer = asyncio.run(control(inner, 0, 1.0).answer(request(4, 4)))
    assert answer.reply.reflection == "A sum is wrong." and answer.notes == {"repairs": 1.0}
    with pytest.raises(AnnotationError) as failure:
        asyncio.run(control(Unreachable(), 0, 1.0).answer(request(4, 4)))
    assert failure.value.cause == "unreachable"


def test_draws_depend_on_seed_prompt_and_response_alone() -> None:
    inner = Fixed((1, 2, "slip", 1.0), (5, 5, "gap", 1.0))
    asked = [request(*[4] * 30, prompt_id=str(index)) for index in range(20)]

    def draws(order: list[AnnotationRequest], seed: int) -> dict[str, tuple[SegmentSpan, ...]]:
        backend = RandomBackend(inner, seed, 1.0)
        return {item.prompt.prompt_id: ask(backend, item) for item in order}

    assert draws(asked, 0) == draws(asked[::-1], 0)
    assert len(set(draws(asked, 0).values())) > 10
    assert draws(asked, 0) != draws(asked, 1)
    longer = request(*[4] * 29, 5, prompt_id="0")
    assert ask(RandomBackend(inner, 0, 1.0), longer) != ask(RandomBackend(inner, 0, 1.0), asked[0])


sizes_strategy = st.lists(st.integers(1, 20), min_size=1, max_size=25)
entries_strategy = st.lists(
    st.tuples(st.integers(-1, 27), st.integers(0, 6), st.sampled_from(["slip", "gap", "new"]), st.floats(0, 3)),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(sizes_strategy, entries_strategy, st.floats(0.02, 1.0), st.integers(0, 3))
def test_controls_match_the_coverage_of_whatever_they_stand_in_for(
    sizes: list[int], said: list[tuple[int, int, str, float]], cap: float, seed: int
) -> None:
    asked = request(*sizes, cap=cap)
    inner = Fixed(*((start, start + more, name, weight) for start, more, name, weight in said))
    valid = [range(start, start + more + 1) for start, more, *_ in said if start >= 1 and start + more <= len(sizes)]
    touched = {number for entry in valid for number in entry}
    marked = sum(sizes[number - 1] for number in touched)
    budget = span_budget(asked.num_tokens, cap)
    target = min(marked, budget)

    drawn = ask(RandomBackend(inner, seed, cap), asked)
    chosen = numbers(drawn)
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(range(1, len(sizes) + 1))
    assert sum(sizes[number - 1] for number in chosen) <= budget + max(sizes)
    realised = num_tokens(resolved(RandomBackend(inner, seed, cap), asked))
    assert realised == budget if marked >= budget else 2 * abs(realised - target) <= max(sizes)
    assert bool(drawn) == bool(chosen) and (drawn == () if not target else True)

    away = numbers(ask(InvertedBackend(inner, seed, cap), asked))
    assert not set(away) & touched
    free = sum(sizes) - marked
    realised = num_tokens(resolved(InvertedBackend(inner, seed, cap), asked))
    assert 2 * (min(target, free) - realised) <= max(sizes)
    assert 2 * (realised - target) <= max(sizes)


REPLY = AnnotationReply(
    spans=(SegmentSpan(start=1, end=2, type="slip", importance=2.5),), reflection="Größe\u2028 is wrong."
)


def test_a_recording_answers_what_it_has_and_nothing_else(tmp_path: Path) -> None:
    asked, other = request(3, 5), request(4, 4)  # the same text, cut elsewhere
    assert asked.text == other.text
    path = tmp_path / "replies.jsonl"
    path.write_text(recording_line(asked, REPLY))
    backend = ReplayBackend(read_recording(path))
    assert asyncio.run(backend.answer(asked)) == Answer(REPLY)
    with pytest.raises(AnnotationError, match="no error spans for this response to p in these 2 segments") as failure:
        asyncio.run(backend.answer(other))
    assert failure.value.cause == "not_recorded"


def test_a_recorded_line_names_what_it_is_about() -> None:
    line = recording_line(request(3, 5), REPLY)
    assert line.endswith("\n") and line.count("\n") == 1
    assert json.loads(line) == {
        "key": recording_key(request(3, 5)),
        "prompt_id": "p",
        "span_class": "error",
        "reply": {
            "spans": [{"start": 1, "end": 2, "type": "slip", "importance": 2.5}],
            "reflection": "Größe\u2028 is wrong.",
        },
    }


def test_the_key_tells_questions_classes_and_segments_apart() -> None:
    asked = request(3, 5)
    others = [
        AnnotationRequest(Prompt("p", "question2", "1"), "error", asked.segments, TYPES, 1.0),
        AnnotationRequest(asked.prompt, "key", asked.segments, TYPES, 1.0),
        request(3, 4, 1),
        request(3, 6),
    ]
    assert len({recording_key(item) for item in [asked, *others]}) == 5
    # neither the run's ids nor its cap matter
    assert recording_key(request(3, 5, prompt_id="q", cap=0.1)) == recording_key(asked)


def test_of_two_replies_to_the_same_request_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text(recording_line(request(3, 5), AnnotationReply(spans=())) + recording_line(request(3, 5), REPLY))
    assert read_recording(path) == {recording_key(request(3, 5)): REPLY}


def test_a_line_that_its_writer_could_not_finish_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "replies.jsonl"
    whole, second = recording_line(request(3, 5), REPLY), recording_line(request(4, 4), REPLY)
    path.write_text(whole + second[:-1])  # only the newline is missing: nothing is lost
    assert len(read_recording(path)) == 2 and not caplog.records
    path.write_text(whole + second[:40])
    assert read_recording(path) == {recording_key(request(3, 5)): REPLY}
    assert "Line 2" in caplog.text and str(path) in caplog.text


@pytest.mark.parametrize("broken", ["{}", "not json", '{"key": "k", "reply": {"spans": 3}}', ""])
def test_another_broken_line_is_an_error_with_its_number(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text(recording_line(request(3, 5), REPLY) + broken + "\n" + recording_line(request(4, 4), REPLY))
    with pytest.raises(DataError, match=r"replies\.jsonl, line 2: .* is wrong"):
        read_recording(path)


def test_a_missing_recording_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read"):
        read_recording(tmp_path / "absent.jsonl")
