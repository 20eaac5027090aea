"""What is fuzzed: for each loader, a strategy of inputs near to real ones, and the call that reads them.

A reader may return, or raise a `TraceError` whose message is short and says something; whatever else it does is a bug.
A further target is one entry of `TARGETS`: a strategy, and a function of (input, scratch folder).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_configs import CONFIGS, read_config
from fuzz_ledgers import LEDGERS, read_ledger
from fuzz_records import ANSWERS, DATA, RECORDINGS, read_annotation_answer, read_data, read_recorded
from hypothesis import strategies as st

from trace_rl.errors import TraceError

MAX_LINE_CHARS = 2000
"""Longest line of a message; inputs are small, so longer ones repeat them without end."""
ACCEPTED = "accepted"


@dataclass(frozen=True)
class Target:
    """One loader under test."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any, Path], object]


def outcome(target: Target, given: Any, folder: Path) -> str:
    """ACCEPTED, or the class of the error that refused the input.

    Raises:
        AssertionError: the error says nothing, or too much.
        Exception: the reader failed in a way that it should not.
    """
    try:
        target.read(given, folder)
    except TraceError as error:
        lines = str(error).splitlines()
        assert lines and all(0 < len(line) <= MAX_LINE_CHARS for line in lines), f"message of {type(error)}: {lines}"
        return type(error).__name__
    return ACCEPTED


TARGETS: Mapping[str, Target] = {
    "config": Target(CONFIGS, read_config),
    "data": Target(DATA, read_data),
    "annotation": Target(ANSWERS, read_annotation_answer),
    "recording": Target(RECORDINGS, read_recorded),
    "ledger": Target(LEDGERS, read_ledger),
}
