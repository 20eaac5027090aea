"""A language model as an annotator: asks within its limits, pays once, and loses no more than spans."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trace_rl.annotation import AnnotationRequest
from trace_rl.annotators import Budget, Frozen, Limits, SelfAnnotation
from trace_rl.batch import Prompt
from trace_rl.errors import AnnotationError
from trace_rl.segments import Segment
from trace_rl.workers.annotation_cache import AnswerCache
from trace_rl.workers.chat import ChatAnswer, ChatFault, ChatRequest
from trace_rl.workers.model_annotator import ModelAnnotator, Telling
from trace_rl.workers.polite_chat import PoliteChat

TYPES = {"slip": "a wrong result", "gap": "a missing step"}
GOOD = json.dumps({"spans": [{"start": 2, "end": 2, "type": "slip", "importance": 3}], "reflection": ""})
LIMITS = Limits(concurrency=4, max_attempts=3, backoff_s=0.5, backoff_max_s=4.0, breaker_failures=100)
SETTINGS = Frozen(path="m", limits=LIMITS, max_reply_tokens=100)
TELLING = Telling(("answer",), lambda text: len(text) // 4, ())


class Scripted:
    """A model that says what the script has for its n-th request, n from 0; remembers what it was asked."""

    identity = "scripted"

    def __init__(self, script: Callable[[int, ChatRequest], str | ChatFault], delay_s: float = 0.0) -> None:
        self._script, self._delay_s = script, delay_s
        self.asked: list[ChatRequest] = []
        self.most_at_once = self._at_once = 0

    async def ask(self, request: ChatRequest, timeout_s: float) -> ChatAnswer:
        number = len(self.asked)
        self.asked.append(request)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(self._delay_s)
        self._at_once -= 1
        said = self._script(number, request)
        if isinstance(said, ChatFault):
            raise said
        return ChatAnswer(said, prompt_tokens=10, completion_tokens=5)


class Sleeper:
    """Remembers how long was waited, and does not wait."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, seconds: float) -> None:
        if seconds:
            self.slept.append(seconds)
        await asyncio.sleep(0)


def request(text: str = "2 + 2 = 5", version: int = 0) -> AnnotationRequest:
    segments = (Segment(1, 0, 4, "We add "), Segment(2, 4, 8, text))
    return AnnotationRequest(Prompt("p", "Add two and two.", "4"), "error", segments, TYPES, 0.25, 9, version)


class Asked(ModelAnnotator):
    """The annotator together with what tests look at of its chat."""

    def __init__(self, settings: Any, chat: PoliteChat, telling: Telling) -> None:
        super().__init__(settings, chat, telling)
        self.usage, self.notices = chat.usage, chat.notices


def annotator(model: Scripted, folder: Path, settings: Any = SETTINGS, **options: Any) -> Asked:
    folder.mkdir(exist_ok=True)
    given = {"run": "a run", "patience_s": 60.0, "sleep": Sleeper(), **options}
    cache = AnswerCache(folder / "answers.sqlite")
    chat = PoliteChat(settings, model, cache, prompt_version="1", count=TELLING.count, **given)
    return Asked(settings, chat, TELLING)


def causes(results: Sequence[Any]) -> list[str]:
    return [each.cause if isinstance(each, AnnotationError) else "answered" for each in results]


async def ask_all(asked: Asked, requests: Sequence[AnnotationRequest]) -> list[Any]:
    return await asyncio.gather(*map(asked.answer, requests), return_exceptions=True)


def test_an_answer_becomes_a_reply(tmp_path: Path) -> None:
    model = Scripted(lambda number, asked: GOOD)
    answer = asyncio.run(annotator(model, tmp_path).answer(request()))
    assert [(span.start, span.end, span.type) for span in answer.reply.spans] == [(2, 2, "slip")]
    assert answer.notes == {"malformed_spans": 0, "hidden_spans": 0, "elided_segments": 0, "repairs": 0}
    (asked,) = model.asked
    assert asked.max_tokens == 100
    assert asked.schema["properties"]["spans"]["maxItems"] == 2  # there are no more segments


