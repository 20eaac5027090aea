"""The HTTP client against a server on loopback: what is sent, what servers make of it, deadlines, and the key."""

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Reply, refused, said
from pydantic import SecretStr

from trace_rl.annotation_prompts import Message
from trace_rl.annotators import Api
from trace_rl.errors import ConfigError
from trace_rl.workers.api_annotator import ApiChat
from trace_rl.workers.chat import ChatAnswer, ChatFault, ChatRequest

KEY = "sk-proj-4fT9xQz7LmN2vB8w"
SCHEMA = {"type": "object", "properties": {"spans": {"type": "array"}}}
REQUEST = ChatRequest((Message("system", "Mark."), Message("user", "1: 2 + 2 = 5 \ud83d 数")), SCHEMA, 64, 0.5)
ANSWER = ChatAnswer('{"spans": []}', 40, 10)
NO_SCHEMA = refused(400, "response_format of type json_schema is not supported")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def chat(url: str, key: str = KEY, **settings: Any) -> ApiChat:
    return ApiChat(Api(base_url=url, name="m", **settings), SecretStr(key))


async def outcomes(client: ApiChat, requests: Sequence[ChatRequest], timeout_s: float = 5.0) -> list[Any]:
    """Answers or faults of requests that are all asked at once."""
    asked = (client.ask(request, timeout_s) for request in requests)
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(outcome, ChatAnswer | ChatFault) for outcome in found), found
    return found


async def at_once(client: ApiChat, count: int) -> list[Any]:
    found = await outcomes(client, [REQUEST] * count)
    await client.close()
    return found


def ask(client: ApiChat, *timeouts_s: float) -> list[Any]:
    """Outcomes of one request after the other, on one event loop."""

    async def in_turn() -> list[Any]:
        found = [(await outcomes(client, [REQUEST], timeout_s))[0] for timeout_s in timeouts_s or (5.0,)]
        await client.close()
        return found

    return asyncio.run(in_turn())


def taking(forms: Sequence[str]) -> Any:
    """A server that takes only some forms of `response_format` and refuses the others by HTTP 400."""

    def answer(body: dict[str, Any]) -> Reply:
        form = body.get("response_format", {"type": "none"})["type"]
        return said('{"spans": []}') if form in forms else NO_SCHEMA

    return answer


def test_what_is_sent() -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "seed": 1}
    with ChatServer(lambda body: said('{"spans": []}')) as server:
        assert ask(chat(server.base_url, extra_body=extra)) == [ANSWER]
        (record,) = server.records
    assert record.headers["Authorization"] == f"Bearer {KEY}"
    assert record.headers["Content-Type"] == "application/json"
    assert record.body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Mark."},
            {"role": "user", "content": "1: 2 + 2 = 5 \ud83d 数"},
        ],
        "max_tokens": 64,
        "temperature": 0.5,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "annotation", "schema": SCHEMA, "strict": True},
        },
        **extra,
    }


@pytest.mark.parametrize(("structured_output", "sent"), [("none", None), ("json_object", {"type": "json_object"})])
def test_other_ways_to_tell_the_form(structured_output: str, sent: Any) -> None:
    with ChatServer(lambda body: said('{"spans": []}')) as server:
        assert ask(chat(server.base_url, key="", structured_output=structured_output)) == [ANSWER]
        assert server.records[0].body.get("response_format") == sent
        assert "Authorization" not in server.records[0].headers


def test_a_server_without_schemas_is_found_out_once(caplog: pytest.LogCaptureFixture) -> None:
    with ChatServer(taking(["none"])) as server:
        first, *others = ask(chat(server.base_url), 5, 5, 5)
        assert first == ChatAnswer('{"spans": []}', 40, 10, {"extra_requests": 1.0})
        assert others == [ANSWER, ANSWER]
        assert ["response_format" in record.body for record in server.records] == [True, False, False, False]
    assert [record.getMessage() for record in caplog.records if "JSON schema" in record.getMessage()] == [
        f"{server.base_url} takes no JSON schema (response_format of type json_schema is not supported); it is told "
        "the form of its answers by the prompt alone"
    ]


