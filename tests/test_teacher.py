"""The teacher's rows against a plain forward of the same model, and when the driver refreshes it."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trace_rl.batch import RolloutKey, TeacherRequest, TeacherRows
from trace_rl.config.roles import Model
from trace_rl.config.teacher import Ema, External, Frozen, Live, Periodic, TrustRegion
from trace_rl.config.teacher import Teacher as TeacherSettings
from trace_rl.errors import CheckpointError, DeadlineError, ModelError, WorkerError
from trace_rl.flops import TeacherCost, TransformerShape
from trace_rl.states import BFLOAT16, states_tensor
from trace_rl.token_layout import Padded
from trace_rl.workers.policy_model import final_hidden
from trace_rl.workers.revival import RestartedError
from trace_rl.workers.teacher import RayTeacher, TeacherModel

VOCAB = 97


def make_model(folder, seed=0, vocab_size=VOCAB):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make_model(folder)
    return folder


def make_teacher(folder, weights, dtype="float32", states="model"):
    model = Model(path=str(folder), dtype=dtype)
    return TeacherModel(model, TeacherSettings(max_tokens_per_batch=64, weights=weights, states=states), VOCAB)


@pytest.fixture
def teacher(model_folder):
    return make_teacher(model_folder, Periodic())


def request(sample, prompt, response, positions, outputs=("states",), temperature=1.0):
    return TeacherRequest(
        RolloutKey("p", sample),
        0,
        tuple(prompt),
        tuple(response),
        np.array(positions),
        frozenset(outputs),
        temperature,
    )


def logits_of(model, prompt, response):
    with torch.no_grad():
        return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


PROMPT, RESPONSE = [5, 6, 7, 8], [10, 11, 12, 13, 14]


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


class Reads:
    """Positions that a model's layers compute, by pass."""

    def __init__(self, model):
        self.positions = []
        model.get_decoder().register_forward_pre_hook(
            lambda _, args, given: self.positions.append(given["input_ids"].numel()), with_kwargs=True
        )


@pytest.mark.parametrize("weights", [Periodic(), TrustRegion()], ids=["one_model", "two_models"])
def test_a_prompt_that_several_samples_have_is_read_once(model_folder, weights):
    teacher, random = make_teacher(model_folder, weights), np.random.default_rng(1)
    prompts = [random.integers(0, 97, length) for length in (9, 12, 4)]
    # group sizes 4, 3 and 1: the last has nothing to share; a prompt of one token, twice, has nothing either
    requests = [
        request(number, prompt, random.integers(0, 97, length), positions, ("states", "logprobs", "entropy"))
        for number, (prompt, length, positions) in enumerate(
            [
                (prompts[0], 6, [0, 5]),
                (prompts[1], 7, [6]),
                (prompts[0], 1, [0]),
                (prompts[2], 3, [1, 2]),
                (prompts[1], 5, [0, 1, 4]),
                (prompts[0], 10, [2, 9]),
                (prompts[1], 2, [1]),
                (prompts[0], 8, [7]),
                ([3], 3, [0, 2]),
                ([3], 4, [3]),
            ]
        )
    ]
    reads = [Reads(model) for model in teacher._models]
    together = teacher.score(requests)
    sizes = [sum(each.positions) for each in reads]
    assert [rows.key.sample for rows in together] == list(range(10))
    for one, rows in zip(requests, together, strict=True):
        (alone,) = teacher.score([one])
        np.testing.assert_array_equal(rows.positions, one.positions)
        for name in ("hidden", "logprobs", "entropy"):
            np.testing.assert_allclose(getattr(rows, name), getattr(alone, name), atol=2e-5)
    # 8 + 7 + 2 + 11 + 9 behind the first prompt, 11 + 8 + 6 + 3 behind the second, 7 alone, and 4 + 5
    assert sizes == [81] * len(sizes)


def test_loaded_weights_and_saved_weights_are_what_is_scored_with(teacher, tmp_path):
    one = request(0, [1, 2], [3, 4], [0, 1])
    before = teacher.score([one])[0].hidden
    teacher.save(tmp_path)
    teacher.load_bucket({"model.norm.weight": torch.full((64,), 2.0)}, 1.0)
    np.testing.assert_allclose(teacher.score([one])[0].hidden, 2 * before, rtol=1e-5)
    teacher.load(tmp_path)
    np.testing.assert_array_equal(teacher.score([one])[0].hidden, before)


