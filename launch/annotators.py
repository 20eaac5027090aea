"""Starts the configured annotator, and the engine of its own where it has one.

What it needs was checked before (`trace_rl.launch.annotator_checks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from trace_rl.annotators import Frozen, SelfAnnotation, Static
from trace_rl.batch import SpanClass
from trace_rl.config.roles import GeneratorSettings, Model
from trace_rl.config.run import RunConfig
from trace_rl.launch.annotator_checks import api_key, local_model
from trace_rl.launch.model_files import load_tokenizer
from trace_rl.launch.placement import ANNOTATOR, ENGINE_OF_ANNOTATOR
from trace_rl.launch.seats import Place, Seats, actor_of
from trace_rl.protocols import ErrorRule
from trace_rl.workers.generator_engine import ENGINE_THREADS, GeneratorEngine
from trace_rl.workers.span_annotator import NO_KEY, SpanAnnotator, Surroundings
from trace_rl.workers.token_reader import TokenReader, reader_of
from trace_rl.workers.weight_sender import transfer_backend


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
    restarts = config.placement.role_restarts
    actor = actor_of(
        SpanAnnotator,
        seats.place(ANNOTATOR, {}),
        max_restarts=restarts,  # after that rollouts go without spans, and a warning says so
        max_task_retries=restarts,  # answers that it had got are read from its cache
    )
    annotator = actor.remote(reader_of(setting.tokenizer), config.annotator, setting.rule, surroundings)
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
    return reader_of(load_tokenizer(local_model(config, settings), "annotator.backend.path"))


def _start_engine(config: RunConfig, seats: Seats) -> dict[str, Any]:
    """The engine of an annotator that has one of its own."""
    settings = config.annotator.backend.model
    if not isinstance(settings, Static | Frozen):
        return {}
    model, place = local_model(config, settings), seats.place(ENGINE_OF_ANNOTATOR, {})
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
    restarts = config.placement.role_restarts
    return actor_of(GeneratorEngine, place, max_concurrency=ENGINE_THREADS, max_restarts=restarts).remote(
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