def test_what_was_answered_is_asked_for_once_by_many_and_across_restarts(tmp_path: Path) -> None:
    model = Scripted(lambda number, asked: GOOD, delay_s=0.01)
    asked = annotator(model, tmp_path)
    results = asyncio.run(ask_all(asked, [request(), request("3 + 3 = 7"), request(), request()]))
    assert causes(results) == ["answered"] * 4 and len(model.asked) == 2
    usage = asked.usage()
    assert usage["annotation/requests"] == usage["annotation/shared"] == 2 and usage["annotation/cache_hits"] == 0

    restarted = Scripted(lambda number, asked: GOOD)
    again = annotator(restarted, tmp_path)
    assert causes(asyncio.run(ask_all(again, [request(), request("3 + 3 = 7"), request("4")]))) == ["answered"] * 3
    assert len(restarted.asked) == 1
    assert again.usage()["annotation/cache_hits"] == 2
    assert again.usage()["annotation/run_requests"] == 3  # of both lives of the run


def test_only_a_policy_has_other_answers_at_another_version(tmp_path: Path) -> None:
    frozen, policy = Scripted(lambda number, asked: GOOD), Scripted(lambda number, asked: GOOD)
    own = SelfAnnotation(max_prompt_tokens=4096)
    asyncio.run(ask_all(annotator(frozen, tmp_path), [request(version=1), request(version=2)]))
    asyncio.run(ask_all(annotator(policy, tmp_path, own), [request(version=1), request(version=2)]))
    assert len(frozen.asked) == 1
    assert [asked.policy_version for asked in policy.asked] == [1, 2]


def test_a_fault_is_tried_again_after_what_the_server_asks_for_or_the_backoff(tmp_path: Path) -> None:
    """Try 1: Retry-After of 7 s; try 2: backoff 0.5 * 2 = 1 s, times 0.5 to 1; try 3 answers."""
    faults = [ChatFault("slow down", "rate_limited", retry_after_s=7.0), ChatFault("broken", "server_error")]
    model = Scripted(lambda number, asked: faults[number] if number < 2 else GOOD)
    sleeper = Sleeper()
    asked = annotator(model, tmp_path, sleep=sleeper)
    assert causes(asyncio.run(ask_all(asked, [request()]))) == ["answered"]
    assert sleeper.slept[0] == 7.0 and 0.5 <= sleeper.slept[1] <= 1.0 and len(sleeper.slept) == 2
    usage = asked.usage()
    assert usage["annotation/requests"] == 3 and usage["annotation/retries"] == 2
    assert usage["annotation/faults/rate_limited"] == usage["annotation/faults/server_error"] == 1
    assert usage["annotation/run_tokens"] == 15  # failed tries cost nothing but the request


@pytest.mark.parametrize(
    ("fault", "num_asked", "cause"),
    [
        (ChatFault("broken", "server_error"), 3, "server_error"),
        (ChatFault("no such model", "refused", is_final=True), 1, "refused"),
        (ChatFault("slow down", "rate_limited", retry_after_s=120.0), 1, "rate_limited"),  # beyond the patience
    ],
)
def test_tries_end(tmp_path: Path, fault: ChatFault, num_asked: int, cause: str) -> None:
    model = Scripted(lambda number, asked: fault)
    assert causes(asyncio.run(ask_all(annotator(model, tmp_path), [request()]))) == [cause]
    assert len(model.asked) == num_asked


def test_an_answer_outside_of_the_protocol_is_sent_back_once(tmp_path: Path) -> None:
    model = Scripted(lambda number, asked: "segment 2 is wrong" if number == 0 else GOOD)
    answer = asyncio.run(annotator(model, tmp_path).answer(request()))
    assert answer.notes["repairs"] == 1 and len(answer.reply.spans) == 1
    first, second = model.asked
    assert second.messages[: len(first.messages)] == first.messages
    assert [message.role for message in second.messages[len(first.messages) :]] == ["assistant", "user"]

    stubborn = Scripted(lambda number, asked: "no")
    assert causes(asyncio.run(ask_all(annotator(stubborn, tmp_path), [request("5")]))) == ["unparsable"]
    assert len(stubborn.asked) == 2
    # both bad answers were paid for: a restart asks neither again
    again = Scripted(lambda number, asked: GOOD)
    assert causes(asyncio.run(ask_all(annotator(again, tmp_path), [request("5")]))) == ["unparsable"]
    assert not again.asked

    unrepaired = SETTINGS.model_copy(update={"repair": False})
    once = Scripted(lambda number, asked: "no")
    assert causes(asyncio.run(ask_all(annotator(once, tmp_path, unrepaired), [request("6")]))) == ["unparsable"]
    assert len(once.asked) == 1