def test_a_checkpoint_without_a_teacher_is_refused_by_name(teacher, tmp_path):
    with pytest.raises(CheckpointError, match="holds no copy of the teacher"):
        teacher.load(tmp_path)


class Actor:
    """Answers like a Ray actor whose calls are done at once, and that dies as often as it is told to."""

    def __init__(self):
        self.calls, self.present_life, self.deaths, self.is_late = [], 0, [], False

    @property
    def in_life(self):
        actor = self

        class Method:
            @staticmethod
            def remote(life, method, *args):
                return actor.call(life, method, *args)

        return Method

    def call(self, life, method, *args):
        self.calls.append(method)
        if method in self.deaths:
            self.deaths.remove(method)
            self.present_life += 1
            return WorkerError("the teacher died")
        if self.is_late:
            return DeadlineError("the teacher did not finish scoring")
        if life != self.present_life:
            return RestartedError("the teacher was started again")
        return [rows_of(request) for request in args[0]] if method == "score" else method


def rows_of(request):
    """What a teacher could say."""
    sizes = [len(request.positions) if name in request.outputs else 0 for name in ("states", "logprobs", "entropy")]
    return TeacherRows(
        request.key, request.view, request.positions, np.ones((sizes[0], 2)), np.ones(sizes[1]), np.ones(sizes[2])
    )


@pytest.fixture
def at_once(monkeypatch):
    """Ray, as far as `Actor` needs it."""

    def wait_for(answer, *_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("trace_rl.workers.teacher.wait_for", wait_for)
    monkeypatch.setattr("trace_rl.workers.teacher.life_of", lambda actor, *_: actor.present_life)


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
        (Live(), [0, 1, 2, 3, 4], 5),
        (Periodic(every=2), [0, 2, 4], 3),
        (Frozen(), [], 1),
        (Ema(), [0, 1, 2, 3, 4], 5),
        (TrustRegion(), [0, 1, 2, 3, 4], 5),
        (External(path="x"), [], 1),
    ],
    ids=lambda value: getattr(value, "type", None),
)
def test_refresh_follows_the_weights_policy(at_once, weights, copies, heads):
    actor, source = Actor(), Source()
    teacher = RayTeacher(actor, source, weights, timeout_s=1.0)
    one = request(0, PROMPT, RESPONSE, [0])
    refreshed = []
    for step in range(5):
        refreshed += [step] if teacher.refresh(step) else []
        teacher.score([one])
    assert refreshed == copies
    assert source.heads == heads
    assert actor.calls.count("load_bucket") == 2 * len(copies)


def test_nothing_is_sent_without_requests(at_once):
    actor = Actor()
    assert RayTeacher(actor, Source(), Periodic(), timeout_s=1.0).score([]) == []
    assert actor.calls == []


def test_no_head_is_shipped_where_no_states_are_read(at_once):
    source = Source()
    teacher = RayTeacher(Actor(), source, Live(), timeout_s=1.0)
    teacher.refresh(0)
    teacher.score([request(0, PROMPT, RESPONSE, [0], outputs=("logprobs",))])
    assert source.heads == 0


@pytest.mark.parametrize("weights", [Live(), Periodic(every=10), TrustRegion()], ids=lambda value: value.type)
@pytest.mark.parametrize("dies_in", ["load_bucket", "score"])
def test_a_teacher_that_dies_gets_the_policy_and_does_its_work_again(at_once, weights, dies_in):
    actor, source = Actor(), Source()
    teacher = RayTeacher(actor, source, weights, timeout_s=1.0)
    teacher.refresh(0)
    teacher.score([request(0, PROMPT, RESPONSE, [0])])
    actor.calls.clear()
    actor.deaths = [dies_in]
    teacher.refresh(10)
    assert len(teacher.score([request(0, PROMPT, RESPONSE, [0])])) == 1
    whole = ["load_bucket", "load_bucket"]
    assert actor.calls == (["load_bucket", *whole, "head", "score"] if dies_in == "load_bucket" else
                           [*whole, "head", "score", *whole, "head", "score"])  # fmt: skip


