import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trace_rl.batch import RolloutKey, TrainingBatch, TrainingSequence
from trace_rl.config.run import RunConfig
from trace_rl.errors import CheckpointError
from trace_rl.workers.checkpoint import Layout, restore_rng_states, rng_states
from trace_rl.workers.checkpoint_files import seal
from trace_rl.workers.checkpoint_state import read_state, write_state
from trace_rl.workers.learner import DeepSpeedLearner
from trace_rl.workers.learner_parts import Part, set_steps

PARAMETER = "layer.weight"


def stepped(values: list[float], steps: int) -> tuple[torch.Tensor, torch.optim.AdamW]:
    """What AdamW has stepped so often, with moments that tell the values apart."""
    flat = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.AdamW([flat])
    set_steps(optimizer, flat, steps)
    if steps:
        optimizer.state[flat]["exp_avg"] += flat.detach() / 10
        optimizer.state[flat]["exp_avg_sq"] += flat.detach() / 100
    return flat, optimizer


def part(flat: torch.Tensor, start: int, offset: int, count: int, name: str = PARAMETER) -> Part:
    """`count` values of a parameter from `start` on, which lie in `flat` from `offset` on."""
    return Part(name, start, flat.detach().narrow(0, offset, count), flat, offset, is_written=True)


def test_stretches_of_two_ranks_are_put_together_for_another_cut(tmp_path: Path) -> None:
    # parameter 0 1 2 3 4 5 6; rank 0 wrote the first three behind two values of another one, rank 1 the other four
    first, optimizer = stepped([90, 91, 0, 1, 2], steps=3)
    write_state(tmp_path, [part(first, 0, 0, 2, "other"), part(first, 0, 2, 3)], optimizer, rank=0)
    second, optimizer = stepped([3, 4, 5, 6], steps=3)
    write_state(tmp_path, [part(second, 3, 0, 4)], optimizer, rank=1)
    for start, count in ((0, 7), (1, 4), (2, 1), (4, 3)):
        flat, optimizer = stepped([-1.0] * (count + 1), steps=0)  # one value of padding
        read_state(tmp_path, [part(flat, start, 0, count)], optimizer)
        expected = torch.arange(start, start + count, dtype=torch.float32)
        state = optimizer.state[flat]
        assert torch.equal(flat.detach()[:-1], expected)
        assert torch.equal(state["exp_avg"][:-1], expected / 10) and torch.equal(
            state["exp_avg_sq"][:-1], expected / 100
        )
        assert (state["step"], flat.detach()[-1], state["exp_avg"][-1]) == (3, -1, 0)


def test_many_values_go_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trace_rl.workers.checkpoint_state._FILE_BYTES", 50)
    flat, optimizer = stepped([1, 2, 3, 4], steps=2)
    parts = [part(flat, 0, index, 1, f"p{index}") for index in range(4)]
    # a value is 12 bytes with its moments, and 8 of the step: three fill a file
    assert [file.name for file in write_state(tmp_path, parts, optimizer, rank=0)] == [
        "state-0-0.safetensors",
        "state-0-1.safetensors",
    ]
    back, optimizer = stepped([0, 0, 0, 0], steps=0)
    read_state(tmp_path, [part(back, 0, index, 1, f"p{index}") for index in range(4)], optimizer)
    assert torch.equal(back, flat)


def test_a_state_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    flat, optimizer = stepped([1, 2], steps=0)
    write_state(tmp_path, [part(flat, 0, 0, 2)], optimizer, rank=0)
    back, optimizer = stepped([0, 0], steps=5)
    read_state(tmp_path, [part(back, 0, 0, 2)], optimizer)
    assert torch.equal(back, flat) and back not in optimizer.state


def test_values_that_no_rank_wrote_are_missed(tmp_path: Path) -> None:
    flat, optimizer = stepped([1, 2, 3], steps=1)
    write_state(tmp_path, [part(flat, 0, 0, 3)], optimizer, rank=0)
    more, optimizer = stepped([0, 0, 0, 0], steps=0)
    with pytest.raises(CheckpointError, match=r"holds 3 of the values 0 to 4 of layer\.weight \(weight\)"):
        read_state(tmp_path, [part(more, 0, 0, 4)], optimizer)
    (tmp_path / "state-0-0.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"state-0-0\.safetensors cannot be read"):
        read_state(tmp_path, [part(more, 0, 0, 3)], optimizer)


def test_parameters_of_different_steps_go_on_apart_only(tmp_path: Path) -> None:
    # under ZeRO-0 a parameter without a gradient is not stepped
    for rank, (name, steps) in enumerate((("a", 2), ("b", 0))):
        flat, optimizer = stepped([1, 2], steps)
        write_state(tmp_path, [part(flat, 0, 0, 2, name)], optimizer, rank)
    both, optimizer = stepped([0, 0, 0, 0], steps=0)
    with pytest.raises(CheckpointError, match=r"taken 0 steps with b, but 2 with others.*zero_stage=0"):
        read_state(tmp_path, [part(both, 0, 0, 2, "a"), part(both, 0, 2, 2, "b")], optimizer)
    first, second = (torch.zeros(2, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([first, second])
    read_state(tmp_path, [part(first, 0, 0, 2, "a"), part(second, 0, 0, 2, "b")], optimizer)
    assert optimizer.state[first]["step"] == 2 and second not in optimizer.state


def test_another_model_or_meaning_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schedule = SimpleNamespace(last_epoch=4)
    engine = SimpleNamespace(module=torch.nn.Linear(3, 2), lr_scheduler=schedule)
    layout = Layout({"model.dtype": "float32"}, {"learner.world_size": 2})
    with pytest.raises(CheckpointError, match=r"holds no learner \(layout\.json is missing\)"):
        layout.check(tmp_path, engine)
    (tmp_path / "learner").mkdir()
    (tmp_path / "learner" / "layout.json").write_text(json.dumps(layout.as_json(engine)))
    assert layout.check(tmp_path, engine) == 4
    assert not caplog.messages
    assert Layout(layout.meaning, {"learner.world_size": 3}).check(tmp_path, engine) == 4
    assert "going on with {'learner.world_size': 3} from a checkpoint that was written with" in caplog.text
    with pytest.raises(CheckpointError, match=r"model\.dtype = float32, but this run has bfloat16.*model\.path=.*hf"):
        Layout({"model.dtype": "bfloat16"}, layout.spread).check(tmp_path, engine)
    engine.module = torch.nn.Linear(3, 4)
    with pytest.raises(
        CheckpointError, match=r"weight of shape \[2, 3\], but the model of this run has it of.* \[4, 3\]"
    ):
        layout.check(tmp_path, engine)


def test_rng_states_go_back() -> None:
    import random

    random.gauss(0, 1)  # python and numpy keep the second of a pair
    np.random.normal()
    states = json.loads(json.dumps(rng_states()))

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), float(torch.rand(()))]

    drawn = draw()
    restore_rng_states(states)
    assert drawn == draw()


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
    written = learner.save(path)
    assert written == seal(path, [file for file in path.rglob("*") if file.is_file()])
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

    assert sorted(path.relative_to(path.parents[1]).as_posix() for path in (path / "learner").iterdir()) == [
        "learner/layout.json",
        "learner/rng-0.json",
        "learner/state-0-0.safetensors",
    ]
    resumed.close()
