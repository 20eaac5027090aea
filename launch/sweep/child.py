"""`python -m trace_rl.launch.sweep.child CONFIG`: one cell, as a process that ends itself with its sweep.

Standard input is the bond. The first line is the sweep's word that it has noted this process; the end of input means
that the cell is to end, because the sweep asks for it or because it is dead. Then this process interrupts itself, as
Ctrl-C would, so that Ray and the workers are shut down.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

GO = b"go\n"


def main(config: str) -> None:
    """Train as `trace-rl train CONFIG` does, once the sweep says so."""
    bind_to_sweep()

    from trace_rl.launch.cli import app

    app(["train", config])


def bind_to_sweep() -> None:
    """Wait for the sweep's word, and interrupt this process from now on where the sweep lets go of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    if sys.stdin.buffer.readline() != GO:
        raise SystemExit("the sweep ended before it had noted this cell")
    threading.Thread(target=_interrupt_at_end_of_input, daemon=True, name="bond with the sweep").start()


def _interrupt_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):  # unbuffered: Python cannot end while a thread holds the buffer's lock
        continue
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main(sys.argv[1])
