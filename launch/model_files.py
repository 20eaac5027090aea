"""Where the model of a run lies, and its tokenizer; everything that can be refused before a worker is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from trace_rl.config.roles import Model
from trace_rl.errors import ModelError, first_line
from trace_rl.tasks.arithmetic import base_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "task:arithmetic"


def resolve_model(model: Model, setting: str = "model.path") -> Model:
    """Replace `task:arithmetic` by the folder of the embedded base model, and relative folders by absolute ones.

    Args:
        setting: which setting gave the path; named in errors.

    Raises:
        ModelError: the path looks like a folder and is none.
    """
    if model.path == EMBEDDED:
        return model.model_copy(update={"path": str(base_model_path())})
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{setting} {model.path!r} has no config.json; give a folder in Hugging Face format")
        return model.model_copy(update={"path": str(folder.resolve())})
    looks_local = folder.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") != 1
    if looks_local:
        raise ModelError(
            f"{setting} {model.path!r} is not a folder; give a folder in Hugging Face format, a hub name such as "
            f"Qwen/Qwen3-1.7B, or {EMBEDDED!r}"
        )
    return model


def load_tokenizer(model: Model, setting: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved model.

    Args:
        setting: which setting gave the path; named in errors.

    Raises:
        ModelError: there is none, or it has no chat template or end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"no tokenizer loads from {setting} {model.path!r} ({first_line(error)})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without its files
        raise ModelError(
            f"no tokenizer could be loaded from {setting} {model.path!r} (it has no vocabulary); put tokenizer.json "
            "and tokenizer_config.json beside config.json"
        )
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {model.path!r} has no chat template, which both prompts are rendered with; use an "
            "instruction-tuned model, or put a chat_template.jinja beside its tokenizer files"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {model.path!r} has no end-of-sequence token; set eos_token in its config")
    return tokenizer


def max_positions(model: Model) -> int | None:
    """The longest sequence that a model was made for, as its config.json says; None for a hub name, whose engine checks
    it after the download, and where nothing is said."""
    file = Path(model.path) / "config.json"
    if not file.is_file():
        return None
    limit: int | None = json.loads(file.read_text(encoding="utf-8")).get("max_position_embeddings")
    return limit
