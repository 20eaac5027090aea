"""What the process of a role computes, as a trace by torch's profiler; called in the process through its actor.

Traces open in https://ui.perfetto.dev or chrome://tracing. All threads of the process are seen; processes that a
library starts for itself (an engine's workers under tensor parallelism) are not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig  # the profiler's only way to see other threads
from torch.profiler import profile

SUFFIX = ".trace.json.gz"
_ATTRIBUTE = "_trace_rl_profile"


def start(actor: object) -> None:
    """Record from now on."""
    profiler = profile(experimental_config=_ExperimentalConfig(profile_all_threads=True, trace_only=True))
    profiler.start()
    setattr(actor, _ATTRIBUTE, profiler)


def stop(actor: object, file: str) -> int:
    """Write what was recorded since `start`; returns its bytes, 0 where this life of the actor was not recorded."""
    profiler = getattr(actor, _ATTRIBUTE, None)
    if profiler is None:
        return 0
    delattr(actor, _ATTRIBUTE)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    profiler.stop()
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(file)
    return Path(file).stat().st_size
