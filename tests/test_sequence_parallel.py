"""Ranks that share sequences, on real DeepSpeed engines, against plain torch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from learner_harness import BATCHES, Group, Weights, gap, load, reference, run_config

from trace_rl.batch import TokenStatistics, TrainingBatch
from trace_rl.errors import ConfigError
from trace_rl.workers.learner import learner_spec

pytestmark = pytest.mark.engine

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def expected(model_path: str) -> tuple[Weights, list[float], list[float]]:
    return reference(model_path, BATCHES)


@pytest.fixture(scope="module")
def group(local_ray: None) -> Iterator[Group]:
    """Two processes of their own: sharing sequences replaces the attention of a process."""
    started = Group(2)
    yield started
    started.close()


def shared(model_path: str, **learner: Any) -> Any:
    return learner_spec(run_config(model_path, sequence_parallel=2, **{"world_size": 2, **learner}))


@pytest.mark.parametrize("settings", [{"zero_stage": 2}, {"zero_stage": 3, "gradient_checkpointing": True}], ids=str)
def test_steps_equal_plain_torch(group: Group, model_path: str, expected: Any, settings: dict[str, Any]) -> None:
    weights, losses, norms = expected
    group.build(shared(model_path, **settings))
    assert group.loss(BATCHES[0]) == pytest.approx(losses[0], abs=TOLERANCE)
    (report,) = group.train(BATCHES[1:])
    assert report.grad_norms == pytest.approx(norms[1:], rel=1e-5)
    # one sequence a micro-batch without flash attention, and each is filled up to an even number of positions
    assert report.num_micro_batches == len(BATCHES[1].sequences)
    assert gap(group.weights(), weights) <= TOLERANCE


def test_old_logprobs_are_those_of_the_stretch(group: Group, model_path: str) -> None:
    group.build(shared(model_path, zero_stage=2, minibatches_per_step=2))
    group.train(BATCHES)
    assert gap(group.weights(), reference(model_path, BATCHES, num_minibatches=2)[0]) <= TOLERANCE


def test_canary_logprobs_are_the_models(group: Group, model_path: str) -> None:
    model = load(model_path)
    sequences = [(3, 7, 11, 200), (5, 6), (299, 1, 0, 44, 2, 9)]
    for found in group.build(shared(model_path, zero_stage=3)).all("call", "canary_logprobs", sequences):
        for ids, logprobs in zip(sequences, found, strict=True):
            with torch.no_grad():
                rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert logprobs == pytest.approx([float(rows[t, ids[t + 1]]) for t in range(len(ids) - 1)], abs=1e-5)


def test_scores_are_those_of_a_rank_alone(group: Group, groups: dict[int, Group], model_path: str) -> None:
    found = by_key(group.build(shared(model_path, zero_stage=2)).all("call", "score", BATCHES[0]))
    alone = by_key(groups[1].build(learner_spec(run_config(model_path))).all("call", "score", BATCHES[0]))
    assert found.keys() == alone.keys() and len(found) == 3
    for key, item in found.items():
        for name in ("policy_entropy", "divergence", "policy_logprobs", "teacher_logprobs"):
            assert getattr(item, name).tolist() == pytest.approx(getattr(alone[key], name).tolist(), abs=1e-5)


def by_key(ranks: list[list[TokenStatistics]]) -> dict[Any, TokenStatistics]:
    items = [item for rank in ranks for item in rank]
    found = {(item.key, item.route): item for item in items}
    assert len(found) == len(items)  # each once
    return found


def test_two_pairs_divide_the_sequences(local_ray: None, model_path: str, expected: Any) -> None:
    group = Group(4)
    try:
        group.build(shared(model_path, world_size=4, zero_stage=3))
        report = group.train(BATCHES)[1]
        assert report.num_micro_batches == -(-len(BATCHES[1].sequences) // 2)
        assert gap(group.weights(), expected[0]) <= TOLERANCE
        assert len(by_key(group.all("call", "score", TrainingBatch(0, BATCHES[0].sequences)))) == 3
    finally:
        group.close()


def test_a_loss_of_whole_sequences_is_refused(model_path: str) -> None:
    config = run_config(model_path, sequence_parallel=2, world_size=2)
    correction = config.algorithm.rollout_correction.model_copy(update={"level": "sequence"})
    algorithm = config.algorithm.model_copy(update={"rollout_correction": correction})
    with pytest.raises(ConfigError, match=r"sequence_parallel is 2, but .* set it to 1"):
        learner_spec(config.model_copy(update={"algorithm": algorithm}))


def test_ranks_that_cannot_share_evenly_are_refused(model_path: str) -> None:
    with pytest.raises(ValueError, match=r"does not divide learner\.world_size = 3"):
        run_config(model_path, sequence_parallel=2, world_size=3)
    with pytest.raises(ValueError, match=r"set learner\.layout=auto"):
        run_config(model_path, sequence_parallel=2, world_size=2, layout="padded")
