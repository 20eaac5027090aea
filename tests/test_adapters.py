"""Low-rank adapters: trained as plain torch trains them, and what engines, teachers and checkpoints get of them."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_harness import BATCHES, Group, Weights, gap, load, reference, run_config
from safetensors.torch import load_file
from torch import nn

from trace_rl.config.learner import Lora
from trace_rl.config.roles import GeneratorSettings, Model, Sync
from trace_rl.errors import CheckpointError, ConfigError
from trace_rl.workers.adapters import Adapter
from trace_rl.workers.generator_engine import GeneratorEngine
from trace_rl.workers.learner import learner_spec
from trace_rl.workers.weight_sync import ProvenWeightSync
from trace_rl.workers.weight_transport import AdapterObjects

pytestmark = pytest.mark.engine

TOLERANCE = 1e-6
RANK, ALPHA = 4, 6
SCALE = ALPHA / RANK
VERSIONS = itertools.count()
CANARY = [(3, 7, 11, 200, 5, 9), (299, 1, 0, 44, 2, 9, 17)]


def spec(model_path: str, lora: dict[str, Any] | None = None, **learner: Any) -> Any:
    return learner_spec(run_config(model_path, lora={"rank": RANK, "alpha": ALPHA, **(lora or {})}, **learner))


def exported(group: Group) -> Adapter:
    adapter, digest = group.all("call", "export_adapter", next(VERSIONS))[0]
    assert digest == adapter.digest()
    return adapter


def layers_of(adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B by the name of the layer."""
    found = {}
    for name, down in adapter.weights.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[layer] = (down, adapter.weights[name.replace("lora_A", "lora_B")])
    return found


def adapt(model: Any, adapter: Adapter) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Add x A^T B^T alpha / rank to the output of each layer by hooks; only A and B require a gradient."""
    model.requires_grad_(False)
    trained = {}
    for name, (down, up) in layers_of(adapter).items():
        pair = nn.Parameter(down.clone()), nn.Parameter(up.clone())
        trained[name] = pair

        def hook(_: nn.Module, inputs: Any, output: torch.Tensor, pair: Any = pair) -> torch.Tensor:
            return output + SCALE * (inputs[0] @ pair[0].T) @ pair[1].T

        model.get_submodule(name).register_forward_hook(hook)
    return trained


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (2, 2), (2, 3)])
def test_adapters_are_trained_as_by_plain_torch(
    groups: dict[int, Group], model_path: str, world_size: int, zero_stage: int
) -> None:
    group = groups[world_size].build(spec(model_path, world_size=world_size, zero_stage=zero_stage))
    start = exported(group)
    # four projections of attention and three of the feed-forward in each of two layers, and never the head
    assert len(layers_of(start)) == 14 and not any("lm_head" in name for name in start.weights)
    assert all(not up.any() and down.any() for down, up in layers_of(start).values())
    assert gap(group.weights(), dict(load(model_path).named_parameters())) == 0  # nothing is added yet
    trained: dict[str, Any] = {}

    def prepare(model: Any) -> list[nn.Parameter]:
        trained.update(adapt(model, start))
        return [parameter for pair in trained.values() for parameter in pair]

    _, losses, norms = reference(model_path, BATCHES, trained=prepare)
    assert group.loss(BATCHES[0]) == pytest.approx(losses[0], abs=TOLERANCE)
    (report,) = group.train(BATCHES[1:])
    assert report.grad_norms == pytest.approx(norms[1:], rel=1e-4)
    found = layers_of(exported(group))
    for name, pair in trained.items():
        for ours, theirs in zip(found[name], pair, strict=True):
            assert (ours - theirs).abs().max() <= TOLERANCE, name
    assert max(float(up.abs().max()) for _, up in found.values()) > 1e-4


def merged(model_path: str, adapter: Adapter) -> Weights:
    weights = {name: weight.detach().clone() for name, weight in load(model_path).named_parameters()}
    for name, (down, up) in layers_of(adapter).items():
        weights[f"{name}.weight"] += SCALE * up @ down
    return weights


def test_teachers_and_checkpoints_get_a_plain_model(groups: dict[int, Group], model_path: str, tmp_path: Path) -> None:
    group = groups[2].build(spec(model_path, world_size=2, zero_stage=3))
    group.train(BATCHES)
    adapter = exported(group)
    expected = merged(model_path, adapter)
    assert gap(group.weights(), expected) <= 1e-6 < gap(expected, dict(load(model_path).named_parameters()))
    group.all("call", "save", str(tmp_path))
    assert gap(dict(load(str(tmp_path / "hf")).named_parameters()), group.weights()) == 0
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == adapter.weights.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in adapter.weights.items())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == RANK

    uninterrupted = group.train(BATCHES[:1]) and exported(group)
    group.build(spec(model_path, world_size=2, zero_stage=3)).all("call", "load", str(tmp_path))
    assert group.train(BATCHES[:1]) and exported(group).digest() == uninterrupted.digest()


def test_what_peft_refuses_is_one_sentence(groups: dict[int, Group], model_path: str) -> None:
    for targets, sentence in (("nothing", "which peft refuses"), (("lm_head",), "which takes in the output head")):
        with pytest.raises(ConfigError, match=rf"target_modules is .*{sentence}"):
            groups[1].build(spec(model_path, {"target_modules": targets}))


@pytest.fixture(scope="module")
def engine(local_ray: None, model_path: str) -> Iterator[Any]:
    import ray

    actor = ray.remote(GeneratorEngine).options(num_cpus=1)
    model = Model(path=model_path, dtype="float32")
    made = actor.remote(0, model, GeneratorSettings(), max_model_len=64, backend="gloo", lora=Lora(rank=RANK))
    ray.get(made.ready.remote(), timeout=180)
    yield made
    ray.kill(made)


class GroupSource:
    """A group of ranks as the sync sees the learner."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.manifest: Any = None

    def describe_weights(self) -> Any:
        return self.manifest

    def export_adapter(self, version: int) -> Any:
        copies = [actor.call.options(num_returns=1).remote("export_adapter", version) for actor in self._group.actors]
        import ray

        found = ray.get(copies, timeout=60)
        return ray.put(found[0][0]), [ray.put(digest) for _, digest in found]

    def canary_logprobs(self, sequences: list[tuple[int, ...]]) -> list[np.ndarray]:
        return self._group.all("call", "canary_logprobs", sequences)[0]