def test_many_requests_that_find_it_out_together_are_all_answered(caplog: pytest.LogCaptureFixture) -> None:
    """Refusals come at different times, some when another request has been answered without the schema already."""
    arrivals = iter(range(1000))

    def answer(body: dict[str, Any]) -> Reply:
        refusal = refused(422, "no schemas")
        delay_s = 0.02 * (next(arrivals) % 10)
        return Reply(refusal.body, 422, delay_s=delay_s) if "response_format" in body else said('{"spans": []}')

    with ChatServer(answer) as server:
        found = asyncio.run(at_once(chat(server.base_url), 30))
        assert [answer.text for answer in found] == ['{"spans": []}'] * 30
        assert sum(answer.notes.get("extra_requests", 0) for answer in found) == len(server.records) - 30
    assert caplog.text.count("JSON schema") == 1


def test_a_server_that_takes_schemas_keeps_them_after_a_refusal() -> None:
    """Once a schema was answered, HTTP 400 is about the request."""
    replies = iter([said('{"spans": []}'), NO_SCHEMA, said('{"spans": []}')])
    with ChatServer(lambda body: next(replies)) as server:
        _, fault, answer = ask(chat(server.base_url), 5, 5, 5)
        assert (fault.cause, fault.is_final) == ("refused", True) and answer == ANSWER
        assert all("response_format" in record.body for record in server.records)


def test_a_request_that_is_refused_in_every_form_teaches_nothing() -> None:
    """What was sent in vain is reported with the next answer: one for the refused request, one for the second."""
    replies = iter([NO_SCHEMA, refused(400, "bad request"), NO_SCHEMA, said("{}")])
    with ChatServer(lambda body: next(replies)) as server:
        fault, answer = ask(chat(server.base_url), 5, 5)
        assert fault.cause == "refused" and "bad request" in str(fault)
        assert answer == ChatAnswer("{}", 40, 10, {"extra_requests": 2.0})
        assert ["response_format" in record.body for record in server.records] == [True, False, True, False]


def test_a_schema_that_is_asked_for_is_never_left_out() -> None:
    with ChatServer(taking(["none", "json_object"])) as server:
        (fault,) = ask(chat(server.base_url, structured_output="json_schema"))
        assert (fault.cause, fault.is_final) == ("refused", True) and len(server.records) == 1


