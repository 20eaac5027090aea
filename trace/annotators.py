"""Who annotates: the kinds of annotators, each with its settings and what it becomes.

A kind is chosen by `annotator.backend` and turned into an `AnnotatorBackend` by `build`. Rules, controls and recordings
answer by themselves (`trace_rl.rule_annotators`); kinds that ask a language model say here whom they ask and within
which limits, and leave the asking to `Parts.ask`, which workers supply.

Invariants: every kind answers the same requests in the same protocol; an API key is named here, never held.

This module must not know how a model is reached, or what replies are used for.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator, model_validator

from trace_rl.annotation import AnnotatorBackend
from trace_rl.config.base import Kind, Section
from trace_rl.config.roles import GeneratorSettings
from trace_rl.protocols import ErrorRule
from trace_rl.rule_annotators import (
    AllTokenBackend,
    InvertedBackend,
    OracleBackend,
    RandomBackend,
    ReplayBackend,
    read_recording,
)

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_OWN_FIELDS = frozenset(
    {"model", "messages", "stream", "n", "response_format", "max_tokens", "max_completion_tokens", "temperature"}
)
_TEMPLATE_TOKENS = 32
_REPAIR_TOKENS = 640  # a bad answer of at most 400 characters, the remark on it, and the template


@dataclass(frozen=True)
class Parts:
    """What a run offers to its annotator."""

    rule: ErrorRule
    """The task's own, or the equation rule."""
    seed: int
    coverage_cap: float
    ask: Callable[[LanguageModel], AnnotatorBackend]
    """Makes an annotator of a language model."""


class Backend(Kind):
    """Who answers requests for annotations."""

    @abstractmethod
    def build(self, parts: Parts) -> AnnotatorBackend:
        """The annotator that these settings describe."""

    @property
    def model(self) -> LanguageModel | None:
        """The settings of the language model that is asked, by this annotator or the one it is a control for."""
        return None

    @property
    def recording(self) -> str:
        """Path of the file that is read; empty where none is."""
        return ""


class Oracle(Backend):
    """A rule instead of a model: the task's own where the data is a task, else the equation rule, which checks every
    written `a op b = c`."""

    type: Literal["oracle"] = "oracle"

    def build(self, parts: Parts) -> AnnotatorBackend:
        return OracleBackend(parts.rule)


class AllToken(Backend):
    """Marks the whole response (the all-token control of arXiv:2605.10194); needs annotator.coverage_cap = 1."""

    type: Literal["all_token"] = "all_token"

    def build(self, parts: Parts) -> AnnotatorBackend:
        return AllTokenBackend()


class _Control(Backend):
    """A control for another annotator, which is asked first."""

    of: Backend = Oracle()
    """The annotator whose coverage is matched, response by response, and whose types are named."""

    @property
    def model(self) -> LanguageModel | None:
        return self.of.model

    @property
    def recording(self) -> str:
        return self.of.recording


class Random(_Control):
    """Segments drawn at random, as many tokens as `of` marks, as near as whole segments come."""

    type: Literal["random"] = "random"

    def build(self, parts: Parts) -> AnnotatorBackend:
        return RandomBackend(self.of.build(parts), parts.seed, parts.coverage_cap)


class Inverted(_Control):
    """As random, but drawn from the segments that `of` leaves unmarked."""

    type: Literal["inverted"] = "inverted"

    def build(self, parts: Parts) -> AnnotatorBackend:
        return InvertedBackend(self.of.build(parts), parts.seed, parts.coverage_cap)


class Replay(Backend):
    """Answers out of a file that `trace-rl annotate` has written; a response that it lacks stays without spans."""

    type: Literal["replay"] = "replay"
    path: str
    """JSONL file of recorded replies."""

    @property
    def recording(self) -> str:
        return self.path

    def build(self, parts: Parts) -> AnnotatorBackend:
        return ReplayBackend(read_recording(Path(self.path).expanduser()))


class Limits(Section):
    """How hard a model is asked. A rollout that meets one of these limits goes on without spans."""

    concurrency: int = Field(64, ge=1)
    """Requests under way at once."""
    requests_per_minute: float = Field(0.0, ge=0)
    """Rate of the token bucket that requests pass; it holds one second's worth, at least one. 0: no limit."""
    request_timeout_s: float = Field(60.0, gt=0)
    """Deadline of one request."""
    max_attempts: int = Field(5, ge=1)
    """Tries of one request. Tried again are lost connections, late and unreadable answers, and the HTTP statuses 408,
    409, 429 and 5xx, after backoff_s, twice as long each time, times a random factor of 0.5 to 1, or after the server's
    Retry-After where that is longer."""
    backoff_s: float = Field(0.5, gt=0)
    """Wait before the second try."""
    backoff_max_s: float = Field(30.0, gt=0)
    """Longest wait between two tries that is of our own making."""
    breaker_failures: int = Field(20, ge=1)
    """Failed tries in a row after which nothing is sent for breaker_pause_s; then one request tries for all."""
    breaker_pause_s: float = Field(30.0, gt=0)