def test_no_more_than_so_many_are_under_way(tmp_path: Path) -> None:
    model = Scripted(lambda number, asked: GOOD, delay_s=0.01)
    results = asyncio.run(ask_all(annotator(model, tmp_path), [request(str(number)) for number in range(20)]))
    assert causes(results) == ["answered"] * 20 and model.most_at_once == 4


def test_the_budget_ends_the_asking_across_restarts_and_stored_answers_stay(tmp_path: Path) -> None:
    """Five requests; three were sent before the restart, so two more are after it."""
    settings = SETTINGS.model_copy(update={"budget": Budget(requests=5)})
    model = Scripted(lambda number, asked: GOOD)
    first = annotator(model, tmp_path, settings)
    assert causes(asyncio.run(ask_all(first, [request(str(number)) for number in range(3)]))) == ["answered"] * 3
    assert not first.notices()
    second = annotator(model, tmp_path, settings)
    results = asyncio.run(ask_all(second, [request(str(number)) for number in range(8)]))
    assert sorted(causes(results)) == ["answered"] * 5 + ["over_budget"] * 3
    assert len(model.asked) == 5
    (notice,) = second.notices()
    assert "budget" in notice and not second.notices()


def test_money_is_never_overspent_however_many_are_under_way(tmp_path: Path) -> None:
    """A reply may cost up to 100 tokens of 1e-4, 0.01, and costs 5 tokens, 5e-4. The budget of 0.0121 covers one
    request at a time, and after n answers a further one while n * 5e-4 <= 0.0021: five in all, together or one by one,
    because a request waits for those that are under way to cost less than was booked."""
    budget = Budget(money=0.0121, price_per_million_completion_tokens=100.0)
    settings = SETTINGS.model_copy(update={"budget": budget})
    together = Scripted(lambda number, asked: GOOD, delay_s=0.01)
    results = asyncio.run(ask_all(annotator(together, tmp_path / "a", settings), [request(str(n)) for n in range(8)]))
    assert sorted(causes(results)) == ["answered"] * 5 + ["over_budget"] * 3 and together.most_at_once == 1

    asked = annotator(Scripted(lambda number, asked: GOOD), tmp_path / "b", settings)

    async def one_by_one() -> list[Any]:
        return [(await ask_all(asked, [request(str(number))]))[0] for number in range(8)]

    assert causes(asyncio.run(one_by_one())) == ["answered"] * 5 + ["over_budget"] * 3
    assert asked.usage()["annotation/run_cost"] == pytest.approx(5 * 5e-4)


def test_a_server_that_limits_its_rate_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Of 12 requests, 4 at once, each is told to slow down twice before it is answered: 24 refusals in a row or nearly,
    beyond the breaker's 3."""
    limits = LIMITS.model_copy(update={"breaker_failures": 3})
    seen: Counter[str] = Counter()

    def limited(number: int, asked: ChatRequest) -> str | ChatFault:
        content = asked.messages[-1].content
        seen[content] += 1
        return ChatFault("slow down", "rate_limited", retry_after_s=0.01) if seen[content] < 3 else GOOD

    asked = annotator(Scripted(limited), tmp_path, SETTINGS.model_copy(update={"limits": limits}))
    assert causes(asyncio.run(ask_all(asked, [request(str(number)) for number in range(12)]))) == ["answered"] * 12


def test_new_weights_that_end_a_chat_are_no_failure_of_the_engine(tmp_path: Path) -> None:
    limits = LIMITS.model_copy(update={"breaker_failures": 3})
    ended = ChatFault("new weights came first", "timeout", is_final=True)
    model = Scripted(lambda number, asked: ended if number < 10 else GOOD)
    asked = annotator(model, tmp_path, SETTINGS.model_copy(update={"limits": limits}))
    assert causes(asyncio.run(ask_all(asked, [request(str(n)) for n in range(10)]))) == ["timeout"] * 10
    assert causes(asyncio.run(ask_all(asked, [request(str(n)) for n in range(10, 20)]))) == ["answered"] * 10


