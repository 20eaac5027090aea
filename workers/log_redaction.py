"""Log records without secrets, in every process of a run, whichever library makes them.

Decides where records are cleaned: where they are made, so that no handler, formatter or forwarded exception sees more.
What a secret is says `trace_rl.secrecy`. What a process prints past logging is not touched here; the launcher cleans
the workers' logs that it keeps (`redact_file`).
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_rl.secrecy import Redactor

_concealed: set[str] = set()


def conceal(variable: str) -> None:
    """Treat the value of an environment variable as a secret in this process, whatever the variable is called."""
    _concealed.add(variable)


def redactor() -> Redactor:
    """What this process knows to be secret now."""
    return Redactor(os.environ, _concealed)


def install() -> None:
    """Clean every record that this process makes from now on; a second call changes nothing."""
    make = logging.getLogRecordFactory()
    if not isinstance(make, _CleanRecords):
        logging.setLogRecordFactory(_CleanRecords(make))


def redact_file(source: Path, target: Path) -> None:
    """Copy a text file line by line without secrets."""
    hidden = redactor()
    as_it_is: Any = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with source.open(**as_it_is) as lines, target.open("w", **as_it_is) as out:
        out.writelines(map(hidden.redact, lines))


@dataclass(frozen=True)
class _CleanRecords:
    make: Callable[..., logging.LogRecord]

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self.make(*args, **kwargs)
        hidden = redactor()
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit: the handler tells, with the arguments
            record.msg, record.args = hidden.redact(f"{record.msg} {record.args}"), None
            return record
        if (clean := hidden.redact(message)) != message:
            record.msg, record.args = clean, None  # only then: some handlers read the arguments
        if record.exc_info and record.exc_info[0] is not None:
            stack = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            if (clean := hidden.redact(stack)) != stack:
                record.exc_text = clean  # formatters take it in place of the exception
        return record
