"""The weight sync on real engines with a Hugging Face model in an actor as the learner; and when it must refuse."""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from trace_rl.batch import Prompt, Rollout, RolloutRequest
from trace_rl.config.roles import GeneratorSettings, Model, Sync
from trace_rl.errors import MovedOnError, WeightSyncError
from trace_rl.protocols import Decoding
from trace_rl.workers.generator import VllmGenerator
from trace_rl.workers.generator_engine import GeneratorEngine, WeightReceipt
from trace_rl.workers.life import new_life
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_file import keep_only, write_version
from trace_rl.workers.weight_sender import WeightSender
from trace_rl.workers.weight_sync import ProvenWeightSync, canary_sequences
from trace_rl.workers.weight_transport import Broadcast, Transfer, transport_of
from trace_rl.workers.weight_wire import (
    GlooGroup,
    ReusedMemory,
    TransferBackend,
    TransferGroup,
    WeightManifest,
    free_address,
    receive_frames,
)

SETTINGS = Sync(bucket_mib=1, timeout_s=60)
CANARY = canary_sequences(300)


def manifest_of(weights: dict[str, torch.Tensor]) -> WeightManifest:
    return WeightManifest.of((name, tuple(weight.shape), weight.dtype) for name, weight in weights.items())


def send_between_threads(
    sender: WeightSender, weights: Sequence[tuple[str, torch.Tensor]], num_receivers: int, timeout_s: float = 20
) -> tuple[str, list[str]]:
    """Digest of the sender and of each receiver, all in this process."""
    address, port = free_address(is_single_node=True)
    group = TransferGroup(address, port, 1 + num_receivers, bucket_mib=1, timeout_s=timeout_s)
    received: dict[int, str] = {}

    def receive(rank: int) -> None:
        link = GlooGroup(address, port, rank, group.world_size, timeout_s)
        digest = WeightDigest()
        names = [
            name
            for frame in receive_frames(link, sender.manifest, group.bucket_bytes, ReusedMemory(), digest)
            for name, _ in frame
        ]
        assert names == list(sender.manifest.names)
        received[rank] = digest.hexdigest()

    threads = [threading.Thread(target=receive, args=(rank,)) for rank in range(1, group.world_size)]
    for thread in threads:
        thread.start()
    sender.connect(group)
    sent = sender.send(iter(weights))
    for thread in threads:
        thread.join(timeout_s)
    return sent, [received[rank] for rank in range(1, group.world_size)]


def test_two_receivers_get_what_was_sent() -> None:
    torch.manual_seed(0)
    weights = {"big": torch.randn(700, 700), "half": torch.randn(33).bfloat16(), "scalar": torch.tensor(3.0)}
    sent, received = send_between_threads(WeightSender(manifest_of(weights), "gloo"), list(weights.items()), 2)
    assert received == [sent, sent]


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([("a", torch.zeros(2, 3))], "sent 1 weights, but its manifest announced 2"),
        ([("b", torch.zeros(4)), ("a", torch.zeros(2, 3))], r"weight 0 of the learner is \('b', \(4,\), 'float32'\)"),
        ([("a", torch.zeros(2, 3)), ("b", torch.zeros(5))], r"weight 1 .* announced \('b', \(4,\), 'float32'\)"),
        ([("a", torch.zeros(2, 3)), ("b", torch.zeros(4)), ("c", torch.zeros(1))], "its manifest ends after 2 weights"),
    ],
)
def test_weights_that_differ_from_the_manifest_are_refused(sent: list[tuple[str, torch.Tensor]], message: str) -> None:
    sender = WeightSender(manifest_of({"a": torch.zeros(2, 3), "b": torch.zeros(4)}), "gloo")
    sender.connect(TransferGroup(*free_address(is_single_node=True), world_size=1, bucket_mib=1, timeout_s=5))
    with pytest.raises(WeightSyncError, match=message):
        sender.send(iter(sent))


def test_a_receiver_that_never_joins_is_a_bounded_error() -> None:
    sender = WeightSender(manifest_of({"a": torch.zeros(2)}), "gloo")
    address, port = free_address(is_single_node=True)
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=f"gloo group of 2 at {address}:{port} within 2 s"):
        sender.connect(TransferGroup(address, port, world_size=2, bucket_mib=1, timeout_s=2))
    assert time.monotonic() - started < 10
    with pytest.raises(WeightSyncError, match="before it was connected"):
        sender.send(iter([("a", torch.zeros(2))]))


