"""What a chat server's HTTP reply means: an answer, or why there is none and whether asking again can help.

Decides the cause of every failure and the words that users read. It must not know how replies are fetched or how often
a request is tried.

Invariants: whatever a server sends, the outcome is a `ChatAnswer` or a `ChatFault`; what a fault says is one short line
without the key, even where the server repeats it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import SecretStr

from trace_rl.annotators import Api
from trace_rl.errors import FailureCause
from trace_rl.workers.chat import ChatAnswer, ChatFault
from trace_rl.workers.log_redaction import redactor

_QUOTED_CHARS = 200
"""Of a server's words in a message of ours."""
_READ_CHARS = 4000
_RUN = 8
"""Characters of the key in a row that count as the key."""
_HIDDEN = "[key]"
_MASKED = re.compile(r"\S*\*{3,}\S*")
"""A key as servers show it, for example `sk-ab*****yz`."""
_TOO_LONG = re.compile(
    r"context[ _]?(length|window|size)|maximum (model|context)|max_model_len|prompt is too long|input is too long"
    r"|too many (input )?tokens",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class HttpReply:
    """A reply as it came."""

    status: int
    headers: Mapping[str, str] = field(repr=False)  # nor the body: a server may repeat the key in them
    """Names in lower case."""
    body: bytes = field(repr=False)
    defect: str = ""
    """What was wrong with the body while it was read, as a verb phrase."""


class ReplyReader:
    """Reads the replies of one server.

    Args:
        key: sent to it; empty where it asks for none.
    """

    def __init__(self, settings: Api, key: SecretStr) -> None:
        self._settings = settings
        self._key = key
        self._who = f"The annotator's server {settings.base_url} (model {settings.name})"

    def answer(self, reply: HttpReply) -> ChatAnswer:
        """The model's answer.

        Raises:
            ChatFault: there is none.
        """
        outcome = self._outcome(reply)
        if isinstance(outcome, ChatFault):
            raise outcome  # from here, where no variable holds what the server said
        return outcome

    def fault(self, what: str, cause: FailureCause, retry_after_s: float = 0.0, **told: bool) -> ChatFault:
        """A fault that names the server; `what` is a verb phrase that holds none of the server's words uncleaned.

        Args:
            told: as for `ChatFault`.
        """
        return ChatFault(f"{self._who} {what}", cause, retry_after_s, **told)

    def is_too_long(self, reply: HttpReply) -> bool:
        """Whether the server refuses the request because of its length."""
        return reply.status == 413 or (reply.status in (400, 422) and bool(_TOO_LONG.search(_text(reply.body))))

    def quote(self, reply: HttpReply) -> str:
        """The server's own words."""
        return self.clean(_text(reply.body)) or "no text"

    def clean(self, text: str) -> str:
        """One short printable line of foreign text, without the key, parts of it or masked forms, or other secrets."""
        line = " ".join("".join(char if char.isprintable() else " " for char in text[:_READ_CHARS]).split())
        line = _MASKED.sub(_HIDDEN, _redacted(line, self._key.get_secret_value()))
        line = redactor().redact(line)  # a refusal by a proxy names the proxy with its password
        return line if len(line) <= _QUOTED_CHARS else line[: _QUOTED_CHARS - 3] + "..."

    def _outcome(self, reply: HttpReply) -> ChatAnswer | ChatFault:
        if reply.status != 200:
            return self._status_fault(reply)
        if reply.defect:
            return self.fault(f"sent a body that {reply.defect}", "server_error", is_billed=True)
        document = _parsed(reply.body)
        choices = document.get("choices") if isinstance(document, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict) or not isinstance(content, str | None):
            return self.fault(f"sent no chat completion: {self.quote(reply)}", "server_error", is_billed=True)
        if message.get("refusal") or choice.get("finish_reason") == "content_filter":
            why = self.clean(str(message.get("refusal") or "content filter"))
            return self.fault(f"refuses to answer ({why})", "refused", is_final=True, is_billed=True)
        return self._counted(self._without_key(content or ""), document)

    def _status_fault(self, reply: HttpReply) -> ChatFault:
        status, settings = reply.status, self._settings
        answered = f"answers HTTP {status}: {self.quote(reply)}"
        if status == 429:
            return self.fault(answered, "rate_limited", retry_after_s(reply.headers))
        if status in (408, 409) or status >= 500 or status < 300:
            return self.fault(answered, "server_error", retry_after_s(reply.headers))
        if self.is_too_long(reply):
            advice = "lower annotator.backend.max_prompt_tokens or max_reply_tokens"
            return self.fault(f"{answered}; {advice}", "too_long", is_final=True)
        if status in (401, 403):
            advice = (
                f"check the key in the environment variable {settings.api_key_env}"
                if settings.api_key_env
                else "name the environment variable that holds a key in annotator.backend.api_key_env"
            )
        elif status < 400:
            advice = "give the address that it redirects to as annotator.backend.base_url"
        else:
            advice = "check base_url, name and extra_body in annotator.backend"
        return self.fault(f"{answered}; {advice}", "refused", is_final=True)

    def _counted(self, text: str, document: dict[str, Any]) -> ChatAnswer:
        usage = document.get("usage")
        counts = [_count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
        notes = {"usage_missing": 1.0} if None in counts else {}
        return ChatAnswer(text, counts[0] or 0, counts[1] or 0, notes)

    def _without_key(self, text: str) -> str:
        """An answer is stored and may be printed; only the whole key is taken out of it."""
        key = self._key.get_secret_value()
        return text.replace(key, _HIDDEN) if len(key) >= _RUN else text


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to be left alone, as `Retry-After-Ms` or `Retry-After` (seconds or a date) say.

    A date is measured from the reply's own `Date`, where there is one, so that clocks need not agree.
    """
    milliseconds, after = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    for text, unit_s in ((milliseconds, 1e-3), (after, 1.0)):
        try:
            seconds = float(text) * unit_s
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    at = _date(after)
    return max(0.0, (at - (_date(headers.get("date", "")) or datetime.now(UTC))).total_seconds()) if at else 0.0


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _text(body: bytes) -> str:
    """What an error's body says, in any of the forms that servers use; the body itself where it is in none."""
    document = _parsed(body)
    found = document.get("error", document) if isinstance(document, dict) else document
    if isinstance(found, dict):
        found = found.get("message") or found.get("detail") or found
    if isinstance(found, str):
        return found
    return body.decode("utf-8", "replace") if found is None else json.dumps(found, ensure_ascii=False)


def _count(usage: Any, name: str) -> int | None:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count >= 0 and not isinstance(count, bool) else None


def _redacted(text: str, key: str) -> str:
    """`text` without any run of at least 8 characters of the key, or of the whole of a shorter one."""
    run = min(_RUN, len(key))
    kept, at = [], 0
    while at < len(text):
        end = at + run
        if not run or len(text) < end or text[at:end] not in key:
            kept.append(text[at])
            at += 1
            continue
        while end < len(text) and text[at : end + 1] in key:
            end += 1
        kept.append(_HIDDEN)
        at = end
    return "".join(kept)
