"""Completions that are being written while an engine gets other weights, against transformers; and giving them up."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from trace_rl.batch import Prompt, Rollout, RolloutKey, RolloutRequest
from trace_rl.config.roles import GeneratorSettings, Model
from trace_rl.config.scheduling import Scheduling
from trace_rl.protocols import Decoding
from trace_rl.workers.generator import VllmGenerator
from trace_rl.workers.generator_engine import GeneratorEngine
from trace_rl.workers.weight_sender import WeightSender
from trace_rl.workers.weight_wire import TransferGroup, WeightManifest, free_address

pytestmark = pytest.mark.engine

NUM_TOKENS = 220
DECODING = Decoding(1.0)


def requests(num_prompts: int, samples: int, seed: int = 0) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            Prompt(f"p{number}", "q", "a"),
            sample,
            # more than a block of the cache, so that samples share a cached prefix
            tuple(40 + (7 * number + 3 * t) % 250 for t in range(70)),
            seed=1000 * seed + 10 * number + sample,
        )
        for number in range(num_prompts)
        for sample in range(samples)
    ]


def hf_logprobs(model: Any, rollout: Rollout) -> np.ndarray:
    """log p of the response's tokens, computed by transformers with these weights throughout."""
    token_ids = rollout.prompt_token_ids + rollout.token_ids
    with torch.no_grad():
        logprobs = model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)
    start = len(rollout.prompt_token_ids)
    return np.array([logprobs[t - 1, token_ids[t]].item() for t in range(start, len(token_ids))])


class Bench:
    """An engine that goes through syncs, and two policies to sync it with."""

    def __init__(self, folder: Path, build: Callable[..., Any], partial: str) -> None:
        self.policies = [build(folder / str(seed), tied=True, seed=seed) for seed in (0, 1)]
        written = folder / "0" / "generation_config.json"
        written.write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0}))  # completions have to be long
        self.engine = (
            ray.remote(GeneratorEngine)
            .options(num_cpus=1, max_concurrency=8)
            .remote(
                0,
                Model(path=str(folder / "0"), dtype="float32"),
                GeneratorSettings(max_concurrent_sequences=16),
                max_model_len=320,
                backend="gloo",
                scheduling=Scheduling(max_staleness=1, partial=partial),
            )
        )
        ray.get(self.engine.ready.remote(), timeout=120)
        self.generator = VllmGenerator([self.engine], NUM_TOKENS, timeout_s=120)
        self.sender = WeightSender(WeightManifest.of(self._listed(0)), "gloo")
        group = TransferGroup(*free_address(is_single_node=True), 2, 16, 60)
        joined = self.engine.join_transfer.remote(group, 1)
        self.sender.connect(group)
        ray.get(joined, timeout=60)

    def _listed(self, policy: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        return [(name, tuple(w.shape), w.dtype) for name, w in self.policies[policy].named_parameters()]

    def sync(self, policy: int, version: int) -> None:
        received = self.engine.receive_weights.remote(self.sender.manifest, version)
        self.sender.send((name, weight.detach()) for name, weight in self.policies[policy].named_parameters())
        assert ray.get(received, timeout=60).version == version
        ray.get(self.engine.accept.remote(version), timeout=60)

    def through_a_sync(self, version: int) -> list[Rollout]:
        """Sampled from policy 0 as `version`, and on from policy 1 as the next one."""
        self.sync(0, version)
        arrived = self.generator.generate(requests(4, 4, seed=version), DECODING)
        rollouts: list[Rollout] = []
        receiving = threading.Thread(target=lambda: rollouts.extend(arrived))
        receiving.start()
        time.sleep(0.5)
        self.sync(1, version + 1)
        receiving.join(120)
        assert len(rollouts) == 16
        return rollouts


@pytest.fixture(scope="module", params=["resume", "keep"])
def bench(
    request: pytest.FixtureRequest,
    local_ray: None,
    build_tiny_model: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Bench, list[Rollout]]]:
    bench = Bench(tmp_path_factory.mktemp(request.param), build_tiny_model, request.param)
    yield request.param, bench, bench.through_a_sync(4)
    ray.kill(bench.engine)