class LearnerActor:
    """A Hugging Face model that draws new random weights and sends them, and can fail at that in several ways."""

    def __init__(self, folder: str, backend: TransferBackend) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._sender = WeightSender(self.describe(), backend)
        self._failure = ""

    def describe(self) -> WeightManifest:
        return manifest_of(dict(self._model.named_parameters()))

    def rendezvous(self) -> tuple[str, int]:
        return free_address(is_single_node=True)

    def connect(self, group: TransferGroup) -> None:
        self._sender.connect(group)

    def randomize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self._model.named_parameters():
                if "norm" not in name:
                    weight.normal_(0, 0.2, generator=generator)

    def fail(self, failure: str) -> None:
        self._failure = failure

    def send(self) -> str:
        weight = self._model.model.layers[1].mlp.down_proj.weight.data
        if self._failure == "is broken":
            weight[5, 5] = float("nan")
        digest = self._sender.send(self._weights())
        if self._failure == "trains on":
            weight[5] += 0.5
        return digest

    @ray.method(num_returns=2)
    def write(self, version: int, folder: str) -> tuple[WeightManifest, str]:
        return write_version(Path(folder), version, self.describe(), self._weights(), 1 << 20)

    def keep_only(self, version: int, folder: str) -> None:
        keep_only(Path(folder), version)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, weight) in enumerate(self._model.named_parameters()):
            if number == 10 and self._failure == "dies":
                os._exit(1)
            if number == 10 and self._failure == "hangs":
                time.sleep(8)
            yield name, weight

    def logprobs(self, sequences: Sequence[tuple[int, ...]], temperature: float) -> list[np.ndarray]:
        results = []
        for sequence in sequences:
            with torch.no_grad():
                logits = self._model(torch.tensor([list(sequence)])).logits[0] / temperature
            rows = torch.log_softmax(logits[:-1], dim=-1)
            results.append(rows.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0].numpy())
        return results


class ActorSource:
    """`trace_rl.workers.weight_transport.WeightSource` over a `LearnerActor`."""

    def __init__(self, folder: str, backend: TransferBackend = "gloo") -> None:
        self.actor = ray.remote(LearnerActor).options(num_cpus=0.5).remote(folder, backend)

    def rendezvous(self) -> tuple[str, int]:
        return ray.get(self.actor.rendezvous.remote(), timeout=60)

    def describe_weights(self) -> WeightManifest:
        return ray.get(self.actor.describe.remote(), timeout=60)

    num_senders = 1

    def connect_sender(self, group: TransferGroup) -> list[Any]:
        return [self.actor.connect.remote(group)]

    def send_weights(self, version: int) -> list[Any]:
        return [self.actor.send.remote()]

    def write_weights(self, version: int, folder: str) -> tuple[Any, list[Any]]:
        manifest, digest = self.actor.write.remote(version, folder)
        return manifest, [digest]

    def keep_only(self, version: int, folder: str) -> Any:
        return self.actor.keep_only.remote(version, folder)

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        return self.logprobs(sequences, 1.0)

    def logprobs(self, sequences: Sequence[tuple[int, ...]], temperature: float) -> list[np.ndarray]:
        return ray.get(self.actor.logprobs.remote(sequences, temperature), timeout=60)

    def randomize(self, seed: int) -> None:
        ray.get(self.actor.randomize.remote(seed), timeout=60)

    def fail(self, failure: str) -> None:
        ray.get(self.actor.fail.remote(failure), timeout=60)


def broadcast(source: ActorSource, engines: Sequence[Any], settings: Sync = SETTINGS) -> ProvenWeightSync:
    return ProvenWeightSync(source, Broadcast(source, settings), engines, CANARY, settings)


