"""The teacher's rows against a plain forward of the same model, and when the driver refreshes it."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trace_rl.batch import RolloutKey, TeacherRequest
from trace_rl.config.roles import Model, TeacherWeights
from trace_rl.config.roles import Teacher as TeacherSettings
from trace_rl.errors import CheckpointError
from trace_rl.workers.teacher import RayTeacher, TeacherModel


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("teacher")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(model_folder):
    model = Model(path=str(model_folder), dtype="float32")
    return TeacherModel(model, TeacherSettings(max_tokens_per_batch=64))


def request(sample, prompt, response, positions):
    return TeacherRequest(RolloutKey("p", sample), tuple(prompt), tuple(response), np.array(positions))


def test_rows_give_the_logits_of_a_plain_forward(teacher, model_folder):
    model = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    prompt, response, positions = [5, 6, 7, 8], [10, 11, 12, 13, 14], [0, 2, 4]
    (rows,) = teacher.score([request(0, prompt, response, positions)])
    logits = torch.from_numpy(rows.hidden) @ teacher.head().T
    with torch.no_grad():
        expected = model(torch.tensor([prompt + response])).logits[0]
    # response token t stands at index 4 + t and is predicted at 3 + t
    torch.testing.assert_close(logits, expected[[3, 5, 7]], atol=1e-5, rtol=0)


def test_batching_and_padding_change_nothing_and_order_is_kept(teacher):
    random = np.random.default_rng(0)
    requests = [
        request(i, random.integers(0, 97, 3 + i), random.integers(0, 97, 4 + 5 * (i % 3)), [1, 3]) for i in range(7)
    ]
    together = teacher.score(requests)
    assert [rows.key.sample for rows in together] == list(range(7))
    for one, rows in zip(requests, together, strict=True):
        np.testing.assert_allclose(teacher.score([one])[0].hidden, rows.hidden, atol=1e-5)


def test_loaded_weights_and_saved_weights_are_what_is_scored_with(teacher, tmp_path):
    one = request(0, [1, 2], [3, 4], [0, 1])
    before = teacher.score([one])[0].hidden
    teacher.save(tmp_path)
    teacher.load_bucket({"model.norm.weight": torch.full((64,), 2.0)})
    np.testing.assert_allclose(teacher.score([one])[0].hidden, 2 * before, rtol=1e-5)
    teacher.load(tmp_path)
    np.testing.assert_array_equal(teacher.score([one])[0].hidden, before)


def test_a_checkpoint_without_a_teacher_is_refused_by_name(teacher, tmp_path):
    with pytest.raises(CheckpointError, match="holds no copy of the teacher"):
        teacher.load(tmp_path)


class Actor:
    """Answers like a Ray actor whose calls are done at once."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        class Method:
            @staticmethod
            def remote(*args):
                self.calls.append(name)
                return name

        return Method


class Source:
    def __init__(self):
        self.heads = 0

    def export_state(self):
        yield "bucket 0"
        yield "bucket 1"

    def set_teacher_head(self, head):
        self.heads += 1


@pytest.mark.parametrize(
    ("weights", "copies", "heads"),
    [
        (TeacherWeights(type="live"), [0, 1, 2, 3, 4], 5),
        (TeacherWeights(type="periodic", every=2), [0, 2, 4], 3),
        (TeacherWeights(type="frozen"), [], 1),
    ],
)
def test_refresh_follows_the_weights_policy(monkeypatch, weights, copies, heads):
    monkeypatch.setattr("trace_rl.workers.teacher.wait_for", lambda ref, *_: ref)
    actor, source = Actor(), Source()
    teacher = RayTeacher(actor, source, weights, timeout_s=1.0)
    assert [step for step in range(5) if teacher.refresh(step)] == copies
    assert source.heads == heads
    assert actor.calls.count("load_bucket") == 2 * len(copies)


def test_nothing_is_sent_without_requests():
    actor = Actor()
    assert RayTeacher(actor, Source(), TeacherWeights(), timeout_s=1.0).score([]) == []
    assert actor.calls == []


def test_a_resumed_teacher_ships_its_head_again(monkeypatch, tmp_path):
    monkeypatch.setattr("trace_rl.workers.teacher.wait_for", lambda ref, *_: ref)
    source = Source()
    teacher = RayTeacher(Actor(), source, TeacherWeights(type="periodic", every=10), timeout_s=1.0)
    teacher.refresh(0)
    teacher.load(tmp_path)
    assert not teacher.refresh(3)
    assert source.heads == 2
