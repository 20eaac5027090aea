"""`trace-rl doctor RUN`: one run folder, read and told."""

from __future__ import annotations

import time
from pathlib import Path

from trace_rl.launch.doctor.diagnosis import diagnose
from trace_rl.launch.doctor.evidence import gather
from trace_rl.launch.doctor.text import as_json, as_text


def examine(run: Path, is_full: bool, is_json: bool) -> tuple[str, bool]:
    """(what is to be printed, whether the run is well).

    Raises:
        DataError: it is no run folder.
    """
    diagnosis = diagnose(gather(run, is_full), time.time(), Path.cwd())
    return (f"{as_json(diagnosis)}\n" if is_json else as_text(diagnosis)), diagnosis.is_well