class BreakableEngine(GeneratorEngine):
    """A real engine in which one part of the sync can be left out."""

    _fault = ""

    def break_sync(self, fault: str) -> None:
        """Leave out, from now on, what `fault` names; empty mends everything."""
        from trace_rl.workers import weight_receiver

        if not hasattr(self, "_whole"):
            self._whole = (weight_receiver.repack_tied_heads, GlooGroup.finish, self._forget_prefixes)
        weight_receiver.repack_tied_heads, GlooGroup.finish, self._forget_prefixes = self._whole
        self._fault = fault
        if fault == "head":
            weight_receiver.repack_tied_heads = lambda model, hf_config: None
        if fault == "cache":
            self._forget_prefixes = lambda version: None
        if fault == "byte":
            whole = self._whole[1]

            def finish(group: GlooGroup, work: Any) -> None:
                whole(group, work)
                (buffer,) = work.result()
                buffer[buffer.numel() // 2] ^= 1

            GlooGroup.finish = finish  # type: ignore[method-assign]

    def receive_weights(self, manifest: WeightManifest, version: int) -> WeightReceipt:
        return super().receive_weights(manifest, version - 1 if self._fault == "version" else version)


def start_engines(folder: str, count: int, backend: TransferBackend = "gloo") -> list[Any]:
    actor = ray.remote(BreakableEngine).options(num_cpus=1, max_restarts=2)
    model = Model(path=folder, dtype="float32")
    engines = [actor.remote(i, model, GeneratorSettings(), max_model_len=384, backend=backend) for i in range(count)]
    ray.get([engine.ready.remote() for engine in engines], timeout=180)
    return engines


@pytest.fixture(scope="module")
def tied_folder(build_tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tied")
    build_tiny_model(folder, tied=True)
    return str(folder)


@pytest.fixture(scope="module")
def engines(local_ray: None, tied_folder: str) -> Iterator[list[Any]]:
    started = start_engines(tied_folder, 2)
    yield started
    for engine in started:
        ray.kill(engine)


@pytest.fixture(scope="module")
def source(local_ray: None, tied_folder: str) -> Iterator[ActorSource]:
    learner = ActorSource(tied_folder)
    yield learner
    ray.kill(learner.actor)


@pytest.fixture
def broken(engines: list[Any], source: ActorSource) -> Iterator[Callable[[str], None]]:
    """Breaks engine 1 for the length of a test."""
    yield lambda fault: ray.get(engines[1].break_sync.remote(fault), timeout=60)
    ray.get(engines[1].break_sync.remote(""), timeout=60)
    source.fail("")


def long_requests(count: int) -> list[RolloutRequest]:
    """Requests that share a prompt of 300 tokens, of which vLLM caches all whole blocks."""
    prompt_token_ids = tuple(40 + (7 * t) % 250 for t in range(300))
    prompts = [Prompt(f"p{number}", "question", "answer") for number in range(2)]
    return [RolloutRequest(prompts[n % 2], n, prompt_token_ids, seed=n) for n in range(count)]


def sampled_gap(source: ActorSource, rollouts: list[Rollout], temperature: float) -> float:
    """Largest difference between the sampled log-probs and those of the learner's model."""
    sequences = [rollout.prompt_token_ids + rollout.token_ids for rollout in rollouts]
    expected = source.logprobs(sequences, temperature)
    return max(
        float(np.abs(rollout.rollout_logprobs - logprobs[-len(rollout.token_ids) :]).max())
        for rollout, logprobs in zip(rollouts, expected, strict=True)
    )


@pytest.mark.engine
def test_engines_refuse_to_sample_until_a_sync_has_proven_their_weights(engines: list[Any]) -> None:
    # Runs before the module's first sync.
    with pytest.raises(
        WeightSyncError, match="generator engine 0 was asked for rollouts while its weights are unproven"
    ):
        list(VllmGenerator(engines, 8, timeout_s=60).generate(long_requests(1), Decoding(1.0)))


@pytest.mark.engine
def test_synced_engines_compute_with_the_new_weights_also_on_cached_prompts(
    engines: list[Any], source: ActorSource
) -> None:
    sync = broadcast(source, engines)
    generator = VllmGenerator(engines, 16, timeout_s=60)
    for version in range(3):
        source.randomize(version)
        metrics = sync.sync(version)
        assert metrics["sync/canary_gap_max_nats"] < 1e-4
        rollouts = list(generator.generate(long_requests(8), Decoding(0.7)))
        assert {each for rollout in rollouts for each in rollout.token_versions} == {version}
        assert sampled_gap(source, rollouts, 0.7) < 1e-4
    assert metrics["sync/weight_bytes"] == source.describe_weights().nbytes


@pytest.mark.engine
def test_a_kept_prefix_cache_would_be_seen(
    engines: list[Any], source: ActorSource, broken: Callable[[str], None]
) -> None:
    # Shows that the test above can fail: with the cache kept, the log-probs are those of the old weights' prefix.
    sync = broadcast(source, engines[1:])
    generator = VllmGenerator(engines[1:], 16, timeout_s=60)
    sync.sync(10)
    list(generator.generate(long_requests(2), Decoding(0.7)))
    broken("cache")
    source.randomize(11)
    sync.sync(11)
    assert sampled_gap(source, list(generator.generate(long_requests(2), Decoding(0.7))), 0.7) > 1e-2


@pytest.mark.engine
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("head", r"generator engine 1 \(\S+ nats\) does not compute with the learner's weights of version 21"),
        ("byte", "generator engine 1 received weights with digest .* the learner sent"),
        ("version", "generator engine 1 reports weight version 20 after the sync of version 21"),
    ],
)
def test_a_broken_engine_is_refused_and_named(
    engines: list[Any], source: ActorSource, broken: Callable[[str], None], fault: str, message: str
) -> None:
    sync = broadcast(source, engines)
    source.randomize(20)
    sync.sync(20)
    broken(fault)
    source.randomize(21)
    with pytest.raises(WeightSyncError, match=message):
        sync.sync(21)
    with pytest.raises(WeightSyncError, match="weights are unproven"):
        list(VllmGenerator(engines, 8, timeout_s=60).generate(long_requests(2), Decoding(1.0)))


