"""Files to which whole lines are added, by processes that may be killed at any time."""

from __future__ import annotations

import os
from pathlib import Path


def drop_half_line(file: Path) -> None:
    """Cut off what follows the last line feed: a line that a kill has cut off never happened."""
    if file.exists():
        content = file.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            os.truncate(file, complete)
