"""Which line of the log of a process tells why it ended.

Must not know Ray, roles or where logs lie. Reads the end of a file only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ANSI = re.compile(r"\x1b\[[0-9;]*m")
RAISED = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b: ")
"""The last line of a stack."""

_TAIL_BYTES = 1 << 16
_LAST_LINES = 40  # an exception farther up was survived
_LONGEST_QUOTE = 300
_FATAL = re.compile(
    r"Fatal Python error: |terminate called after throwing|CUDA error|out of memory|Bus error|No space left"
)


def last_words(files: Sequence[Path]) -> str:
    """The line that tells why a process ended which has written these files; empty where there is none."""
    tails = [_tail(file) for file in files]
    for lines in tails:
        if fatal := [line for line in lines if _FATAL.search(line)]:
            return fatal[-1][:_LONGEST_QUOTE]
    for lines in tails:
        if raised := [line for line in lines[-_LAST_LINES:] if RAISED.match(line)]:
            return raised[-1][:_LONGEST_QUOTE]
    return ""


def _tail(file: Path) -> list[str]:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        text = opened.read(_TAIL_BYTES).decode("utf-8", "replace")
    return [line.strip() for line in ANSI.sub("", text).splitlines() if line.strip()]