def test_an_open_breaker_is_waited_for_while_the_rollout_has_patience(tmp_path: Path) -> None:
    """Three failures open it for 0.2 s; the fourth request waits for that and is answered."""
    limits = LIMITS.model_copy(update={"breaker_failures": 3, "breaker_pause_s": 0.2, "max_attempts": 1})
    model = Scripted(lambda number, asked: ChatFault("down", "unreachable") if number < 3 else GOOD)
    asked = annotator(model, tmp_path, SETTINGS.model_copy(update={"limits": limits}), sleep=asyncio.sleep)

    async def one_by_one() -> list[Any]:
        return [(await ask_all(asked, [request(str(number))]))[0] for number in range(4)]

    assert causes(asyncio.run(one_by_one())) == ["unreachable"] * 3 + ["answered"]


def test_a_server_that_refuses_everything_is_not_waited_for(tmp_path: Path) -> None:
    """A key that is not accepted: three refusals open the breaker, and the others fail at once, not after its pause."""
    limits = LIMITS.model_copy(update={"breaker_failures": 3, "breaker_pause_s": 30.0, "concurrency": 1})
    model = Scripted(lambda number, asked: ChatFault("HTTP 401", "refused", is_final=True))
    asked = annotator(model, tmp_path, SETTINGS.model_copy(update={"limits": limits}), sleep=asyncio.sleep)
    started = time.monotonic()
    results = asyncio.run(ask_all(asked, [request(str(number)) for number in range(6)]))
    assert causes(results) == ["refused"] * 3 + ["circuit_open"] * 3 and time.monotonic() - started < 5


@pytest.mark.parametrize(("is_billed", "tokens"), [(True, 100), (False, 0)])
def test_what_may_have_been_billed_is_charged_as_booked(tmp_path: Path, is_billed: bool, tokens: int) -> None:
    fault = ChatFault("no answer in time", "timeout", is_billed=is_billed)
    settings = SETTINGS.model_copy(update={"limits": LIMITS.model_copy(update={"max_attempts": 1})})
    asked = annotator(Scripted(lambda number, asked: fault), tmp_path, settings)
    assert causes(asyncio.run(ask_all(asked, [request()]))) == ["timeout"]
    spent = AnswerCache(tmp_path / "answers.sqlite").spent("a run")
    assert (spent.requests, spent.completion_tokens) == (1, tokens)
    assert asked.usage()["annotation/run_tokens"] == spent.prompt_tokens + tokens


def test_a_server_that_counts_nothing_is_charged_by_our_own_count(tmp_path: Path) -> None:
    class Uncounted(Scripted):
        async def ask(self, request: ChatRequest, timeout_s: float) -> ChatAnswer:
            answer = await super().ask(request, timeout_s)
            return ChatAnswer(answer.text, 0, 0, {"usage_missing": 1.0})

    asked = annotator(Uncounted(lambda number, asked: GOOD), tmp_path)
    assert causes(asyncio.run(ask_all(asked, [request()]))) == ["answered"]
    spent = AnswerCache(tmp_path / "answers.sqlite").spent("a run")
    assert spent.completion_tokens == len(GOOD) // 4 and spent.prompt_tokens > 100
    (notice,) = asked.notices()
    assert "does not count tokens" in notice


def test_what_is_under_way_is_on_the_ledger_before_it_is_sent(tmp_path: Path) -> None:
    """A run that is killed while the model answers has spent what the answer may cost."""
    ledger: list[int] = []

    def look(number: int, asked: ChatRequest) -> str:
        spent = AnswerCache(tmp_path / "answers.sqlite").spent("a run")
        ledger.extend((spent.requests, spent.completion_tokens))
        return GOOD

    asyncio.run(annotator(Scripted(look), tmp_path).answer(request()))
    assert ledger == [1, 100]
    after = AnswerCache(tmp_path / "answers.sqlite").spent("a run")
    assert (after.requests, after.prompt_tokens, after.completion_tokens) == (1, 10, 5)


