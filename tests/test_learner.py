"""The learner as the driver sees it: weights that leave it, metrics over all ranks, and whom it blames."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from learner_harness import BATCHES, HEAD, Weights, gap, load, reference, run_config, with_advantage

from trace_rl.errors import TrainingError, WorkerError
from trace_rl.workers.learner import DeepSpeedLearner
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_wire import GlooGroup, TransferGroup, WeightManifest, plan_buckets

pytestmark = pytest.mark.engine

TOLERANCE = 1e-6


def receive(group: TransferGroup, manifest: WeightManifest) -> tuple[Weights, str]:
    """What an engine would receive, and its digest."""
    link = GlooGroup(group.address, group.port, 1, group.world_size, group.timeout_s)
    weights, digest = {}, WeightDigest()
    for bucket in plan_buckets(manifest, group.bucket_mib * 2**20):
        buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        link.broadcast(buffer)
        for slot in bucket.slots:
            weight = bucket.view(slot, buffer, manifest)
            digest.update(manifest.names[slot.index], weight)
            weights[manifest.names[slot.index]] = weight.clone()
    return weights, digest.hexdigest()


def assert_same(weights: Weights, expected: Weights) -> None:
    assert list(weights) == list(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def learner(
    local_ray: None, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[DeepSpeedLearner, Path]]:
    import ray

    folder = tmp_path_factory.mktemp("run")
    started = DeepSpeedLearner(run_config(model_path, world_size=2, zero_stage=3), folder)
    started.set_teacher_head(ray.put(HEAD))
    yield started, folder
    started.close()


def exported(learner: DeepSpeedLearner) -> Weights:
    import ray

    return {name: weight for bucket in learner.export_state() for name, weight in ray.get(bucket).items()}


def test_driver_exports_and_sends_full_weights(learner: tuple[DeepSpeedLearner, Path], model_path: str) -> None:
    import ray

    source, _ = learner
    model = load(model_path)
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert_same(exported(source), start)
    manifest = source.describe_weights()
    assert manifest.names == tuple(start) and manifest.shapes[0] == (300, 64)
    group = TransferGroup(*source.rendezvous(), world_size=2, bucket_mib=1, timeout_s=30.0)
    joined = source.connect_sender(group)
    sent = source.send_weights(1)
    weights, digest = receive(group, manifest)
    ray.get(joined, timeout=30)
    assert ray.get(sent[0], timeout=30) == digest
    assert_same(weights, start)


def test_driver_collects_the_scores_of_all_ranks(learner: tuple[DeepSpeedLearner, Path]) -> None:
    source, _ = learner
    scored = {item.key: item for item in source.score(BATCHES[0])}
    assert {key: len(item.divergence) for key, item in scored.items()} == {
        s.key: len(s.route_positions) for s in BATCHES[0].sequences if len(s.route_positions)
    }
    assert source.gradient_parts(BATCHES[0]) == {}  # ZeRO-3


def test_driver_reports_metrics_over_all_ranks(learner: tuple[DeepSpeedLearner, Path], model_path: str) -> None:
    source, _ = learner
    metrics = source.train_step(BATCHES[0])
    weights, losses, norms = reference(model_path, BATCHES)
    assert metrics["loss/total"] == pytest.approx(losses[0], abs=TOLERANCE)
    assert metrics["learner/grad_norm"] == pytest.approx(norms[0], rel=1e-5)
    rows = [len(s.route_positions) for s in BATCHES[0].sequences]
    assert metrics["route/key/rows"] + metrics["route/error/rows"] == sum(rows) == 6
    assert metrics["learner/learning_rate"] == 1e-3 and metrics["learner/num_micro_batches"] == 3
    assert 0 <= metrics["learner/padding_frac"] < 1 and metrics["learner/duration_s"] > 0
    assert 0 < metrics["mismatch/logprob_gap_mean_nats"] < metrics["mismatch/logprob_gap_max_nats"]
    source.train_step(BATCHES[1])
    assert gap(exported(source), weights) <= TOLERANCE


def test_driver_dumps_the_batch_of_a_failed_step(learner: tuple[DeepSpeedLearner, Path]) -> None:
    source, folder = learner
    broken = with_advantage(BATCHES[1], 0, float("nan"))
    with pytest.raises(TrainingError, match=r"step 1, .* is not finite .*; the batch is in .*step_000001\.pt"):
        source.train_step(broken)
    dump = torch.load(folder / "dumps" / "step_000001.pt", weights_only=False)
    assert "not finite" in dump["reason"] and np.isnan(dump["batch"].sequences[0].advantages).all()
    with pytest.raises(TrainingError, match="refuses to save"):
        source.save(folder / "checkpoint")
    assert not (folder / "checkpoint").exists()


def test_driver_names_a_rank_that_died(learner: tuple[DeepSpeedLearner, Path]) -> None:
    import ray

    source, _ = learner
    ray.kill(source._ranks[1])
    with pytest.raises(WorkerError, match="learner rank 1 died while calling canary_logprobs"):
        source.canary_logprobs([(1, 2, 3)])


def test_driver_names_ranks_that_are_late(local_ray: None, model_path: str, tmp_path: Path) -> None:
    config = run_config(model_path)
    config = config.model_copy(update={"placement": config.placement.model_copy(update={"start_timeout_s": 0.05})})
    with pytest.raises(WorkerError, match=r"learner rank 0 did not finish starting within 0\.05 s"):
        DeepSpeedLearner(config, tmp_path)