@pytest.mark.engine
@pytest.mark.parametrize("failure", ["trains on", "is broken"])
def test_a_learner_that_disagrees_with_all_engines_is_refused(
    engines: list[Any], source: ActorSource, broken: Callable[[str], None], failure: str
) -> None:
    source.randomize(30)
    source.fail(failure)
    gap = "nan" if failure == "is broken" else r"\d\S+"
    message = rf"generator engine 0 \({gap} nats\), generator engine 1 \({gap} nats\) does not compute"
    with pytest.raises(WeightSyncError, match=message):
        broadcast(source, engines).sync(30)


@pytest.mark.engine
def test_a_sender_that_hangs_is_a_bounded_error_and_the_next_sync_works(
    engines: list[Any], source: ActorSource, broken: Callable[[str], None]
) -> None:
    source.fail("hangs")
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"learner rank 0.* did not finish transferring version 40 within"):
        broadcast(source, engines, Sync(bucket_mib=1, timeout_s=4)).sync(40)
    assert time.monotonic() - started < 8
    source.fail("")
    source.randomize(41)
    assert broadcast(source, engines).sync(41)["sync/canary_gap_max_nats"] < 1e-4


@pytest.mark.engine
def test_a_sender_that_dies_is_named_and_a_new_one_can_take_over(
    engines: list[Any], source: ActorSource, tied_folder: str
) -> None:
    mortal = ActorSource(tied_folder)
    mortal.fail("dies")
    started = time.monotonic()
    with pytest.raises(WeightSyncError, match="failed: learner rank 0 died while transferring version 50"):
        broadcast(mortal, engines).sync(50)
    assert time.monotonic() - started < SETTINGS.timeout_s / 2
    source.randomize(51)
    assert broadcast(source, engines).sync(51)["sync/canary_gap_max_nats"] < 1e-4