def test_the_name_of_the_token_limit_follows_the_server() -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if "max_tokens" in body:
            return refused(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return taking(["none"])(body)

    with ChatServer(answer) as server:
        first, second = ask(chat(server.base_url), 5, 5)
        assert first.notes == {"extra_requests": 2.0} and second == ANSWER
        assert server.records[-1].body["max_completion_tokens"] == 64 and "max_tokens" not in server.records[-1].body


def test_a_prompt_that_is_too_long_is_sent_once() -> None:
    words = "'max_tokens' or 'max_completion_tokens' is too large: 64. This model's maximum context length is 32 tokens"
    with ChatServer(lambda body: refused(400, words)) as server:
        (fault,) = ask(chat(server.base_url))
        assert (fault.cause, fault.is_final, len(server.records)) == ("too_long", True, 1)


def test_a_server_that_asks_for_patience_is_heard() -> None:
    with ChatServer(lambda body: refused(429, "slow down", Retry_After="3")) as server:
        (fault,) = ask(chat(server.base_url))
        assert (fault.cause, fault.retry_after_s, fault.is_final) == ("rate_limited", 3.0, False)


def test_errors_that_break_off_keep_their_status() -> None:
    with ChatServer(lambda body: Reply(b"too many" * 9, 429, {"Retry-After": "3"}, breaks="truncated")) as server:
        (fault,) = ask(chat(server.base_url))
        assert (fault.cause, fault.retry_after_s) == ("rate_limited", 3.0)


WHOLE = said('{"spans": []}').body


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (Reply(WHOLE, breaks="reset"), "unreachable"),
        (Reply(WHOLE, breaks="truncated"), "server_error"),
        (Reply(WHOLE, breaks="raw"), "unreachable"),
        (Reply(b"", breaks="raw"), "unreachable"),
        (Reply(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", breaks="raw"), "unreachable"),
        (Reply(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", breaks="raw"), "unreachable"),
        (Reply(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", breaks="raw"), "unreachable"),
        (
            Reply(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd", breaks="raw"),
            "server_error",
        ),
        (Reply(b" " * (4 * 2**20) + WHOLE), "server_error"),
        (Reply(WHOLE[:-9]), "server_error"),
        (Reply(WHOLE, delay_s=9), "timeout"),
        (Reply(WHOLE, breaks="stalled"), "timeout"),
    ],
)
def test_every_misfortune_has_a_cause_and_the_next_request_is_answered(reply: Reply, cause: str) -> None:
    replies = iter([reply, said('{"spans": []}')])
    with ChatServer(lambda body: next(replies)) as server:
        started = time.monotonic()
        fault, answer = ask(chat(server.base_url), 0.4 if cause == "timeout" else 5.0, 5.0)
        assert time.monotonic() - started < 1.5
        assert (fault.cause, fault.is_final, fault.retry_after_s) == (cause, False, 0.0)
        assert answer == ANSWER


def test_a_body_that_never_stops_trickling_meets_the_deadline() -> None:
    """Every read is short, the whole is not: one byte each 50 ms."""

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        try:
            while True:
                writer.write(b" ")
                await asyncio.sleep(0.05)
        finally:
            writer.close()

    async def main() -> ChatFault:
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        client = chat(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        started = time.monotonic()
        (fault,) = await outcomes(client, [REQUEST], 0.3)
        assert 0.3 <= time.monotonic() - started < 0.6
        await client.close()
        server.close()
        return fault

    assert asyncio.run(main()).cause == "timeout"


def test_a_port_without_a_server_is_unreachable() -> None:
    with socket.socket() as taken:  # bound, not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        (fault,) = ask(chat(url))
    assert fault.cause == "unreachable" and url in str(fault)


def test_redirects_are_not_followed() -> None:
    with ChatServer(lambda body: said("{}")) as other:
        moved = Reply(b"moved", 307, {"Location": f"{other.base_url}/chat/completions"})
        with ChatServer(lambda body: moved) as server:
            (fault,) = ask(chat(server.base_url))
        assert (fault.cause, fault.is_final) == ("refused", True) and not other.records


def test_cookies_are_not_kept() -> None:
    with ChatServer(lambda body: Reply(WHOLE, headers={"Set-Cookie": "session=1; Path=/"})) as server:
        ask(chat(server.base_url.replace("127.0.0.1", "localhost")), 5, 5)
        assert len(server.records) == 2 and not any("Cookie" in record.headers for record in server.records)


def test_connections_are_kept() -> None:
    """As many as are used at once: how many that are, others decide."""

    async def main(client: ApiChat) -> None:
        for _ in range(15):
            await outcomes(client, [REQUEST] * 4)
        await client.close()

    with ChatServer(lambda body: said("{}", delay_s=0.02)) as server:
        asyncio.run(main(chat(server.base_url)))
        assert len(server.records) == 60 and len({record.port for record in server.records}) == 4


def test_the_identity_is_the_model_and_what_changes_its_answers() -> None:
    plain, other_server = chat("http://a/v1"), chat("http://b/v1", key="another")
    assert plain.identity == other_server.identity == "api:m"
    thinking = [chat("http://a/v1", extra_body={"a": value, "b": 1}).identity for value in (True, False, True)]
    assert thinking[0] == thinking[2] == chat("http://a/v1", extra_body={"b": 1, "a": True}).identity
    assert len({plain.identity, *thinking}) == 3 and all(name.startswith("api:m:") for name in thinking)


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake proxy answers by itself; the address of the server does not exist. An entry in ~/.netrc is not read."""

    async def main() -> tuple[Any, str]:
        lines: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            lines.append(await reader.readline())
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(WHOLE) + WHOLE)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        client = chat("http://nowhere.invalid/v1")
        (found,) = await outcomes(client, [REQUEST])
        await client.close()
        server.close()
        return found, lines[0].decode()

    found, line = asyncio.run(main())
    assert found == ANSWER and line.startswith("POST http://nowhere.invalid/v1/chat/completions ")
    with ChatServer(lambda body: said('{"spans": []}')) as server:
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert ask(chat(server.base_url)) == [ANSWER]
    monkeypatch.setenv("https_proxy", "socks5://user:secret@127.0.0.1:1")
    with pytest.raises(ConfigError, match="no HTTP proxy") as caught:
        chat("https://nowhere.invalid/v1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://nowhere.invalid/v1", "https://nowhere.invalid/v1"])
def test_the_password_of_a_proxy_is_in_no_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a proxy that refuses every request with what it was sent, and by one that is not there."""
    password = "swordfish-1"

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: %d\r\n\r\n" % len(sent) + sent)
        writer.close()

    async def main() -> list[str]:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        told = []
        for port in (server.sockets[0].getsockname()[1], 9):
            monkeypatch.setenv(f"{url.partition(':')[0]}_proxy", f"http://user:{password}@127.0.0.1:{port}")
            client = chat(url)
            told += [repr(fault) for fault in await outcomes(client, [REQUEST])]
            await client.close()
        server.close()
        return told

    told = asyncio.run(main())
    assert "407" in told[0] and "cannot be reached" in told[1], told
    secrets = (password, "user:", base64.b64encode(f"user:{password}".encode()).decode())
    assert not [text for text in told if any(secret in text for secret in secrets)]


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}", "schlüssel-xyz", "two\r\nX-Header: 1"])
def test_a_key_that_fits_no_header_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="ANNOTATOR_API_KEY") as caught:
        chat("http://a/v1", key=key, api_key_env="ANNOTATOR_API_KEY")
    assert key.strip() not in str(caught.value)


CHILD = """
import asyncio, logging, os, pickle, sys, traceback
logging.basicConfig(level=logging.DEBUG)
from pydantic import SecretStr
from trace_rl.annotation_prompts import Message
from trace_rl.annotators import Api
from trace_rl.workers.api_annotator import ApiChat
from trace_rl.workers.chat import ChatRequest

async def main():
    settings = Api(base_url=sys.argv[1], name="m", api_key_env="ANNOTATOR_API_KEY")
    client = ApiChat(settings, SecretStr(os.environ["ANNOTATOR_API_KEY"]))
    request = ChatRequest((Message("user", "1: x"),), {"type": "object"}, 64, 0.0)
    for number in range(int(sys.argv[2])):
        try:
            print(await client.ask(request, 0.5))
        except Exception as error:
            traceback.print_exc()
            print(*traceback.TracebackException.from_exception(error, capture_locals=True).format())
            print(repr(error), error.__context__, pickle.dumps(error))
    print(settings, repr(client), vars(client), settings.model_dump_json())
    unfinished = asyncio.create_task(client.ask(request, 60), name="unfinished")
    await asyncio.sleep(0.2)
    print(unfinished, *(repr(frame.f_locals) for frame in unfinished.get_stack()))
    raise RuntimeError("left without closing anything")

asyncio.run(main())
"""


def test_the_key_is_in_nothing_that_the_program_says(tmp_path: Path) -> None:
    """A process at log level DEBUG, in asyncio's debug mode, prints all it can about servers that repeat its key."""
    bearer = f"Bearer {KEY}"
    echoed = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY} {KEY[:9]}**** ({bearer})"}}).encode()
    headers = {"X-Echo": bearer, "Set-Cookie": f'k="{KEY}; Bad Cookie {KEY}', "WWW-Authenticate": bearer}
    raw = f"HTTP/1.1 200 {KEY}\r\n{KEY}\r\n: {KEY}\r\n\r\n".encode()
    misfortunes = [
        *(Reply(echoed, status, headers) for status in (400, 400, 401, 403, 404, 422, 422, 429, 500, 503)),
        Reply(b"moved", 302, {"Location": f"http://127.0.0.1:1/{KEY}", **headers}),
        Reply(echoed, 200, headers),
        Reply(bearer.encode(), 200, {"Content-Encoding": "gzip", **headers}),
        Reply(echoed, 401, headers, breaks="truncated"),
        Reply(echoed, 200, headers, breaks="stalled"),
        Reply(echoed, 200, headers, breaks="reset"),
        Reply(raw, breaks="raw"),
        Reply(KEY.encode(), breaks="raw"),
        Reply(WHOLE, delay_s=2),
        said(f"my key is {KEY}"),
    ]
    replies = iter([*misfortunes, Reply(b"", delay_s=30)])
    with ChatServer(lambda body: next(replies)) as server:
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        child = subprocess.run(
            [
                sys.executable,
                "-X",
                "dev",
                "-c",
                CHILD,
                server.base_url,
                str(len(misfortunes) - 2),
            ],  # two 400s, two 422s: one ask each
            env={**environment, "ANNOTATOR_API_KEY": KEY},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert [record.headers["Authorization"] for record in server.records] == [bearer] * (len(misfortunes) + 1)
    said_all = child.stdout + child.stderr
    assert child.stdout.count("ChatFault") > 30 and "my key is [key]" in child.stdout, said_all
    assert "left without closing" in child.stderr and "DEBUG:" in child.stderr, child.stderr
    leaks = {KEY[at : at + 8] for at in range(len(KEY) - 7) if KEY[at : at + 8] in said_all}
    assert not leaks, [line for line in said_all.splitlines() if any(leak in line for leak in leaks)]