def test_engines_compute_with_the_adapters_of_each_version(
    groups: dict[int, Group], engine: Any, model_path: str
) -> None:
    import ray

    group = groups[1].build(spec(model_path))
    source = GroupSource(group)
    source.manifest = group.all("build", spec(model_path), group._address)[0]
    group.all("call", "set_teacher_head", torch.zeros(300, 64))
    sync = ProvenWeightSync(source, AdapterObjects(source), [engine], CANARY, Sync(timeout_s=60))
    seen = []
    for version in range(3):
        metrics = sync.sync(version)
        assert metrics["sync/canary_gap_max_nats"] < 1e-4
        assert metrics["sync/weight_bytes"] == sum(weight.nbytes for weight in exported(group).weights.values())
        seen.append(np.concatenate(ray.get(engine.score.remote(CANARY), timeout=60)))
        group.train([BATCHES[version % 2]])
    assert np.abs(seen[1] - seen[0]).max() > 1e-3 and np.abs(seen[2] - seen[1]).max() > 1e-3


def test_merged_weights_are_sent_where_the_config_says_so(
    groups: dict[int, Group], model_path: str, tmp_path: Path
) -> None:
    group = groups[1].build(spec(model_path, {"sync": "merged"}))
    manifest = group.all("build", spec(model_path, {"sync": "merged"}), group._address)[0]
    assert manifest.names == tuple(dict(load(model_path).named_parameters()))
    group.all("call", "save", str(tmp_path))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    # how they were sent is no part of a checkpoint, their scale is
    group.build(spec(model_path)).all("call", "load", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"written with learner\.lora = .*'alpha': 6.* but this run has .*'alpha': 12"
    ):
        group.build(spec(model_path, {"alpha": 12})).all("call", "load", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"but this run has None"):
        group.build(learner_spec(run_config(model_path))).all("call", "load", str(tmp_path))
