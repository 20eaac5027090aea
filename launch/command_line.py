"""What the commands of `trace-rl` have in common: how words are read, and how an error becomes one sentence.

Must not import anything heavy: the environment has to be set before torch, vLLM, DeepSpeed or Ray is imported.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

from trace_rl.errors import PreemptedError, TraceError
from trace_rl.launch import preemption
from trace_rl.workers import environment
from trace_rl.workers.log_redaction import redactor


def prepare_imports() -> None:
    """Set the environment of heavy libraries; `plugins` are looked for in the working folder too."""
    environment.apply()
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # last, so that no file there can hide an installed module


def is_override(text: str) -> bool:
    """Whether a word is a `key=value`, and no existing file."""
    return "=" in text and not Path(text).exists()


@contextmanager
def explained(interrupted: str = "") -> Iterator[None]:
    """Print an error that a user can act on as its sentence, any other with its stack, both without secrets, and exit
    with 1.

    Args:
        interrupted: what is said on Ctrl-C; without it Ctrl-C is left alone.
    """
    try:
        yield
    except PreemptedError as error:
        fail(str(error), preemption.EXIT_CODE)
    except TraceError as error:
        fail(str(error))
    except KeyboardInterrupt:
        if not interrupted:
            raise
        fail(interrupted)
    except (typer.Exit, typer.Abort):
        raise
    except Exception:
        sys.stderr.write(redactor().redact(traceback.format_exc()))
        raise typer.Exit(1) from None


def fail(sentence: str, exit_code: int = 1) -> NoReturn:
    """Print a sentence as an error and exit."""
    told = redactor().redact(f"error: {sentence}")
    Console(stderr=True).print(told, markup=False, highlight=False, soft_wrap=True, style="red")
    raise typer.Exit(exit_code)