def test_every_token_knows_which_weights_wrote_it(bench: tuple[str, Bench, list[Rollout]]) -> None:
    partial, engine, rollouts = bench
    mixed = [rollout for rollout in rollouts if set(rollout.token_versions) == {4, 5}]
    assert len(mixed) >= 12
    for rollout in mixed:
        assert (np.diff(rollout.token_versions) >= 0).all()
        is_old = rollout.token_versions == 4
        old, new = (np.abs(rollout.rollout_logprobs - hf_logprobs(policy, rollout)) for policy in engine.policies)
        assert old[is_old].max() < 1e-3
        if partial == "resume":  # the new weights have read the prefix themselves
            assert new[~is_old].max() < 1e-3
        else:  # the cache of the old ones is read by the new ones: neither policy's log-probs, but those sampled from
            assert new[~is_old].max() > 1e-2
        assert old[~is_old].max() > 1e-2


def test_no_request_reads_what_other_weights_have_cached(bench: tuple[str, Bench, list[Rollout]]) -> None:
    _, engine, _ = bench
    for version, policy in ((7, 0), (8, 1)):
        engine.sync(policy, version)
        for rollout in engine.generator.generate(requests(2, 2), DECODING):  # the same prompts again
            assert set(rollout.token_versions) == {version}
            gap = np.abs(rollout.rollout_logprobs - hf_logprobs(engine.policies[policy], rollout))
            assert gap.max() < 1e-3


def test_a_seeded_completion_does_not_depend_on_a_sync_of_the_same_weights(
    bench: tuple[str, Bench, list[Rollout]],
) -> None:
    """PreemptedError in the middle, a completion goes on with the random numbers that were next."""
    _, engine, _ = bench
    engine.sync(0, 10)
    whole = {item.key: item for item in engine.generator.generate(requests(4, 4, seed=3), DECODING)}
    arrived = engine.generator.generate(requests(4, 4, seed=3), DECODING)
    rollouts: list[Rollout] = []
    receiving = threading.Thread(target=lambda: rollouts.extend(arrived))
    receiving.start()
    time.sleep(0.5)
    engine.sync(0, 11)
    receiving.join(120)
    assert any(set(item.token_versions) == {10, 11} for item in rollouts)
    assert [item.token_ids for item in rollouts] == [whole[item.key].token_ids for item in rollouts]


def test_completions_can_be_given_up(bench: tuple[str, Bench, list[Rollout]]) -> None:
    _, engine, _ = bench
    asked = requests(4, 4, seed=5)
    arrived = engine.generator.generate(asked, DECODING)
    given_up = {RolloutKey(request.prompt.prompt_id, request.sample) for request in asked[:10]}
    time.sleep(0.2)
    engine.generator.cancel([*given_up, RolloutKey("unknown", 0)])
    came = {rollout.key: rollout for rollout in arrived}
    assert len(came.keys() - given_up) == 6
    early = came.keys() & given_up
    assert len(early) < 5
    assert all(came[key].finish_reason == "stop" for key in early)  # ended by themselves before they were given up


def test_a_proof_does_not_wait_for_the_rollouts_before_it(bench: tuple[str, Bench, list[Rollout]]) -> None:
    """48 rollouts on 16 places: the canary of a sync has its turn after those that run, not after all of them."""
    _, engine, _ = bench
    rollouts: list[Rollout] = []
    arrived = engine.generator.generate(requests(12, 4, seed=6), DECODING)
    receiving = threading.Thread(target=lambda: rollouts.extend(arrived))
    receiving.start()
    time.sleep(0.3)
    engine.sync(1, 20)
    ray.get(engine.engine.score.remote([tuple(range(40, 60))] * 8), timeout=60)
    num_before = len(rollouts)
    receiving.join(120)
    assert num_before <= 24
    assert len(rollouts) == 48
