"""The timeline of the annotation benchmark, and the endpoint that it asks."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from trace_rl.annotation import AnnotationRequest
from trace_rl.annotation_prompts import render, schema
from trace_rl.annotation_reading import read_reply
from trace_rl.annotators import Api
from trace_rl.batch import Prompt
from trace_rl.segments import Segment
from trace_rl.workers.api_annotator import ApiChat
from trace_rl.workers.chat import ChatRequest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
annotation_overlap = pytest.importorskip("annotation_overlap")


def test_a_timeline_is_laid_out_from_the_start_of_the_step() -> None:
    """Sampling ends after 10 s, the last request came at 9 s and was answered at 11 s; a request of another step,
    before the start, is left out."""
    trace = {"clock/step_started_s": 1000.0, "time/rollout_s": 11.0, "annotation/wait_s": 1.0}
    trace |= {"time/teacher_s": 0.5, "time/learner_s": 2.0, "time/sync_s": 0.25}
    grpo = {"time/rollout_s": 10.0, "time/teacher_s": 0.0, "time/learner_s": 2.0, "time/sync_s": 0.25}
    calls = [{"came": came, "answered": came + 2} for came in (990.0, 1001.0, 1009.0)]
    assert annotation_overlap.timeline(trace, grpo, calls)[:4] == [
        "| TRACE: sampling and grading | 0.00 | 10.00 |",
        "| TRACE: 2 requests arrive at the endpoint | 1.00 | 9.00 |",
        "| TRACE: they are answered | 3.00 | 11.00 |",
        "| TRACE: waiting for annotations alone | 10.00 | 11.00 |",
    ]
    assert annotation_overlap.timeline(trace, grpo, calls)[-1] == "| GRPO: sync | 12.00 | 12.25 |"


def test_the_slow_endpoint_answers_a_real_request(tmp_path: Path) -> None:
    """Marks the middle one of three segments, after its latency."""
    segments = tuple(Segment(number, number, number + 1, "x") for number in (1, 2, 3))
    asked = AnnotationRequest(Prompt("p", "q", "1"), "key", segments, {"arith": "a result"}, 0.25)
    messages = render(asked, 3, (), 10**6, len, ()).messages

    async def ask(url: str) -> str:
        chat = ApiChat(Api(base_url=url, name="slow"), SecretStr(""))
        try:
            return (await chat.ask(ChatRequest(messages, schema(asked, 3), 100, 0.0), 10)).text
        finally:
            await chat.close()

    with annotation_overlap.endpoint(0.2, tmp_path / "log") as url:
        reply, _ = read_reply(asyncio.run(ask(url)))
    assert [(span.start, span.end, span.type) for span in reply.spans] == [(2, 2, "arith")]
    (call,) = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert call["answered"] - call["came"] >= 0.2