def test_after_many_failures_nothing_is_sent_for_a_while(tmp_path: Path) -> None:
    limits = LIMITS.model_copy(update={"breaker_failures": 3, "max_attempts": 1, "breaker_pause_s": 1000.0})
    settings = SETTINGS.model_copy(update={"limits": limits})
    model = Scripted(lambda number, asked: ChatFault("down", "unreachable"))

    async def one_by_one(asked: Asked) -> list[Any]:
        return [(await ask_all(asked, [request(str(number))]))[0] for number in range(6)]

    assert (
        causes(asyncio.run(one_by_one(annotator(model, tmp_path, settings))))
        == ["unreachable"] * 3 + ["circuit_open"] * 3
    )
    assert len(model.asked) == 3


def test_an_answer_that_comes_too_late_is_stored_all_the_same(tmp_path: Path) -> None:
    model = Scripted(lambda number, asked: GOOD, delay_s=0.3)
    asked = annotator(model, tmp_path)

    async def give_up_early() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asked.answer(request())
        await asyncio.sleep(0.5)

    asyncio.run(give_up_early())
    again = Scripted(lambda number, asked: GOOD)
    assert causes(asyncio.run(ask_all(annotator(again, tmp_path), [request()]))) == ["answered"]
    assert not again.asked


def test_what_nobody_waits_for_any_more_takes_no_place_from_others(tmp_path: Path) -> None:
    """Two places. Of six requests two are being answered when they are given up: they are stored, the other four are
    not sent but for one, which is asked for again; it and a new one have places at once."""
    limits = LIMITS.model_copy(update={"concurrency": 2})
    model = Scripted(lambda number, asked: GOOD, delay_s=0.2)
    asked = annotator(model, tmp_path, SETTINGS.model_copy(update={"limits": limits}))

    async def two_steps() -> tuple[list[Any], float]:
        first = [asyncio.ensure_future(asked.answer(request(str(n)))) for n in range(6)]
        await asyncio.sleep(0.1)
        for waiting in first:
            waiting.cancel()
        started = time.monotonic()
        second = await ask_all(asked, [request("5"), request("7")])
        took_s = time.monotonic() - started
        await asyncio.sleep(0.3)
        return second, took_s

    second, took_s = asyncio.run(two_steps())
    assert causes(second) == ["answered"] * 2
    assert took_s < 0.38  # beside the two that are still being answered, not after them
    assert len(model.asked) == 4
    again = Scripted(lambda number, asked: GOOD)
    assert causes(asyncio.run(ask_all(annotator(again, tmp_path), [request("0"), request("1")]))) == ["answered"] * 2
    assert not again.asked


def test_what_others_wait_for_goes_on_where_one_stops_waiting(tmp_path: Path) -> None:
    model = Scripted(lambda number, asked: GOOD, delay_s=0.2)
    asked = annotator(
        model, tmp_path, SETTINGS.model_copy(update={"limits": LIMITS.model_copy(update={"concurrency": 1})})
    )

    async def one_leaves() -> Any:
        first = asyncio.ensure_future(asked.answer(request("a")))
        queued = [asyncio.ensure_future(asked.answer(request("b"))) for _ in range(2)]
        await asyncio.sleep(0.05)
        queued[0].cancel()
        return [await first, await queued[1]]

    assert causes(asyncio.run(one_leaves())) == ["answered"] * 2
    assert len(model.asked) == 2


def test_a_response_too_long_for_the_model_is_shown_without_its_middle(tmp_path: Path) -> None:
    """The reply names segments 1 to 40, of which the middle was not shown: it is dropped."""
    reply = json.dumps({"spans": [{"start": 1, "end": 40, "type": "slip"}, {"start": 40, "end": 40, "type": "gap"}]})
    model = Scripted(lambda number, asked: reply)
    long = tuple(Segment(number, number, number + 1, "so " * 60) for number in range(1, 41))
    asked = annotator(model, tmp_path, SETTINGS.model_copy(update={"max_prompt_tokens": 1200}))
    answer = asyncio.run(asked.answer(AnnotationRequest(Prompt("p", "q", "4"), "error", long, TYPES, 0.25, 40)))
    assert [span.start for span in answer.reply.spans] == [40]
    assert answer.notes["hidden_spans"] == 1 and 0 < answer.notes["elided_segments"] < 40
    (notice,) = asked.notices()
    assert "not shown" in notice
