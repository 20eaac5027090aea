"""Starts the configured annotator, and checks before that it has what it needs: a key, a recording, room."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from trace_rl.annotators import Api, Frozen, LanguageModel, SelfAnnotation, Static
from trace_rl.batch import SpanClass
from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, DataError
from trace_rl.launch.cluster import actor_of
from trace_rl.launch.model_files import resolve_model
from trace_rl.protocols import ErrorRule
from trace_rl.workers.generator_engine import ENGINE_THREADS, GeneratorEngine
from trace_rl.workers.span_annotator import NO_KEY, SpanAnnotator, Surroundings
from trace_rl.workers.token_reader import reader_of
from trace_rl.workers.weight_sender import transfer_backend

ANNOTATOR = "the annotator"
"""Name of the annotator's actor, as errors give it."""


def check_annotator(config: RunConfig) -> None:
    """Refuse an annotator whose key or recording is missing.

    Raises:
        ConfigError, DataError: names the variable or the file.
    """
    if not config.needs_annotator:
        return
    backend = config.annotator.backend
    if isinstance(backend.model, Api):
        api_key(backend.model)
    if backend.recording and not Path(backend.recording).expanduser().is_file():
        raise DataError(
            f"annotator.backend.path {backend.recording!r} is no file; give one that `trace-rl annotate --out` has "
            "written"
        )


def api_key(settings: LanguageModel | None) -> SecretStr:
    """The key of an API from the environment; none where the server asks for none.

    Raises:
        ConfigError: the variable is not set; names it.
    """
    if not isinstance(settings, Api) or not settings.api_key_env:
        return NO_KEY
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"annotator.backend.api_key_env names {settings.api_key_env}, which is not set in this environment; export "
            "it before the start, or leave api_key_env out for a server without keys"
        )
    return SecretStr(key)


def self_annotation_tokens(config: RunConfig) -> int:
    """Tokens that the policy's engines must hold for its own annotations; 0 where it gives none."""
    model = config.annotator.backend.model
    if not config.needs_annotator or not isinstance(model, SelfAnnotation):
        return 0
    return model.max_prompt_tokens + model.max_reply_tokens


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


def start_annotator(setting: AnnotatorSetting, policy_engines: Sequence[Any]) -> dict[str, Any]:
    """Start the annotator's actor, named ANNOTATOR, and the engine of its own where it has one; name -> actor handle.

    Args:
        policy_engines: actor handles of the engines that a policy that annotates itself is asked through.
    """
    config = setting.config
    own = _start_engine(config)
    is_self = isinstance(config.annotator.backend.model, SelfAnnotation)
    surroundings = surroundings_of(setting, policy_engines if is_self else list(own.values()))
    annotator = actor_of(SpanAnnotator, config.placement.annotator).remote(
        reader_of(setting.tokenizer), config.annotator, setting.rule, surroundings
    )
    return {**own, ANNOTATOR: annotator}


def surroundings_of(setting: AnnotatorSetting, engines: Sequence[Any] = ()) -> Surroundings:
    """What the annotator's actor is given of its run."""
    config = setting.config
    return Surroundings(
        types=setting.types,
        seed=config.run.seed,
        run=f"{setting.purpose} {setting.folder}",
        cache_path=str(_cache_file(config, setting.folder)),
        key=api_key(config.annotator.backend.model),
        asks_reflections=config.reads_reflections,
        engines=tuple(engines),
    )


def _start_engine(config: RunConfig) -> dict[str, Any]:
    """The engine of an annotator that has one of its own."""
    settings = config.annotator.backend.model
    if isinstance(settings, Static):
        model = config.model
    elif isinstance(settings, Frozen):
        frozen = Model(path=settings.path, dtype=settings.dtype, trust_remote_code=config.model.trust_remote_code)
        model = resolve_model(frozen, "annotator.backend.path")
    else:
        return {}
    engine = actor_of(GeneratorEngine, config.placement.annotator_engine, max_concurrency=ENGINE_THREADS).remote(
        index=config.generator.num_engines + 1,
        model=model,
        settings=config.generator,
        max_model_len=settings.max_prompt_tokens + settings.max_reply_tokens,
        backend=transfer_backend(config.sync, config.placement),
        loaded_version=0,
    )
    return {"the engine of the annotator": engine}


def _cache_file(config: RunConfig, folder: Path) -> Path:
    path = config.annotator.cache_path
    return Path(path).expanduser().resolve() if path else folder / "annotations.sqlite"
