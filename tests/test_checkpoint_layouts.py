"""A learner goes on from what other ranks under another ZeRO stage have written, with the very same state."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_harness import BATCHES, Group, Weights, batch, gap, run_config
from safetensors.torch import load_file

from trace_rl.workers.learner import learner_spec

pytestmark = pytest.mark.engine

TOLERANCES = {"float32": 2e-7, "bfloat16": 4e-3, "lora": 2e-7}
"""Of weights after a further step: gradients of another number of ranks are added up in another order."""
KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "lora": {"lora": {"rank": 4, "alpha": 8}},
}
CHANGES = [
    *(("float32", *layout) for layout in ((1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3))),
    *(("bfloat16", *layout) for layout in ((1, 1), (2, 1), (2, 2), (2, 3))),
    *(("lora", *layout) for layout in ((1, 0), (2, 2), (2, 3))),
]


def spec(model_path: str, kind: str, world_size: int, zero_stage: int, **learner: Any) -> Any:
    settings = {"world_size": world_size, "zero_stage": zero_stage, **KINDS[kind], **learner}
    return learner_spec(run_config(model_path, schedule={"type": "cosine", "warmup_steps": 1}, **settings))


@pytest.fixture(scope="module")
def hosts(groups: dict[int, Group]) -> Iterator[dict[int, Group]]:
    third = Group(3)
    yield groups | {3: third}
    third.close()


def saved(group: Group, folder: Path) -> Weights:
    """What a checkpoint holds, put together from the stretches of all files."""
    group.all("call", "save", str(folder))
    files = [load_file(file) for file in sorted((folder / "learner").glob("state-*.safetensors"))]
    stretches: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for key, values in chain.from_iterable(file.items() for file in files):
        place, kind = key.rsplit("/", 1)
        name, start = place.rsplit("@", 1)
        stretches.setdefault((name, kind), []).append((int(start), values.reshape(-1)))
    whole = {}
    for (name, kind), found in stretches.items():
        ordered = [values for _, values in sorted(found, key=lambda item: item[0])]
        whole[f"{name}/{kind}"] = torch.cat(ordered)[:1] if kind == "step" else torch.cat(ordered)
    return dict(sorted(whole.items()))


def assert_same(first: Weights, second: Weights) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def originals(
    hosts: dict[int, Group], model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Weights, Weights]]:
    """Of each kind a checkpoint of two ranks under ZeRO-3, what it holds, and the weights after a further step."""
    made = {}
    for kind in KINDS:
        group = hosts[2].build(spec(model_path, kind, 2, 3))
        group.train(BATCHES)
        folder = tmp_path_factory.mktemp(kind)
        held = saved(group, folder)
        group.train([batch(2)])
        made[kind] = folder, held, group.weights()
    return made


@pytest.mark.parametrize(("kind", "world_size", "zero_stage"), CHANGES)
def test_every_layout_goes_on_with_the_same_state(
    hosts: dict[int, Group],
    originals: Any,
    model_path: str,
    tmp_path: Path,
    kind: str,
    world_size: int,
    zero_stage: int,
) -> None:
    folder, held, after = originals[kind]
    group = hosts[world_size].build(spec(model_path, kind, world_size, zero_stage))
    group.all("call", "load", str(folder))
    assert_same(saved(group, tmp_path), held)  # weights, moments and steps, however they are cut
    (report,) = group.train([batch(2)])
    assert 0 < report.learning_rate < 1e-3
    assert gap(group.weights(), after) <= (0 if (world_size, zero_stage) == (2, 3) else TOLERANCES[kind])


def test_what_waits_in_cpu_memory_may_change(
    hosts: dict[int, Group], originals: Any, model_path: str, tmp_path: Path
) -> None:
    folder, held, after = originals["float32"]
    for zero_stage, offload in ((2, "optimizer"), (3, "all")):
        group = hosts[2].build(spec(model_path, "float32", 2, zero_stage, offload=offload))
        group.all("call", "load", str(folder))
        assert_same(saved(group, tmp_path / offload), held)
        group.train([batch(2)])
        assert gap(group.weights(), after) <= TOLERANCES["float32"]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_state_that_was_away_is_written_as_it_is(
    hosts: dict[int, Group], originals: Any, model_path: str, tmp_path: Path, zero_stage: int
) -> None:
    folder, held, _ = originals["float32"]
    group = hosts[2].build(spec(model_path, "float32", 2, zero_stage))
    group.all("call", "load", str(folder))
    for what in ("states", "weights"):
        group.all("call", "put_away", what)
    group.all("call", "take_back")
    assert_same(saved(group, tmp_path), held)
