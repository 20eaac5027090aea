"""A chat server on loopback that answers as it is told, and fails as it is told; also as a proxy before a real one.

What a request gets is decided in this order: a fault of the plan, else the upstream's reply, else the function's.
Every request is recorded, whatever becomes of it. It runs on a thread of its own and holds hundreds of open connections
at a fraction of a millisecond of CPU time each.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, get_args

import aiohttp
from aiohttp import web

Fault = Literal["rate_limited", "server_error", "reset", "stall", "truncated", "invalid"]
"""429 with Retry-After 1; 500; a TCP reset before any byte; the same after a silence of `stall_s`; half of the promised
body; a body that is no JSON."""
Break = Literal["", "reset", "truncated", "stalled", "raw"]
"""A TCP reset before any byte; half of the body, then the end; half of the body, then silence; the body without any
HTTP around it, then the end."""
ROUTE = "/v1/chat/completions"


@dataclass(frozen=True)
class Reply:
    """What a request is answered."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    delay_s: float = 0.0
    breaks: Break = ""


@dataclass
class Record:
    """What came, and what became of it."""

    body: dict[str, Any]
    sha: str
    headers: Mapping[str, str]
    port: int
    """The client's end of the connection."""
    arrived_s: float
    """On the monotonic clock of this machine, as `answered_s`."""
    fault: Fault | None = None
    """By the plan."""
    status: int = 0
    """0: no status line was sent."""
    is_complete: bool = False
    """Whether the whole response was handed to a connection that was still open."""
    answered_s: float = 0.0


@dataclass(frozen=True)
class FaultPlan:
    """Which requests fail, and how: decided by the body and how often it has come, not by the order of arrival."""

    seed: int
    share: float = 0.3
    kinds: tuple[Fault, ...] = get_args(Fault)
    stall_s: float = 10.0

    def fault(self, sha: str, attempt: int) -> Fault | None:
        draw = random.Random(f"{self.seed} {sha} {attempt}")
        return draw.choice(self.kinds) if draw.random() < self.share else None


def said(text: str | None, finish_reason: str = "stop", delay_s: float = 0.0, **message: Any) -> Reply:
    """A chat completion of 40 prompt tokens and 10 completion tokens."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 40, "completion_tokens": 10, "total_tokens": 50}
    return Reply(
        json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode(), 200, delay_s=delay_s
    )


def refused(status: int, message: str, **headers: str) -> Reply:
    """An error in the form of the OpenAI API; in header names _ stands for -."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"error": {"message": message, "type": "invalid_request_error", "code": None}}
    return Reply(json.dumps(body).encode(), status, {"Content-Type": "application/json", **names})


class ChatServer:
    """`with ChatServer(answer) as server:` serves `server.base_url` until the block ends.

    Args:
        answer: reply to a request's body, on the server's thread; must not block.
        plan: faults that come before everything else.
        upstream: `http://HOST:PORT/v1` of a real server, which then answers instead of `answer`, byte for byte.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Reply] | None = None,
        plan: FaultPlan | None = None,
        upstream: str = "",
    ) -> None:
        if (answer is None) == (upstream == ""):
            raise ValueError("give either a function that answers or an upstream")
        self._answer = answer
        self._plan = plan
        self._upstream = upstream
        self._arrivals: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat-server", daemon=True)
        self.records: list[Record] = []
        """In order of arrival; appended to while the server runs."""
        self.base_url = ""

    def __enter__(self) -> ChatServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            auto_decompress=False, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        server = web.Server(self._handle, access_log=None, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        port = self._runner.addresses[0][1]
        self.base_url = f"http://127.0.0.1:{port}/v1"

    async def _stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != ROUTE:
            return web.json_response({"error": {"message": f"no route {request.path}"}}, status=404)
        raw = await request.read()
        sha = hashlib.sha256(raw).hexdigest()
        port = request.transport.get_extra_info("peername")[1] if request.transport else 0
        record = Record(json.loads(raw), sha, dict(request.headers), port, time.monotonic())
        self.records.append(record)
        self._arrivals[sha] += 1
        record.fault = self._plan.fault(sha, self._arrivals[sha]) if self._plan else None
        reply = self._faulted(record.fault) if record.fault else await self._reply(raw, record)
        return await self._send(request, record, reply)

    async def _reply(self, raw: bytes, record: Record) -> Reply:
        if self._answer is not None:
            return self._answer(record.body)
        headers = {name: record.headers[name] for name in ("Authorization", "Content-Type") if name in record.headers}
        url = self._upstream + ROUTE.removeprefix("/v1")
        try:
            async with self._session.post(url, data=raw, headers=headers) as response:
                kept = {
                    name: response.headers[name] for name in ("Content-Type", "Retry-After") if name in response.headers
                }
                return Reply(await response.read(), response.status, kept)
        except aiohttp.ClientError as error:
            return refused(502, f"no reply from upstream: {error}")

    def _faulted(self, fault: Fault) -> Reply:
        assert self._plan is not None
        if fault == "rate_limited":
            return refused(429, "too many requests", Retry_After="1")
        if fault == "server_error":
            return refused(500, "internal error")
        if fault == "invalid":
            return Reply(b'{"choices": [{"message": {"content": "{\\"spans')
        if fault == "truncated":
            return replace(said('{"spans": []}'), breaks="truncated")
        return Reply(b"", delay_s=self._plan.stall_s if fault == "stall" else 0.0, breaks="reset")

    async def _send(self, request: web.BaseRequest, record: Record, reply: Reply) -> web.StreamResponse:
        if reply.delay_s:
            await asyncio.sleep(reply.delay_s)
        transport = request.transport
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        if transport is None or reply.breaks in ("reset", "raw"):
            _end(transport, reply)
            return response
        record.status = reply.status
        response.content_length = len(reply.body)
        await response.prepare(request)
        if reply.breaks:
            await response.write(reply.body[: len(reply.body) // 2])
            await asyncio.sleep(3600 if reply.breaks == "stalled" else 0)  # until the client goes, which cancels us
            transport.close()
            return response
        record.is_complete = not transport.is_closing()  # before the client can see it, and go away or look here
        record.answered_s = time.monotonic()
        await response.write(reply.body)
        await response.write_eof()
        return response


def _end(transport: asyncio.Transport | None, reply: Reply) -> None:
    """Close without a reply: by what is no HTTP, or so that the peer sees a reset instead of an orderly end."""
    if transport is None:
        return
    if reply.breaks == "raw":
        transport.write(reply.body)
        transport.close()
        return
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
