"""What to mend before a run goes on, and the command by which it does.

Decides from the error that a run ended with which setting is meant; errors of ours say themselves what to do, so that
only what needs more than one sentence is added here. Must not know how a run's state was found.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml

from trace_rl.errors import TraceError
from trace_rl.launch.doctor.evidence import Evidence
from trace_rl.launch.run_log import EarlyEnd

_HINTS = (
    (
        r"learner[^;]*(out of memory|OutOfMemory)",
        "lower learner.max_tokens_per_micro_batch, or raise learner.zero_stage or learner.offload, or set "
        "learner.gradient_checkpointing=true",
    ),
    (
        r"engine[^;]*(out of memory|OutOfMemory)",
        "lower generator.gpu_memory_frac, generator.kv_cache_gib or generator.max_concurrent_sequences",
    ),
    (
        r"out of memory|OutOfMemory|crashed or was killed",
        "give the node more memory, or put fewer roles on it (trace-rl plan says what each takes)",
    ),
    (
        r"(did not finish|within \S+ s)[^;]*step_timeout_s",
        "where the work is that long, raise placement.step_timeout_s; else something hung, and going on is enough",
    ),
    (
        r"(did not|within \S+ s)[^;]*start_timeout_s",
        "where a model takes that long to load, raise placement.start_timeout_s",
    ),
    (
        r"is not finite",
        "the same settings come to the same step again: lower learner.optimizer.learning_rate or "
        "learner.optimizer.max_grad_norm, and look at the batch in dumps/",
    ),
    (
        r"symptoms of a collapse",
        "the same settings come to the same collapse again: lower the route's KL weight, narrow its selector or end "
        "its schedule earlier; an earlier checkpoint may be the better start",
    ),
    (r"No space left|no room for the checkpoint", "make room where the run writes"),
)


def mend_first(evidence: Evidence, end: EarlyEnd | None) -> Iterator[str]:
    """What to do before the command is entered, most important first."""
    usable = any(each.is_usable for each in evidence.checkpoints)
    if not evidence.settings:
        yield (
            "config.yaml cannot be read, so give the files that the run was started with: trace-rl train FILE... "
            f"run.folder={evidence.folder.path} run.resume=auto"
        )
    if not usable and (evidence.checkpoints or evidence.set_aside):
        yield (
            f"no checkpoint can be used, and a run does not start anew by itself: put an undamaged copy into "
            f"{evidence.folder.checkpoints} as step-N, or move what is damaged elsewhere to start at step 0"
        )
    if evidence.setting("placement.ray_address", str) not in (None, "local"):
        yield (
            "it ran on a Ray cluster (placement.ray_address): enter the command on one of its nodes, or with submit in "
            "place of train"
        )
    hint = next((hint for pattern, hint in _HINTS if end and re.search(pattern, end.sentence, re.DOTALL)), "")
    if hint:
        yield hint
    elif end and end.error and end.error not in _own_errors(TraceError) and end.error != "KeyboardInterrupt":
        yield f"{end.error} is not an error that trace-rl raises on purpose: see the end of run.log, and report it"


def command(evidence: Evidence, working_folder: Path) -> str:
    """What goes on with the run; empty where its configuration is not there."""
    if not evidence.settings:
        return ""
    folder, was_in = evidence.folder, _started_in(evidence)
    place, config, begin = working_folder, folder.config, ""
    if was_in not in (None, working_folder):
        # relative paths and plugins of the configuration belong to the folder that it was started in
        place, config, begin = was_in, config.resolve(), f"cd {shlex.quote(str(was_in))} && "
    words = ["trace-rl", "train", str(config), "run.resume=auto"]
    if _configured_folder(evidence, place) != folder.path.resolve():
        words.append(f"run.folder={_as_value(str(folder.path.resolve()))}")
    return begin + shlex.join(words)


def _started_in(evidence: Evidence) -> Path | None:
    """Where the last driver was started; None where that is not known, or there is no such folder here."""
    told = evidence.holder.working_folder if evidence.holder else ""
    try:
        return Path(told) if told and told.isprintable() and Path(told).is_dir() else None
    except OSError:
        return None


def _configured_folder(evidence: Evidence, working_folder: Path) -> Path | None:
    """Where the configuration alone leads; None where that cannot be told."""
    template, name = evidence.setting("run.folder", str), evidence.setting("run.name", str)
    if template is None or name is None:
        return None
    named = template.replace("{name}", name)
    if "{" in named or "}" in named:
        return None
    try:
        return (working_folder / Path(named).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError):
        return None


def _as_value(text: str) -> str:
    """A path as the value of an override: it is read as YAML, and as a template."""
    text = text.replace("{", "{{").replace("}", "}}")
    try:
        is_plain = yaml.safe_load(text) == text
    except yaml.YAMLError:
        is_plain = False
    return text if is_plain else json.dumps(text)


def _own_errors(base: type[TraceError]) -> set[str]:
    return {base.__name__} | {name for below in base.__subclasses__() for name in _own_errors(below)}
