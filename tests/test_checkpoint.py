import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trace_rl.batch import RolloutKey, TrainingBatch, TrainingSequence
from trace_rl.config.run import RunConfig
from trace_rl.errors import CheckpointError
from trace_rl.workers.checkpoint import check_layout, published, restore_rng_states, rng_states
from trace_rl.workers.learner import DeepSpeedLearner

LAYOUT = {"learner.world_size": 2, "learner.zero_stage": 3}


def write_layout(folder: Path, layout: dict[str, Any]) -> None:
    (folder / "learner").mkdir(parents=True)
    (folder / "learner" / "layout.json").write_text(json.dumps(layout))


def test_a_checkpoint_has_its_name_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "step-3"
    with pytest.raises(KeyboardInterrupt), published(target) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert not target.exists()
    for content in ("old", "new"):
        with published(target) as folder:
            assert list(folder.iterdir()) == []  # nothing is left of the killed one
            (folder / content).write_text(content)
    assert [file.name for file in target.iterdir()] == ["new"]
    assert list(target.parent.iterdir()) == [target]


def test_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    write_layout(tmp_path, LAYOUT)
    check_layout(tmp_path, LAYOUT)
    with pytest.raises(CheckpointError, match=r"learner\.world_size = 2, but this run has 4.*model\.path=.*hf"):
        check_layout(tmp_path, LAYOUT | {"learner.world_size": 4})
    with pytest.raises(CheckpointError, match=r"layout\.json is missing"):
        check_layout(tmp_path / "none", LAYOUT)


def test_rng_states_go_back() -> None:
    import random

    states = rng_states()
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
    restore_rng_states(states)
    assert drawn == [random.random(), np.random.rand(), float(torch.rand(()))]


def one_batch(step: int) -> TrainingBatch:
    random = np.random.default_rng(step)
    sequences = [
        TrainingSequence(
            key=RolloutKey("p", number),
            prompt_token_ids=tuple(random.integers(0, 300, 3).tolist()),
            token_ids=tuple(random.integers(0, 300, 6).tolist()),
            rollout_logprobs=-8 * random.random(6),
            staleness=np.zeros(6, dtype=np.int64),
            advantages=np.full(6, random.normal()),
            pg_weight=np.full(6, 1 / 24, dtype=np.float32),
            route_positions=np.zeros(0, dtype=np.int64),
            route_index=np.zeros(0, dtype=np.int64),
            route_weight=np.zeros(0, dtype=np.float32),
            teacher_row=np.zeros(0, dtype=np.int64),
            teacher_hidden=np.zeros((0, 0), dtype=np.float32),
        )
        for number in range(4)
    ]
    return TrainingBatch(step, tuple(sequences))


def weights_of(learner: DeepSpeedLearner) -> dict[str, torch.Tensor]:
    import ray

    return {name: weight for bucket in learner.export_state() for name, weight in ray.get(bucket).items()}


@pytest.mark.engine
def test_new_processes_go_on_bit_identically_and_hf_loads(
    local_ray: None, build_tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tmp_path / "model"
    build_tiny_model(source, tied=True)
    settings = json.loads((source / "generation_config.json").read_text()) | {"do_sample": False, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(settings))  # contradictory, as in published models
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    config = RunConfig.model_validate(
        {
            "model": {"path": str(source), "dtype": "float32"},
            "data": {"path": "unused"},
            "sampling": {"max_prompt_tokens": 16, "max_response_tokens": 16},
            "learner": {"optimizer": {"learning_rate": 1e-3}, "schedule": {"type": "linear"}},
            "placement": {"start_timeout_s": 120, "step_timeout_s": 60},
            "run": {"steps": 6},
        }
    )
    path = tmp_path / "checkpoints" / "step-2"
    learner = DeepSpeedLearner(config, tmp_path)
    for step in (0, 1):
        learner.train_step(one_batch(step))
    learner.save(path)
    saved = weights_of(learner)
    metrics = learner.train_step(one_batch(2))
    uninterrupted = weights_of(learner)
    learner.close()

    resumed = DeepSpeedLearner(config, tmp_path)
    resumed.load(path)
    assert all(torch.equal(saved[name], weight) for name, weight in weights_of(resumed).items())
    again = resumed.train_step(one_batch(2))
    assert all(torch.equal(uninterrupted[name], weight) for name, weight in weights_of(resumed).items())
    assert {name: value for name, value in metrics.items() if not name.endswith("_s")} == {
        name: value for name, value in again.items() if not name.endswith("_s")
    }

    model = AutoModelForCausalLM.from_pretrained(path / "hf", dtype="auto")
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
    assert model.generation_config.eos_token_id == list(range(1, 40))
    tokenizer = AutoTokenizer.from_pretrained(path / "hf")
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (path / "hf" / name).read_bytes() == (source / name).read_bytes()

    damaged = next((path / "learner" / "state").glob("*optim_states.pt"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be restored on learner rank 0"):
        resumed.load(path)
    resumed.close()
