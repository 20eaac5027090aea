"""A language model behind an OpenAI-compatible server, asked over HTTP.

Decides what is sent, in the form that the server turns out to take, and by when a reply must be there. It must not know
what is asked, how often a request is tried, or what a reply means (`trace_rl.workers.api_replies`).

Invariants: one `ask` ends by its deadline, whatever the server does; the key is in the Authorization header and in no
exception, log record or repr: aiohttp's errors hold the request with its headers, so none of them leaves this module,
not even as the context of ours. Redirects are not followed, because the key would follow them.

aiohttp, because it takes a tenth of the CPU time of httpx or openai at 64 requests at once, and less than that at 256.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from pydantic import SecretStr

from trace_rl.annotators import Api
from trace_rl.errors import ConfigError
from trace_rl.workers.api_replies import HttpReply, ReplyReader
from trace_rl.workers.chat import ChatAnswer, ChatRequest
from trace_rl.workers.log_redaction import conceal

logger = logging.getLogger(__name__)

_MAX_BODY = 4 * 2**20
"""Bytes of a reply; the longest annotations take some thousand."""
_KEEP_ALIVE_S = 4.0
"""Below the 5 s after which uvicorn, and so vLLM, closes an idle connection."""


@dataclass(frozen=True)
class _Form:
    """What differs between servers."""

    structured_output: Literal["json_schema", "json_object", "none"]
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


class ApiChat:
    """Implements `trace_rl.workers.chat.ChatModel` over HTTP; belongs to one event loop.

    An answer's notes say `usage_missing` where the server has not counted tokens, which are then 0, and
    `extra_requests`: those that were sent since the last answer beyond one an `ask`, to find out which form the server
    takes.

    Args:
        key: empty where the server asks for none.

    Raises:
        ConfigError: the key cannot be sent in a header, or the environment names a proxy that is not spoken to.
    """

    def __init__(self, settings: Api, key: SecretStr) -> None:
        if not all("!" <= char <= "~" for char in key.get_secret_value()):
            raise ConfigError(
                f"The key in the environment variable {settings.api_key_env} holds blanks, line ends or characters "
                "outside of ASCII; set the variable to the bare key"
            )
        conceal(settings.api_key_env)
        self.identity = _identity(settings)
        self._settings = settings
        self._key = key
        self._url = f"{settings.base_url}/chat/completions"
        self._proxy = _proxy(settings.base_url)
        self._reader = ReplyReader(settings, key)
        wanted = settings.structured_output
        self._form = _Form("json_schema" if wanted == "auto" else wanted)
        self._is_form_open = wanted == "auto"
        self._num_extra_requests = 0
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, request: ChatRequest, timeout_s: float) -> ChatAnswer:
        """See `ChatModel.ask`; the deadline is that of everything, also of a body that comes slowly."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._converse(request)
        except TimeoutError:
            pass
        raise self._reader.fault(f"has not answered within {timeout_s:g} s", "timeout", is_billed=True)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _converse(self, request: ChatRequest) -> ChatAnswer:
        """Send the request, and again where the server refuses its form and takes another one."""
        form = self._form
        reply = await self._post(self._body(request, form))
        refusal = ""
        while (other := self._other_form(form, reply)) is not None:
            form, refusal = other, self._reader.quote(reply)
            self._num_extra_requests += 1
            reply = await self._post(self._body(request, form))
        answer = self._reader.answer(reply)
        self._settle(form, refusal)
        if not self._num_extra_requests:
            return answer
        notes = {**answer.notes, "extra_requests": float(self._num_extra_requests)}
        self._num_extra_requests = 0
        return replace(answer, notes=notes)

    def _other_form(self, form: _Form, reply: HttpReply) -> _Form | None:
        """The form to try after a refusal, if there is one that the refusal may be about."""
        if reply.status not in (400, 422) or self._reader.is_too_long(reply):
            return None
        if form.limit_field == "max_tokens" and b"max_completion_tokens" in reply.body:
            return replace(form, limit_field="max_completion_tokens")
        is_known_refused = self._form.structured_output == "none"  # an answer that came meanwhile has shown it
        if form.structured_output == "json_schema" and (self._is_form_open or is_known_refused):
            return replace(form, structured_output="none")
        return None

    def _settle(self, form: _Form, refusal: str) -> None:
        """Remember the form that was answered."""
        if form.structured_output != self._form.structured_output:
            logger.warning(
                "%s takes no JSON schema (%s); it is told the form of its answers by the prompt alone",
                self._settings.base_url,
                refusal,
            )
        self._form = form
        self._is_form_open = False

    def _body(self, request: ChatRequest, form: _Form) -> bytes:
        fields: dict[str, Any] = {
            **self._settings.extra_body,
            "model": self._settings.name,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "temperature": request.temperature,
            form.limit_field: request.max_tokens,
        }
        if form.structured_output == "json_schema":
            schema = {"name": "annotation", "schema": request.schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form.structured_output == "json_object":
            fields["response_format"] = {"type": "json_object"}
        return json.dumps(fields).encode()

    async def _post(self, body: bytes) -> HttpReply:
        """One HTTP request.

        Raises:
            ChatFault: there was no reply.
        """
        try:
            async with self._opened().post(self._url, data=body, allow_redirects=False) as response:
                content, defect = await _bounded(response.content)
                headers = {name.lower(): value for name, value in response.headers.items()}
                return HttpReply(response.status, headers, content, defect)
        except (aiohttp.ClientError, OSError) as error:
            reason = self._reader.clean(str(error)) or type(error).__name__
        raise self._reader.fault(f"cannot be reached: {reason}", "unreachable")

    def _opened(self) -> aiohttp.ClientSession:
        """The connections; made in the event loop that uses them."""
        if self._session is None:
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            if key := self._key.get_secret_value():
                headers["Authorization"] = f"Bearer {key}"
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),  # who asks has limits
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=None),  # `ask` has a deadline of its own
                cookie_jar=aiohttp.DummyCookieJar(),
                proxy=self._proxy,
            )
        return self._session


async def _bounded(stream: aiohttp.StreamReader) -> tuple[bytes, str]:
    """The body, or what came of it and what was wrong."""
    body = bytearray()
    try:
        async for chunk in stream.iter_any():
            body += chunk
            if len(body) > _MAX_BODY:
                return bytes(body), f"is longer than {_MAX_BODY // 2**20} MiB"
    except (aiohttp.ClientError, OSError):
        return bytes(body), "breaks off"
    return bytes(body), ""


def _identity(settings: Api) -> str:
    """The model's name, and a digest of the further fields, which may change its answers."""
    name = f"api:{settings.name}"
    if not settings.extra_body:
        return name
    return f"{name}:{hashlib.sha256(json.dumps(settings.extra_body, sort_keys=True).encode()).hexdigest()[:16]}"


def _proxy(base_url: str) -> str | None:
    """The proxy that the environment names for the server.

    aiohttp's own `trust_env` would also look for passwords in ~/.netrc, and refuse to send our key beside one.
    """
    parts = urlsplit(base_url)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.netloc):
        return None
    if urlsplit(proxy).scheme not in ("http", "https"):
        raise ConfigError(
            f"The environment variable {parts.scheme}_proxy names a proxy that is no HTTP proxy, but the annotator's "
            "server is reached through no other kind; add the server's host to no_proxy, or name an HTTP proxy"
        )
    return proxy
