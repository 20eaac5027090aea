"""Starts the configured annotator, and checks before that it has what it needs: a key, a recording, a model, room."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from trace_rl.annotators import Api, Frozen, LanguageModel, SelfAnnotation, Static
from trace_rl.batch import SpanClass
from trace_rl.config.roles import GeneratorSettings, Model
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, DataError
from trace_rl.launch.model_files import load_tokenizer, max_positions, resolve_model
from trace_rl.launch.placement import ANNOTATOR, ENGINE_OF_ANNOTATOR
from trace_rl.launch.seats import Place, Seats, actor_of
from trace_rl.protocols import ErrorRule
from trace_rl.rule_annotators import read_recording
from trace_rl.workers.generator_engine import CHAT_THREADS, ENGINE_THREADS, GeneratorEngine
from trace_rl.workers.span_annotator import NO_KEY, SpanAnnotator, Surroundings
from trace_rl.workers.token_reader import TokenReader, reader_of
from trace_rl.workers.weight_sender import transfer_backend

_MAX_RESTARTS = 3
"""Deaths of the actor in a run that Ray makes good; after that its rollouts go without spans, and a warning says so."""


def check_annotator(config: RunConfig) -> None:
    """Refuse an annotator that lacks its key, its recording, its model, or room in that.

    Args:
        config: with model.path resolved.

    Raises:
        ConfigError, DataError, ModelError: names the setting, and the variable or the file.
    """
    backend = config.annotator.backend
    if backend.recording:
        _check_recording(backend.recording)
    if isinstance(backend.model, Api):
        api_key(backend.model)
    elif backend.model is not None:
        _check_engine(config, backend.model)


def api_key(settings: LanguageModel | None) -> SecretStr:
    """The key of an API from the environment; none where the server asks for none.

    Raises:
        ConfigError: the variable is not set or empty; names it.
    """
    if not isinstance(settings, Api) or not settings.api_key_env:
        return NO_KEY
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"annotator.backend.api_key_env names {settings.api_key_env}, which is not set in this environment or "
            "empty; export it before the start, or leave api_key_env out for a server without keys"
        )
    return SecretStr(key)


def self_annotation_tokens(config: RunConfig) -> int:
    """Tokens that the policy's engines must hold for its own annotations; 0 where it gives none."""
    model = config.annotator.backend.model
    if not config.needs_annotator or not isinstance(model, SelfAnnotation):
        return 0
    return model.context_tokens


@dataclass(frozen=True)
class AnnotatorSetting:
    """What an annotator is started with."""

    config: RunConfig
    """With model.path resolved; the policy's model is what a static annotator loads."""
    tokenizer: Any
    rule: ErrorRule
    types: Mapping[SpanClass, Mapping[str, str]]
    folder: Path
    """Where the answers of models are stored, unless annotator.cache_path says otherwise."""
    purpose: str = "run"
    """Spending is counted for each purpose apart."""


def start_annotator(setting: AnnotatorSetting, policy_engines: Sequence[Any], seats: Seats) -> dict[str, Any]:
    """Start the annotator's actor, named ANNOTATOR, and the engine of its own where it has one; name -> actor handle.

    Args:
        policy_engines: actor handles of the engines that a policy that annotates itself is asked through.
    """
    config = setting.config
    own = _start_engine(config, seats)
    is_self = isinstance(config.annotator.backend.model, SelfAnnotation)
    engines = policy_engines if is_self else list(own.values())
    surroundings = surroundings_of(setting, engines, api_key(config.annotator.backend.model))
    annotator = actor_of(SpanAnnotator, seats.place(ANNOTATOR, {}), max_restarts=_MAX_RESTARTS).remote(
        reader_of(setting.tokenizer), config.annotator, setting.rule, surroundings
    )
    return {**own, ANNOTATOR: annotator}


def surroundings_of(setting: AnnotatorSetting, engines: Sequence[Any] = (), key: SecretStr = NO_KEY) -> Surroundings:
    """What the annotator's actor is given of its run; engines and key only where anyone is asked."""
    config = setting.config
    return Surroundings(
        types=setting.types,
        seed=config.run.seed,
        run=f"{setting.purpose} {setting.folder}",
        cache_path=str(_cache_file(config, setting.folder)),
        key=key,
        asks_reflections=config.reads_reflections,
        engines=tuple(engines),
        reader=_reader(config),
    )


def _reader(config: RunConfig) -> TokenReader | None:
    """The tokenizer of a local model that annotates, where it is not the policy's."""
    settings = config.annotator.backend.model
    if not isinstance(settings, Frozen):
        return None
    return reader_of(load_tokenizer(_local_model(config, settings), "annotator.backend.path"))


def _check_recording(path: str) -> None:
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(
            f"annotator.backend.path {path!r} is no file; give one that `trace-rl annotate --out` has written"
        )
    read_recording(file)


def _check_engine(config: RunConfig, settings: LanguageModel) -> None:
    """Refuse a local model that cannot be asked, or not as much at once."""
    model = _local_model(config, settings)
    if isinstance(settings, Frozen):
        load_tokenizer(model, "annotator.backend.path")
    needed, limit = settings.context_tokens, max_positions(model)
    if limit is not None and needed > limit:
        raise ConfigError(
            f"annotator.backend.max_prompt_tokens = {settings.max_prompt_tokens} and max_reply_tokens = "
            f"{settings.max_reply_tokens} take {needed} tokens with what a chat template and a repair add, but "
            f"{model.path}, which annotates, has max_position_embeddings = {limit}; lower the two together by "
            f"{needed - limit}"
        )
    num_engines = config.generator.num_engines if isinstance(settings, SelfAnnotation) else 1
    most = CHAT_THREADS * num_engines
    if settings.limits.concurrency > most:
        raise ConfigError(
            f"annotator.backend.limits.concurrency is {settings.limits.concurrency}, but the {num_engines} engine(s) "
            f"that annotate answer {most} requests at once, and the others would use up their deadline in a queue; "
            f"lower it to {most}"
        )


def _local_model(config: RunConfig, settings: LanguageModel) -> Model:
    """The model that annotates on an engine: the policy's, or another one."""
    if not isinstance(settings, Frozen):
        return config.model
    frozen = Model(path=settings.path, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    return resolve_model(frozen, "annotator.backend.path")


def _start_engine(config: RunConfig, seats: Seats) -> dict[str, Any]:
    """The engine of an annotator that has one of its own."""
    settings = config.annotator.backend.model
    if not isinstance(settings, Static | Frozen):
        return {}
    model, place = _local_model(config, settings), seats.place(ENGINE_OF_ANNOTATOR, {})
    index = config.generator.num_engines + 1
    engine = start_chat_engine(config, index, model, settings.engine, settings.context_tokens, place)
    return {ENGINE_OF_ANNOTATOR: engine}


def start_chat_engine(
    config: RunConfig, index: int, model: Model, settings: GeneratorSettings, max_model_len: int, place: Place
) -> Any:
    """Actor handle of an engine that answers chats with the weights that it has loaded.

    Args:
        index: names the engine in errors.
        max_model_len: longest chat with its answer, in tokens.
    """
    return actor_of(GeneratorEngine, place, max_concurrency=ENGINE_THREADS).remote(
        index=index,
        model=model,
        settings=settings,
        max_model_len=max_model_len,
        backend=transfer_backend(config.sync, config.placement),
        loaded_version=0,
    )


def _cache_file(config: RunConfig, folder: Path) -> Path:
    path = config.annotator.cache_path
    return Path(path).expanduser().resolve() if path else folder / "annotations.sqlite"
