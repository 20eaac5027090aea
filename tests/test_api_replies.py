"""What a server's reply means: any status and body is an answer or a fault with a cause, and no message holds keys."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from trace_rl.annotators import Api
from trace_rl.workers.api_replies import HttpReply, ReplyReader, retry_after_s
from trace_rl.workers.chat import ChatAnswer, ChatFault

KEY = "sk-proj-4fT9xQz7LmN2vB8w"
SETTINGS = Api(base_url="http://127.0.0.1:1/v1", name="m", api_key_env="ANNOTATOR_API_KEY")
READER = ReplyReader(SETTINGS, SecretStr(KEY))
USAGE = {"prompt_tokens": 40, "completion_tokens": 10}


def completion(message: Any, finish_reason: str = "stop", **fields: Any) -> HttpReply:
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return HttpReply(200, {}, json.dumps({"choices": choices, "usage": USAGE} | fields).encode())


def fault_of(reply: HttpReply, reader: ReplyReader = READER) -> ChatFault:
    with pytest.raises(ChatFault) as caught:
        reader.answer(reply)
    return caught.value


def error(status: int, message: str, **headers: str) -> HttpReply:
    return HttpReply(status, headers, json.dumps({"error": {"message": message}}).encode())


def test_an_answer_is_its_content_and_what_was_counted() -> None:
    reply = completion({"content": '{"spans": []}', "reasoning_content": "long thoughts", "tool_calls": None})
    assert READER.answer(reply) == ChatAnswer('{"spans": []}', 40, 10)


@pytest.mark.parametrize("content", [None, ""])
def test_an_answer_may_be_empty(content: str | None) -> None:
    assert READER.answer(completion({"content": content}, "length")) == ChatAnswer("", 40, 10)


@pytest.mark.parametrize(
    "usage", [None, {}, {"prompt_tokens": "40"}, [1], {"prompt_tokens": -1, "completion_tokens": 1}]
)
def test_uncounted_tokens_are_noted(usage: Any) -> None:
    answer = READER.answer(completion({"content": "x"}, usage=usage))
    assert answer.prompt_tokens == 0 and answer.notes == {"usage_missing": 1.0}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"choices": [{"mess',
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b'{"error": {"message": "upstream is down", "code": 502}}',
    ],
)
def test_what_is_no_chat_completion_can_be_asked_again(body: bytes) -> None:
    fault = fault_of(HttpReply(200, {}, body))
    assert fault.cause == "server_error" and not fault.is_final
    assert "sent no chat completion" in str(fault)


def test_a_body_that_broke_off_can_be_asked_again() -> None:
    fault = fault_of(HttpReply(200, {}, completion({"content": "x"}).body, "breaks off"))
    assert (fault.cause, fault.is_final) == ("server_error", False)


@pytest.mark.parametrize(
    "reply",
    [completion({"content": None, "refusal": "I would rather not."}), completion({"content": "{"}, "content_filter")],
)
def test_a_model_that_refuses_is_not_asked_again(reply: HttpReply) -> None:
    fault = fault_of(reply)
    assert (fault.cause, fault.is_final) == ("refused", True)


@pytest.mark.parametrize(
    ("status", "cause", "is_final"),
    [
        (204, "server_error", False),
        (301, "refused", True),
        (400, "refused", True),
        (401, "refused", True),
        (404, "refused", True),
        (408, "server_error", False),
        (409, "server_error", False),
        (413, "too_long", True),
        (422, "refused", True),
        (429, "rate_limited", False),
        (500, "server_error", False),
        (503, "server_error", False),
        (529, "server_error", False),
    ],
)
def test_the_status_decides_the_cause(status: int, cause: str, is_final: bool) -> None:
    fault = fault_of(error(status, "something  is\nwrong", **{"retry-after": "7"}))
    assert (fault.cause, fault.is_final) == (cause, is_final)
    assert fault.retry_after_s == (0 if is_final else 7)
    assert f"HTTP {status}: something is wrong" in str(fault)


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 512 tokens. However, you requested 700 tokens",
        "The decoder prompt (length 9000) is longer than the maximum model length of 8192.",
        "the request exceeds the available context size",
        "prompt is too long: 210000 tokens > 200000 maximum",
        "'max_tokens' or 'max_completion_tokens' is too large: 600. This model's maximum context length is 512 tokens",
    ],
)
def test_prompts_that_do_not_fit_are_told_from_other_refusals(message: str) -> None:
    fault = fault_of(error(400, message))
    assert (fault.cause, fault.is_final) == ("too_long", True)
    assert "max_prompt_tokens" in str(fault)


def test_a_refused_key_names_its_variable() -> None:
    assert "environment variable ANNOTATOR_API_KEY" in str(fault_of(error(401, "no")))
    without = ReplyReader(SETTINGS.model_copy(update={"api_key_env": ""}), SecretStr(""))
    assert "annotator.backend.api_key_env" in str(fault_of(error(403, "no"), without))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error": "plain"}', "plain"),
        (b'{"message": "older vLLM"}', "older vLLM"),
        (b'{"detail": [{"loc": ["body"], "msg": "missing"}]}', '[{"loc": ["body"], "msg": "missing"}]'),
        (b"<html>Bad\r\n\x1b[31m  gateway</html>", "<html>Bad [31m gateway</html>"),
        (b"", "no text"),
        (b"x" * 1000, "x" * 197 + "..."),
    ],
)
def test_servers_are_quoted_in_one_short_line(body: bytes, words: str) -> None:
    assert READER.quote(HttpReply(500, {}, body)) == words


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "2"}, 2),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "inf"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "?", "retry-after": "9"}, 9),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 -0000", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30),
        ({"retry-after": "Wed, 21 Oct 2015 07:27:00 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "Wed, 99 Oct 99999 07:28:00 GMT"}, 0),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float) -> None:
    assert retry_after_s(headers) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("words", "cleaned"),
    [
        (f"Incorrect API key provided: {KEY}.", "Incorrect API key provided: [key]."),
        (f"key {KEY[:8]} and {KEY[-8:]}!", "key [key] and [key]!"),
        (f"got {KEY[3:20]}", "got [key]"),
        ("key sk-p****************8w", "key [key]"),
        (f"Bearer\t{KEY}\n{KEY}", "Bearer [key] [key]"),
        (f"only {KEY[:7]}", f"only {KEY[:7]}"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_the_key_is_taken_out_of_what_servers_say(words: str, cleaned: str) -> None:
    assert READER.clean(words) == cleaned


def test_a_key_at_the_end_of_the_quoted_part_is_taken_out_before_the_cut() -> None:
    assert READER.clean("x" * 180 + f" {KEY} and so on for long") == "x" * 180 + " [key] and so on ..."


def test_a_short_key_is_taken_out_of_errors_but_not_out_of_answers() -> None:
    reader = ReplyReader(SETTINGS, SecretStr("EMPTY"))
    assert reader.clean("EMPTY is no key") == "[key] is no key"
    assert reader.answer(completion({"content": "EMPTY set"})).text == "EMPTY set"
    assert READER.answer(completion({"content": f"my key is {KEY}"})).text == "my key is [key]"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(KEY),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "error", "detail", "usage", "refusal", "finish_reason", KEY]
            ),
            children,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(st.sampled_from([200, 200, 200, 302, 400, 401, 413, 429, 500]), JSON | st.binary(max_size=40))
def test_whatever_comes_is_an_answer_or_a_fault_without_the_key(status: int, body: Any) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        answer = READER.answer(HttpReply(status, {}, raw))
    except ChatFault as fault:
        assert KEY not in str(fault) and "\n" not in str(fault) and len(str(fault)) < 450
    else:
        assert status == 200 and KEY not in answer.text