class Budget(Section):
    """What a run may spend, resumes included; 0: no limit. What it no longer covers is not asked; the run goes on."""

    requests: int = Field(0, ge=0)
    """Requests sent, failed and repeated ones included."""
    tokens: int = Field(0, ge=0)
    """Prompt and completion tokens, as the server counts them."""
    money: float = Field(0.0, ge=0)
    """In the currency of price_per_million_*."""
    price_per_million_prompt_tokens: float = Field(0.0, ge=0)
    price_per_million_completion_tokens: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _money_has_a_price(self) -> Budget:
        if self.money and not self.price_per_million_prompt_tokens + self.price_per_million_completion_tokens:
            raise ValueError(
                f"annotator.backend.budget.money is {self.money:g}, but no price is given; set "
                "price_per_million_prompt_tokens and price_per_million_completion_tokens beside it"
            )
        return self

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Money for so many tokens."""
        return (
            prompt_tokens * self.price_per_million_prompt_tokens
            + completion_tokens * self.price_per_million_completion_tokens
        ) / 1e6


class LanguageModel(Backend):
    """A language model that reads the request as a chat and answers in JSON."""

    temperature: float = Field(0.0, ge=0, le=2)
    max_prompt_tokens: int = Field(8192, ge=256)
    """Longer prompts are shown without the middle of the response; counted by the policy's tokenizer."""
    max_reply_tokens: int = Field(1024, ge=16)
    """Token budget of an answer."""
    max_spans: int = Field(8, ge=1)
    """Most spans that an answer may have; asked for, and a bound of the JSON schema."""
    repair: bool = True
    """Whether an answer outside of the protocol is sent back once to be corrected."""
    limits: Limits = Limits()
    budget: Budget = Budget()

    @property
    def context_tokens(self) -> int:
        """Longest chat with its answer, with room for what a chat template adds, and for an answer sent back."""
        return self.max_prompt_tokens + self.max_reply_tokens + (_REPAIR_TOKENS if self.repair else _TEMPLATE_TOKENS)

    @property
    def model(self) -> LanguageModel | None:
        return self

    def build(self, parts: Parts) -> AnnotatorBackend:
        return parts.ask(self)


class Api(LanguageModel):
    """Any server with an OpenAI-compatible chat endpoint."""

    type: Literal["api"] = "api"
    base_url: str
    """For example `http://127.0.0.1:8000/v1`; requests go to `{base_url}/chat/completions`."""
    name: str
    """The model, as the server names it."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty: the server asks for none."""
    structured_output: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How the server is told the form of its answer; `auto`: by schema, or, once the server has refused that, by the
    prompt alone."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, for example {chat_template_kwargs: {enable_thinking: false}}."""

    @field_validator("base_url")
    @classmethod
    def _url_holds_no_secret(cls, url: str) -> str:
        parts = _split(url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                "annotator.backend.base_url is not of the form http://HOST/v1 or https://HOST/v1; correct it"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "annotator.backend.base_url holds a user, a query or a fragment, which is written to the run folder; "
                "give the bare address, and the key in the environment variable that api_key_env names"
            )
        return url.rstrip("/")

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _key_is_named(cls, name: object) -> object:
        if not isinstance(name, str) or (name and not _VARIABLE.fullmatch(name)):
            raise ValueError(  # without the value: it may be the key
                "annotator.backend.api_key_env is not the name of an environment variable (capitals, digits and _); "
                "put the key into a variable, for example ANNOTATOR_API_KEY, and give that name"
            )
        return name

    @field_validator("extra_body")
    @classmethod
    def _body_is_ours(cls, body: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_OWN_FIELDS & body.keys()):
            raise ValueError(
                f"annotator.backend.extra_body sets {', '.join(taken)}, which the annotator sets itself; remove it"
            )
        return body


def _split(url: str) -> SplitResult | None:
    """The parts of an address; nothing where it has none, which `urlsplit` would tell with the address."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return None
    return parts


class SelfAnnotation(LanguageModel):
    """The policy itself: the run's own engines, at the version that wrote the rollout, by guided JSON."""

    type: Literal["self"] = "self"
    limits: Limits = Limits(concurrency=16)


class AnnotatorEngine(GeneratorSettings):
    """An engine of an annotator, which gets fewer requests at once than one that samples."""

    max_concurrent_sequences: int = Field(64, ge=1)


class _Local(LanguageModel):
    """A model on an engine of its own (placement.annotator_engine)."""

    engine: AnnotatorEngine = AnnotatorEngine()
    """Of this engine; on a GPU that it shares, gpu_memory_frac leaves room for the others. num_engines is not read."""


class Static(_Local):
    """The weights that the policy started from."""

    type: Literal["static"] = "static"
    limits: Limits = Limits(concurrency=32)


class Frozen(_Local):
    """Another local model."""

    type: Literal["frozen"] = "frozen"
    path: str
    """Folder or hub name of a causal LM with a chat template."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    trust_remote_code: bool = False
    """Whether code that ships with the model may run."""
    limits: Limits = Limits(concurrency=32)