def test_a_teacher_that_died_unseen_is_not_taken_for_the_one_before(at_once):
    actor = Actor()
    teacher = RayTeacher(actor, Source(), Live(), timeout_s=1.0)
    teacher.refresh(0)
    actor.present_life += 1
    teacher.score([request(0, PROMPT, RESPONSE, [0])])
    assert actor.calls == 2 * ["load_bucket", "load_bucket", "head", "score"]


def test_start_weights_come_back_by_themselves(at_once):
    actor = Actor()
    teacher = RayTeacher(actor, Source(), Frozen(), timeout_s=1.0)
    actor.deaths = ["score", "score"]
    teacher.score([request(0, PROMPT, RESPONSE, [0])])
    assert actor.calls == ["head", "score"] * 3


@pytest.mark.parametrize("weights", [Periodic(every=10), Ema()], ids=lambda value: value.type)
def test_a_copy_that_only_the_teacher_had_is_lost_with_it(at_once, weights):
    actor = Actor()
    teacher = RayTeacher(actor, Source(), weights, timeout_s=1.0)
    teacher.refresh(0)
    teacher.refresh(1)
    actor.deaths = ["score"]
    with pytest.raises(WorkerError, match=rf"the teacher died; its copy of the policy \(.*{weights.type}\) was in its"):
        teacher.score([request(0, PROMPT, RESPONSE, [0])])


def test_a_checkpoint_never_holds_a_later_policy_in_place_of_the_copy(at_once, tmp_path):
    actor = Actor()
    teacher = RayTeacher(actor, Source(), Periodic(every=10), timeout_s=1.0)
    teacher.refresh(0)
    teacher.score([request(0, PROMPT, RESPONSE, [0])])
    actor.calls.clear()
    actor.deaths = ["save"]  # the learner has trained meanwhile
    with pytest.raises(WorkerError, match="its copy of the policy"):
        teacher.save(tmp_path)
    assert actor.calls == ["save"]


def test_a_teacher_that_is_late_is_named_and_not_waited_for_again(at_once):
    actor = Actor()
    teacher = RayTeacher(actor, Source(), Frozen(), timeout_s=1.0)
    actor.is_late = True
    with pytest.raises(DeadlineError, match="did not finish scoring"):
        teacher.score([request(0, PROMPT, RESPONSE, [0])])


def test_the_actor_refuses_work_of_another_life(teacher):
    assert teacher.in_life(teacher.life(), "ready") is True
    with pytest.raises(RestartedError, match="was started again"):
        teacher.in_life("another", "ready")


def test_a_resumed_teacher_ships_its_head_again(at_once, tmp_path):
    source = Source()
    teacher = RayTeacher(Actor(), source, Periodic(every=10), timeout_s=1.0)
    one = request(0, PROMPT, RESPONSE, [0])
    teacher.refresh(0)
    teacher.score([one])
    teacher.load(tmp_path)
    assert not teacher.refresh(3)
    teacher.score([one])
    assert source.heads == 2


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_logprobs_and_entropy_are_those_of_a_plain_forward(teacher, model_folder, temperature):
    model = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    logprobs = torch.log_softmax(logits_of(model, PROMPT, RESPONSE) / temperature, -1)[[0, 2, 4]]
    (rows,) = teacher.score([request(0, PROMPT, RESPONSE, [0, 2, 4], ("logprobs", "entropy"), temperature)])
    assert rows.hidden.shape[0] == 0
    np.testing.assert_allclose(rows.logprobs, logprobs[[0, 1, 2], [10, 12, 14]], atol=1e-5)
    np.testing.assert_allclose(rows.entropy, -(logprobs.exp() * logprobs).sum(-1), atol=1e-5)


def test_only_what_is_asked_for_is_returned(teacher):
    (states,) = teacher.score([request(0, PROMPT, RESPONSE, [1, 2])])
    assert (len(states.hidden), len(states.logprobs), len(states.entropy)) == (2, 0, 0)
    (entropy,) = teacher.score([request(0, PROMPT, RESPONSE, [1, 2], ("entropy",))])
    assert (len(entropy.hidden), len(entropy.logprobs), len(entropy.entropy)) == (0, 0, 2)


