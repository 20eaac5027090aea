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

TOLERANCE = 2e-7
"""Of weights after a further step: gradients of another number of ranks are added up in another order."""
LAYOUTS = [(1, 0), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)]
SCHEDULE = {"type": "cosine", "warmup_steps": 1}


def spec(model_path: str, world_size: int, zero_stage: int, dtype: str = "float32", **learner: Any) -> Any:
    settings = {"world_size": world_size, "zero_stage": zero_stage, "schedule": SCHEDULE, **learner}
    return learner_spec(run_config(model_path, dtype=dtype, **settings))


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
def original(
    hosts: dict[int, Group], model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Weights, Weights]:
    """A checkpoint of two ranks under ZeRO-3, what it holds, and the weights after a further step."""
    folder = tmp_path_factory.mktemp("original")
    group = hosts[2].build(spec(model_path, 2, 3))
    group.train(BATCHES)
    held = saved(group, folder)
    group.train([batch(2)])
    return folder, held, group.weights()


@pytest.mark.parametrize(("world_size", "zero_stage"), LAYOUTS)
def test_every_layout_goes_on_with_the_same_state(
    hosts: dict[int, Group], original: Any, model_path: str, tmp_path: Path, world_size: int, zero_stage: int
) -> None:
    folder, held, after = original
    group = hosts[world_size].build(spec(model_path, world_size, zero_stage))
    group.all("call", "load", str(folder))
    # 35 values of one parameter in 3 parts: 12, 12, 11; whatever the cut, weights, moments and steps are the same
    assert_same(saved(group, tmp_path), held)
    (report,) = group.train([batch(2)])
    assert 0 < report.learning_rate < 1e-3
    assert gap(group.weights(), after) <= (0 if (world_size, zero_stage) == (2, 3) else TOLERANCE)
