"""What an annotator needs before it is started, checked: a key, a recording, a model, room.

This module must not know Ray or how annotators are started (`trace_rl.launch.annotators`).
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import SecretStr

from trace_rl.annotators import Api, Frozen, LanguageModel, SelfAnnotation
from trace_rl.config.roles import Model
from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError, DataError
from trace_rl.launch.model_files import load_tokenizer, max_positions, resolve_model
from trace_rl.rule_annotators import read_recording
from trace_rl.workers.generator_engine import CHAT_THREADS
from trace_rl.workers.log_redaction import conceal
from trace_rl.workers.span_annotator import NO_KEY


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
    conceal(settings.api_key_env)
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


def local_model(config: RunConfig, settings: LanguageModel) -> Model:
    """The model that annotates on an engine: the policy's, or another one."""
    if not isinstance(settings, Frozen):
        return config.model
    frozen = Model(path=settings.path, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    return resolve_model(frozen, "annotator.backend.path")


def _check_recording(path: str) -> None:
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(
            f"annotator.backend.path {path!r} is no file; give one that `trace-rl annotate --out` has written"
        )
    read_recording(file)


def _check_engine(config: RunConfig, settings: LanguageModel) -> None:
    """Refuse a local model that cannot be asked, or not as much at once."""
    model = local_model(config, settings)
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