def test_an_average_is_the_closed_form_in_float32(model_folder, tmp_path):
    # phi_2 = (1 - r)^2 phi_0 + r (1 - r) theta_1 + r theta_2
    rate, teacher = 0.05, make_teacher(model_folder, Ema(rate=0.05))
    start = dict(teacher._models[0].state_dict())["model.norm.weight"].clone()
    first, second = torch.full((64,), 3.0), torch.full((64,), -1.0)
    for theta in (first, second):
        teacher.load_bucket({"model.norm.weight": theta}, rate)
    expected = (1 - rate) ** 2 * start + rate * (1 - rate) * first + rate * second
    torch.testing.assert_close(dict(teacher._models[0].state_dict())["model.norm.weight"], expected)
    teacher.save(tmp_path)
    resumed = make_teacher(model_folder, Ema(rate=0.05))
    resumed.load(tmp_path)
    one = request(0, PROMPT, RESPONSE, [0, 3])
    np.testing.assert_array_equal(resumed.score([one])[0].hidden, teacher.score([one])[0].hidden)
    for each in (teacher, resumed):
        each.load_bucket({"model.norm.weight": first}, rate)
    np.testing.assert_array_equal(resumed.score([one])[0].hidden, teacher.score([one])[0].hidden)


def test_a_small_rate_is_not_rounded_away_in_bfloat16(model_folder):
    model = Model(path=str(model_folder), dtype="bfloat16")
    teacher = TeacherModel(model, TeacherSettings(weights=Ema(rate=0.001)), VOCAB)
    for _ in range(1000):  # 1 -> 2 - 0.999^1000 = 1.632; each step is below half of bfloat16's spacing near 1
        teacher.load_bucket({"model.norm.weight": torch.full((64,), 2.0)}, 0.001)
    found = teacher._models[0].state_dict()["model.norm.weight"].float()
    torch.testing.assert_close(found, torch.full((64,), 2 - 0.999**1000), rtol=0, atol=0.01)


def test_a_trust_region_mixes_logits(model_folder, tmp_path):
    start = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    live = make_model(tmp_path / "live", seed=1).float().eval()
    teacher = make_teacher(model_folder, TrustRegion(mix=0.25))
    teacher.load_bucket(dict(live.named_parameters()), 1.0)
    expected = 0.75 * logits_of(start, PROMPT, RESPONSE) + 0.25 * logits_of(live, PROMPT, RESPONSE)
    (rows,) = teacher.score([request(0, PROMPT, RESPONSE, range(5), ("states", "logprobs"))])
    torch.testing.assert_close(torch.from_numpy(rows.hidden) @ teacher.head().T, expected, atol=1e-5, rtol=0)
    logprobs = torch.log_softmax(expected, -1)[range(5), RESPONSE]
    np.testing.assert_allclose(rows.logprobs, logprobs, atol=1e-5)


def test_an_external_teacher_is_another_model_and_its_padding_is_cut(model_folder, tmp_path):
    other = make_model(tmp_path, seed=2, vocab_size=VOCAB + 7).eval()
    teacher = make_teacher(model_folder, External(path=str(tmp_path)))
    assert teacher.head().shape == (VOCAB, 64)
    (rows,) = teacher.score([request(0, PROMPT, RESPONSE, [1], ("states", "logprobs"))])
    expected = logits_of(other, PROMPT, RESPONSE)[1, :VOCAB]
    torch.testing.assert_close(torch.from_numpy(rows.hidden[0]) @ teacher.head().T, expected, atol=1e-5, rtol=0)
    assert rows.logprobs[0] == pytest.approx(torch.log_softmax(expected, -1)[11].item(), abs=1e-5)


def test_a_teacher_with_a_smaller_vocabulary_is_refused(model_folder, tmp_path):
    make_model(tmp_path, vocab_size=VOCAB - 1)
    with pytest.raises(ModelError, match=r"teacher\.weights\.path.*96 rows, fewer than the 97"):
        make_teacher(model_folder, External(path=str(tmp_path)))


