"""Weights and moments of a learner in safetensors: stretches that any rank of any layout finds what it needs in.

Decides how stretches are named in the files, how many go into one, and how those of another layout are put together.
Must not know what DeepSpeed is, or where a rank keeps its parts.

    NAME@START/weight, /exp_avg, /exp_avg_sq [values]   NAME@START/step []

`weight` is float32 of what is trained, and as it was loaded of what is not, which has no moments. Without `step` the
optimizer has taken none.

Invariant: what is read is what was written, bit by bit; a value that no file holds is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trace_rl.errors import CheckpointError
from trace_rl.workers.learner_parts import MOMENTS, Part, set_steps

_FILE_BYTES = 2**30
"""After which a rank begins another file, so that no more is held twice in memory."""
_PREFIX = "state-"


def write_state(folder: Path, parts: Iterable[Part], optimizer: torch.optim.Optimizer, rank: int) -> list[Path]:
    """Write what this rank has to write; returns the files."""
    files: list[Path] = []
    held: dict[str, Tensor] = {}
    for part in parts:
        if part.is_written:
            held |= {f"{part.name}@{part.start}/{kind}": value for kind, value in _values(part, optimizer)}
        if sum(value.nbytes for value in held.values()) >= _FILE_BYTES:
            files.append(_write(folder, rank, len(files), held))
            held = {}
    return [*files, _write(folder, rank, len(files), held)] if held else files


def read_state(folder: Path, parts: Sequence[Part], optimizer: torch.optim.Optimizer) -> None:
    """Fill the parts of this rank, and the optimizer's state, with what any number of ranks has written.

    Raises:
        CheckpointError: values are missing, or parameters that are stepped together have taken different steps.
    """
    with ExitStack() as opened:
        stored = _Stored(folder, opened)
        steps: dict[Tensor, int] = {}
        for part in parts:
            part.weight.copy_(stored.read(part, "weight"))
            if part.stepped is not None:
                taken = stored.steps(part)
                if steps.setdefault(part.stepped, taken) != taken:
                    raise CheckpointError(
                        f"in {folder} the optimizer has taken {taken} steps with {part.name}, but "
                        f"{steps[part.stepped]} with others, which only learner.zero_stage=0 can go on with"
                    )
        for stepped, taken in steps.items():
            set_steps(optimizer, stepped, taken)
        for part in parts:
            if part.stepped is not None and steps[part.stepped]:
                for name in MOMENTS:
                    part.moment(optimizer, name).copy_(stored.read(part, name))


def _values(part: Part, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    yield "weight", part.weight.to("cpu", copy=True)
    if steps := part.steps_taken(optimizer):
        yield "step", torch.tensor(steps)
        for name in MOMENTS:
            yield name, part.moment(optimizer, name).to("cpu", copy=True)


def _write(folder: Path, rank: int, number: int, held: dict[str, Tensor]) -> Path:
    file = folder / f"{_PREFIX}{rank}-{number}.safetensors"
    save_file(held, file)
    return file


@dataclass(frozen=True)
class _Stretch:
    """Values of a parameter in a file."""

    start: int
    stop: int
    file: Path
    key: str


class _Stored:
    """All stretches below a folder; files are opened when something of them is needed."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self._folder = folder
        self._opened = opened
        self._files: dict[Path, Any] = {}
        self._stretches: dict[tuple[str, str], list[_Stretch]] = {}
        for file in sorted(folder.glob(f"{_PREFIX}*.safetensors")):
            try:
                with safe_open(file, framework="pt") as header:
                    for key in header.keys():  # noqa: SIM118 it is no mapping
                        place, kind = key.rsplit("/", 1)
                        name, start = place.rsplit("@", 1)
                        (count,) = header.get_slice(key).get_shape() or (1,)
                        stretch = _Stretch(int(start), int(start) + count, file, key)
                        self._stretches.setdefault((name, kind), []).append(stretch)
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{file} cannot be read ({error}); it is no file of a learner's state") from error

    def read(self, part: Part, kind: str) -> Tensor:
        """The values of a part, in CPU memory."""
        values = torch.empty(part.weight.numel(), dtype=part.weight.dtype)
        stop, num_read = part.start + len(values), 0
        for stretch in self._of(part, kind):
            first, last = max(part.start, stretch.start), min(stop, stretch.stop)
            found = self._open(stretch.file).get_slice(stretch.key)[first - stretch.start : last - stretch.start]
            values[first - part.start : last - part.start] = found
            num_read += last - first
        if num_read != len(values):
            raise CheckpointError(
                f"{self._folder} holds {num_read} of the values {part.start} to {stop} of {part.name} ({kind}), so it "
                "was not written by one learner; go on from another checkpoint"
            )
        return values

    def steps(self, part: Part) -> int:
        """That the optimizer has taken with a part."""
        starts = {stretch.start for stretch in self._of(part, "weight")}
        taken = {stretch.start: stretch for stretch in self._stretches.get((part.name, "step"), ())}
        return max(
            (int(self._open(taken[start].file).get_tensor(taken[start].key)) for start in starts if start in taken),
            default=0,
        )

    def _of(self, part: Part, kind: str) -> list[_Stretch]:
        """Stretches that have values of a part."""
        stop = part.start + part.weight.numel()
        found = self._stretches.get((part.name, kind), ())
        return [stretch for stretch in found if stretch.start < stop and stretch.stop > part.start]

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = self._opened.enter_context(safe_open(file, framework="pt"))
        return self._files[file]
