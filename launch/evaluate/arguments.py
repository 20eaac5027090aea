"""The words behind `trace-rl eval`: which are checkpoints, which configuration. Must not import anything heavy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trace_rl.config.evaluation import BUILT_IN, EvalConfig
from trace_rl.errors import ConfigError
from trace_rl.launch.command_line import is_override
from trace_rl.overlays import load_as


def read_arguments(arguments: Sequence[str], sets: str) -> tuple[EvalConfig, list[str]]:
    """The configuration, and the checkpoints in their order.

    Args:
        sets: names joined by commas; empty where a file or an override says which.

    Raises:
        ConfigError: no checkpoint or set was given, or a setting is not accepted.
    """
    files = [text for text in arguments if text.endswith((".yaml", ".yml"))]
    overrides = [*filter(is_override, arguments)]
    checkpoints = [text for text in arguments if text not in (*files, *overrides)]
    if not checkpoints:
        raise ConfigError("no checkpoint was given; name at least one checkpoint folder, run folder or hub name")
    if not sets and not files and not any(text.startswith("sets=") for text in overrides):
        raise ConfigError(
            f"no set was given; name some with --sets: built in are {', '.join(BUILT_IN)}, and a .jsonl file of your "
            "own is one too"
        )
    chosen = [f"sets={json.dumps(sets)}"] if sets else []
    return load_as(EvalConfig, [Path(text) for text in files], [*overrides, *chosen]), checkpoints