@pytest.mark.parametrize("weights", [Live(), Frozen(), TrustRegion()], ids=lambda weights: weights.type)
def test_what_can_be_made_again_is_not_saved(model_folder, tmp_path, weights):
    teacher = make_teacher(model_folder, weights)
    teacher.save(tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()
    teacher.load(tmp_path / "teacher")


def test_a_checkpoint_of_other_weights_is_refused(model_folder, tmp_path):
    moving = make_teacher(model_folder, Periodic())
    moving.load_bucket({"model.norm.weight": torch.full((64,), 2.0)}, 1.0)
    moving.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"teacher\.weights\.type = frozen"):
        make_teacher(model_folder, Frozen()).load(tmp_path)


@torch.no_grad()
def states_of(model, prompt, response):
    """Of the tokens of the response, in the model's precision."""
    return final_hidden(model, Padded().grid([tuple(prompt + response)]))[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("weights", [Frozen(), Ema()], ids=lambda weights: weights.type)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_states_are_shipped_as_they_were_computed(model_folder, weights, dtype, size):
    teacher = make_teacher(model_folder, weights, dtype)
    model = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype)).eval()
    asked = request(0, PROMPT, RESPONSE, [0, 2, 4])
    (rows,), ((computed,),) = teacher.score([asked]), teacher._reader.read([asked])
    found = states_tensor(rows.hidden)
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, computed)
    torch.testing.assert_close(found, states_of(model, PROMPT, RESPONSE)[[0, 2, 4]])  # other sizes, other rounding
    assert rows.hidden.nbytes == 3 * 64 * size


def test_a_mix_in_bfloat16_ships_the_states_that_it_reads_itself(model_folder):
    teacher = make_teacher(model_folder, TrustRegion(mix=0.3), "bfloat16")
    model = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    (rows,) = teacher.score([request(0, PROMPT, RESPONSE, [1, 3])])
    states = states_of(model, PROMPT, RESPONSE)[[1, 3]]
    # products of bfloat16 numbers, rounded once
    expected = torch.cat([(0.7 * states.double()).bfloat16(), (0.3 * states.double()).bfloat16()], -1)
    assert torch.equal(states_tensor(rows.hidden), expected)
    assert rows.hidden.nbytes == 2 * 128 * 2


def test_a_float32_teacher_may_ship_half_the_bytes(model_folder):
    exact, rounded = (make_teacher(model_folder, Frozen(), states=states) for states in ("model", "bfloat16"))
    one = request(0, PROMPT, RESPONSE, [0, 3], ("states", "logprobs"))
    (full,), (half,) = exact.score([one]), rounded.score([one])
    assert torch.equal(states_tensor(half.hidden), states_tensor(full.hidden).bfloat16())
    assert half.hidden.nbytes * 2 == full.hidden.nbytes
    np.testing.assert_array_equal(half.logprobs, full.logprobs)  # taken before anything is rounded


def test_states_that_were_not_asked_for_take_no_bytes(model_folder):
    teacher = make_teacher(model_folder, Frozen(), "bfloat16")
    (rows,) = teacher.score([request(0, PROMPT, RESPONSE, [0, 3], ("logprobs",))])
    assert rows.hidden.dtype == BFLOAT16 and rows.hidden.shape == (0, 64) and rows.hidden.nbytes == 0


@pytest.mark.parametrize(("weights", "num_models"), [(Frozen(), 1), (TrustRegion(), 2)])
def test_the_shape_is_that_of_each_model(model_folder, weights, num_models):
    # a layer: queries 64 x 64, keys and values 2 x 64 x 32, output 64 x 64, MLP 3 x 64 x 96, norms 2 x 64 + 2 x 32;
    # and the last norm; queries, output and MLP of the last layer are for tokens that are read
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64 + 2 * 32
    expected = TransformerShape(
        2 * layer + 64,
        num_layers=2,
        attention_width=64,
        hidden=64,
        vocab=VOCAB,
        num_read_parameters=64 * 64 + 64 * 64 + 3 * 64 * 96,
    )
    assert make_teacher(model_folder, weights).cost() == TeacherCost((expected,) * num_models, shared_within=64)
