"""The process that reads what `gpu_weight_copy` lends; light to import, because the other side waits for its start.

Invariant: whatever becomes of it, it says so before it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_ipc import BucketReader, shared_memory
from trace_rl.workers.weight_wire import TransferGroup, WeightManifest

Answer = Callable[[], str]

START_S = 240.0
"""For the process to import what it needs."""
ANSWER_S = 60.0
"""For everything after that."""


class NoDigest:
    """Takes the place of a digest where nothing is summed."""

    def update(self, name: str, tensor: Tensor) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


class ReaderError(Exception):
    """The process failed, ended or did not answer in time."""


@contextmanager
def reading(group: TransferGroup, manifest: WeightManifest, device: str, rounds: Sequence[bool]) -> Iterator[Answer]:
    """A process that reads once a round, and sums what it reads where the round says so; it is gone in the end.

    What is yielded waits for the digest of the next round.
    """
    spawn = get_context("spawn")
    answers, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_read, args=(group, manifest, device, rounds, theirs))
    process.start()
    theirs.close()
    try:
        _answer(process, answers, START_S)
        yield lambda: _answer(process, answers, ANSWER_S)
    except ReaderError:
        raise
    except Exception:
        if answers.poll(1.0):  # what became of the other side says more than that it is gone
            _answer(process, answers, ANSWER_S)
        raise
    finally:
        process.join(10)
        process.kill()
        process.join()


def _answer(process: BaseProcess, answers: Connection, timeout_s: float) -> str:
    """The digest of what was read in the next round; '' that the process has started.

    Raises:
        ReaderError: there is none.
    """
    if not answers.poll(timeout_s):
        raise ReaderError(f"the process that reads the weights has not answered within {timeout_s:g} s")
    try:
        digest, failure = answers.recv()
    except EOFError:
        process.join(ANSWER_S)
        raise ReaderError(f"the process that reads the weights ended with exit code {process.exitcode}") from None
    if failure:
        raise ReaderError(f"the process that reads the weights failed: {failure}")
    return str(digest)


def digest_of(is_summed: bool) -> Any:
    """A running digest, or what takes its place."""
    return WeightDigest() if is_summed else NoDigest()


def _read(
    group: TransferGroup, manifest: WeightManifest, device: str, rounds: Sequence[bool], tell: Connection
) -> None:
    try:
        tell.send(("", ""))
        reader = BucketReader(group, 1, shared_memory(torch.device(device)))
        for is_summed in rounds:
            digest = digest_of(is_summed)
            for bucket, copy in reader.buckets(manifest):
                for name, weight in bucket.weights(copy, manifest):
                    digest.update(name, weight)
            tell.send((digest.hexdigest(), ""))
    except Exception as error:
        tell.send(("", f"{type(error).__name__}: {error}"))
        raise