@pytest.mark.engine
def test_an_untied_head_arrives_too(
    local_ray: None, build_tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("untied")
    build_tiny_model(folder, tied=False)
    untied = ActorSource(str(folder))
    (engine,) = start_engines(str(folder), 1)
    assert "lm_head.weight" in untied.describe_weights().names
    sync = broadcast(untied, [engine])
    for version in range(2):
        untied.randomize(version)
        assert sync.sync(version)["sync/canary_gap_max_nats"] < 1e-4
    rollouts = list(VllmGenerator([engine], 16, timeout_s=60).generate(long_requests(4), Decoding(0.7)))
    assert sampled_gap(untied, rollouts, 0.7) < 1e-4
    ray.kill(engine)
    ray.kill(untied.actor)


@pytest.mark.engine
@pytest.mark.parametrize("backend", ["ipc", "file"])
def test_shared_memory_and_files_bring_the_weights_too(
    local_ray: None, tied_folder: str, tmp_path: Path, backend: TransferBackend
) -> None:
    source = ActorSource(tied_folder, backend)
    (engine,) = start_engines(tied_folder, 1, backend)
    settings = Sync(bucket_mib=1, timeout_s=60, folder=str(tmp_path))
    sync = ProvenWeightSync(source, transport_of(source, settings, backend, 1), [engine], CANARY, settings)
    for version in range(2):
        source.randomize(version)
        assert sync.sync(version)["sync/canary_gap_max_nats"] < 1e-4
    ray.kill(engine)
    ray.kill(source.actor)


def pid_of(engine: Any) -> int:
    return ray.get(engine.__ray_call__.remote(lambda _: os.getpid()), timeout=60)


def kill(engine: Any) -> None:
    os.kill(pid_of(engine), signal.SIGKILL)


@pytest.mark.engine
def test_an_engine_that_dies_comes_back_with_proven_weights_and_the_very_same_samples(
    engines: list[Any], source: ActorSource, caplog: pytest.LogCaptureFixture
) -> None:
    sync = ProvenWeightSync(source, Broadcast(source, SETTINGS), engines, CANARY, SETTINGS, restart_timeout_s=200)
    generator = VllmGenerator(engines, 64, timeout_s=60, recovery=sync)
    source.randomize(60)
    sync.sync(60)
    expected = {rollout.key: rollout for rollout in generator.generate(long_requests(32), Decoding(0.7))}
    victim, life = pid_of(engines[1]), sync.life(1)
    os.kill(victim, signal.SIGSTOP)  # or it would be done before it is killed
    stream = generator.generate(long_requests(32), Decoding(0.7))
    found = [next(stream)]
    os.kill(victim, signal.SIGKILL)
    found += stream
    assert sync.life(1) != life
    assert sorted(rollout.key for rollout in found) == sorted(expected)
    for rollout in found:
        assert rollout.token_ids == expected[rollout.key].token_ids
        np.testing.assert_array_equal(rollout.rollout_logprobs, expected[rollout.key].rollout_logprobs)
    # and where it dies before a sync, the sync waits for it
    kill(engines[1])
    source.randomize(61)
    assert sync.sync(61)["sync/canary_gap_max_nats"] < 1e-4
    assert "Weights of version 61 are sent again to all engines" in caplog.text
    rollouts = list(generator.generate(long_requests(8), Decoding(0.7)))
    assert sampled_gap(source, rollouts, 0.7) < 1e-4


class SilentEngine:
    """An engine as a sync sees it, without weights."""

    def __init__(self) -> None:
        self._life = new_life()

    def life(self) -> str:
        return self._life

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        return [np.zeros(1) for _ in sequences]

    def accept(self, version: int) -> str:
        return self._life


class TrainingLearner:
    """A learner and its transport: refuses a version that it has sent before once it has trained."""

    nbytes = 0

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[str]]] = []
        self.has_trained = False

    def canary_logprobs(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        return [np.zeros(1) for _ in sequences]

    def connect(self, engines: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return "nowhere", {}

    def start(self, engines: Mapping[str, Any], version: int) -> Transfer:
        has_moved_on = self.has_trained and self.sent and self.sent[-1][0] == version
        self.sent.append((version, list(engines)))
        if has_moved_on:
            return Transfer({}, [refuse.remote()])
        self.has_trained = False
        return Transfer({name: ray.put(WeightReceipt(version, "d")) for name in engines}, [ray.put("d")])

    def finish(self, version: int) -> dict[str, Any]:
        return {}


@ray.remote(num_cpus=0)
def refuse() -> None:
    raise MovedOnError("it has trained since")


@pytest.mark.engine
def test_an_engine_that_comes_back_while_the_learner_trains_joins_the_next_sync(local_ray: None) -> None:
    engines = [ray.remote(SilentEngine).options(num_cpus=0, max_restarts=1).remote() for _ in range(2)]
    learner = TrainingLearner()
    sync = ProvenWeightSync(learner, learner, engines, CANARY, SETTINGS, restart_timeout_s=60)
    sync.sync(7)
    life = sync.life(1)
    assert sync.recover(1, life) is False, "it never was away"
    learner.has_trained = True
    kill(engines[1])
    outcome: queue.SimpleQueue[bool] = queue.SimpleQueue()
    threading.Thread(target=lambda: outcome.put(sync.recover(1, life)), daemon=True).start()
    deadline = time.monotonic() + 60
    while (7, ["generator engine 1"]) not in learner.sent:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert outcome.empty()
    both = ["generator engine 0", "generator engine 1"]
    sync.sync(8)
    assert outcome.get(timeout=30) is True and sync.life(1) != life
    assert (8, both) in learner.sent and (8, ["generator engine 1"]) not in learner.sent
    # and where the learner waits, the engine alone is sent the version of the other
    kill(engines[0])
    assert sync.recover(0, sync.life(0)) is True
    assert learner.sent[-1] == (8, ["generator engine 0"])
    sync.sync(9)
    assert learner.sent[-1] == (9, both)
    for engine in engines:
        ray.kill(engine)
