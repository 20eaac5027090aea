"""The samples of one checkpoint on one set: a JSONL file that grows, and is gone on with after any kind of end.

    settings.json   what decides a sample; another evaluation is never mixed in
    samples.jsonl   one graded sample a line, in the order in which they were finished

Invariants: a sample that is in the file is not asked for again; a line that was cut off is taken back before anything
is added; a stored sample whose question, answer or seed is not today's is refused and never counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any

from trace_rl.batch import RolloutKey, RolloutRequest
from trace_rl.config.evaluation import EvalSet
from trace_rl.errors import DataError
from trace_rl.evaluation import Sample, digest
from trace_rl.launch.append_only import drop_half_line

_FREE = ("samples_per_problem", "num_problems", "name", "path", "split", "subset")
"""Settings of a set that decide how many samples there are, or only where the same problems are read from."""


def settings_of(settings: EvalSet, **others: Any) -> dict[str, Any]:
    """What decides a sample, beside its prompt and its seed, which are compared one by one."""
    tree = {name: value for name, value in settings.model_dump(mode="json").items() if name not in _FREE}
    return {**tree, **others}


@dataclass
class SampleStore:
    """A context manager; the file is open between its two ends."""

    folder: Path
    settings: Mapping[str, Any]
    _samples: dict[RolloutKey, Sample] = field(default_factory=dict)
    _file: TextIOWrapper | None = None

    @property
    def path(self) -> Path:
        return self.folder / "samples.jsonl"

    def __enter__(self) -> SampleStore:
        """Read what is there.

        Raises:
            DataError: the folder holds another evaluation, or a line is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        self._samples = {RolloutKey(each.prompt_id, each.sample): each for each in _read(self.path)}
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _claim(self) -> None:
        """Write the settings into a new folder; refuse one with others."""
        file = self.folder / "settings.json"
        wanted = json.loads(json.dumps(self.settings))
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
            partial.rename(file)
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        if changed:
            told = "; ".join(f"{name} is {wanted.get(name)!r}, was {found.get(name)!r}" for name in changed)
            raise DataError(
                f"{self.folder} holds samples of another evaluation ({told}); give the new one its own folder=FOLDER, "
                "or remove the old one"
            )

    def missing(self, requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
        """Those of the requests whose samples are not stored.

        Raises:
            DataError: a stored sample was asked something else.
        """
        for request in requests:
            stored = self._samples.get(_key(request))
            if stored is not None and (stored.asked, stored.seed) != (digest(request), request.seed):
                raise DataError(
                    f"{self.path} holds a sample of problem {request.prompt.prompt_id} that was asked something else "
                    "than today's data says; give this evaluation its own folder=FOLDER, or remove the old one"
                )
        return [request for request in requests if _key(request) not in self._samples]

    def add(self, sample: Sample) -> None:
        """Store a sample; what was added survives the end of this process."""
        assert self._file is not None, "the store is a context manager"
        self._samples[RolloutKey(sample.prompt_id, sample.sample)] = sample
        self._file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
        self._file.flush()

    def samples(self, requests: Sequence[RolloutRequest]) -> list[Sample]:
        """The stored samples of these requests, in their order."""
        return [self._samples[_key(request)] for request in requests]


def _key(request: RolloutRequest) -> RolloutKey:
    return RolloutKey(request.prompt.prompt_id, request.sample)


def _read(path: Path) -> list[Sample]:
    """All complete lines; what follows the last of them is cut off the file."""
    if not path.exists():
        return []
    drop_half_line(path)
    samples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            samples.append(Sample(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}:{number} is damaged ({error}); remove this line, and its sample is drawn again"
            ) from error
    return samples
