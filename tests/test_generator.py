"""The generator against a Hugging Face model (log-probs, truncation, seeds, stop tokens); how failures are reported."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from trace_rl.annotation_prompts import Message
from trace_rl.batch import Prompt, Rollout, RolloutKey, RolloutRequest
from trace_rl.config.roles import GeneratorSettings, Model
from trace_rl.errors import WeightSyncError, WorkerError
from trace_rl.protocols import Decoding
from trace_rl.workers.chat import ChatFault, ChatRequest
from trace_rl.workers.generator import VllmGenerator, split_by_prompt
from trace_rl.workers.generator_engine import GeneratorEngine
from trace_rl.workers.generator_sampling import token_versions
from trace_rl.workers.life import new_life
from trace_rl.workers.revival import Lives
from trace_rl.workers.waiting import wait_for

DECODING = Decoding(temperature=0.7)
MAX_TOKENS = 24


def make_requests(num_prompts: int, samples: int, prompt_length: int = 20) -> list[RolloutRequest]:
    return [
        RolloutRequest(
            prompt=Prompt(f"p{number}", "question", "answer"),
            sample=sample,
            prompt_token_ids=tuple(40 + (7 * number + 3 * t) % 250 for t in range(prompt_length)),
            seed=1000 * number + sample,
        )
        for number in range(num_prompts)
        for sample in range(samples)
    ]


def hf_logprobs(model: Any, token_ids: Sequence[int], start: int, decoding: Decoding) -> np.ndarray:
    """log p(token_ids[t] | token_ids[:t]) for t >= start, computed by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([list(token_ids)])).logits[0].float() / decoding.temperature
    logprobs = torch.log_softmax(truncated(logits, decoding), dim=-1)
    return np.array([logprobs[t - 1, token_ids[t]].item() for t in range(start, len(token_ids))])


def truncated(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Logits of the top_k likeliest tokens, and of these the fewest that hold a mass of top_p; -inf elsewhere."""
    ranked, order = logits.sort(dim=-1, descending=True)
    if decoding.top_k:
        ranked[:, decoding.top_k :] = -torch.inf
    probs = ranked.softmax(dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    if decoding.top_p < 1:
        ranked[mass_before >= decoding.top_p] = -torch.inf
    return torch.empty_like(logits).scatter_(-1, order, ranked)


@pytest.fixture(scope="module")
def model_and_engine(
    local_ray: None, build_tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    folder = tmp_path_factory.mktemp("tiny")
    model = build_tiny_model(folder, tied=True)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    settings = Model(path=str(folder), dtype="float32")
    engine = (
        ray.remote(GeneratorEngine)
        .options(num_cpus=1)
        .remote(0, settings, GeneratorSettings(), max_model_len=256, backend="gloo", loaded_version=7)
    )
    assert ray.get(engine.ready.remote(), timeout=120) == "generator engine 0"
    yield model, engine
    ray.kill(engine)


@pytest.fixture(scope="module")
def rollouts(model_and_engine: tuple[Any, Any]) -> list[Rollout]:
    generator = VllmGenerator([model_and_engine[1]], MAX_TOKENS, timeout_s=120)
    return list(generator.generate(make_requests(8, 4), DECODING))


@pytest.mark.engine
def test_logprobs_are_those_of_the_sampling_distribution(
    model_and_engine: tuple[Any, Any], rollouts: list[Rollout]
) -> None:
    model, _ = model_and_engine
    for rollout in rollouts:
        sequence = rollout.prompt_token_ids + rollout.token_ids
        expected = hf_logprobs(model, sequence, len(rollout.prompt_token_ids), DECODING)
        assert np.abs(rollout.rollout_logprobs - expected).max() < 1e-4
        untempered = hf_logprobs(model, sequence, len(rollout.prompt_token_ids), Decoding(1.0))
        assert np.abs(rollout.rollout_logprobs - untempered).max() > 1e-2


@pytest.mark.engine
@pytest.mark.parametrize(
    "decoding", [Decoding(0.7, top_p=0.6), Decoding(0.7, top_k=3), Decoding(1.5, top_p=0.9, top_k=8)], ids=str
)
def test_truncated_sampling_gives_logprobs_of_the_tokens_that_are_left(
    model_and_engine: tuple[Any, Any], decoding: Decoding
) -> None:
    model, engine = model_and_engine
    rollouts = list(VllmGenerator([engine], MAX_TOKENS, 60).generate(make_requests(8, 4), decoding))
    gaps = []
    for rollout in rollouts:
        sequence, start = rollout.prompt_token_ids + rollout.token_ids, len(rollout.prompt_token_ids)
        assert np.abs(rollout.rollout_logprobs - hf_logprobs(model, sequence, start, decoding)).max() < 1e-4
        gaps.append(rollout.rollout_logprobs - hf_logprobs(model, sequence, start, Decoding(decoding.temperature)))
    assert np.concatenate(gaps).min() > -1e-4  # the mass of tokens that are left out goes to the others
    assert np.concatenate(gaps).max() > 1e-2


@pytest.mark.engine
def test_one_token_left_is_greedy_and_certain(model_and_engine: tuple[Any, Any]) -> None:
    model, engine = model_and_engine
    rollouts = list(VllmGenerator([engine], MAX_TOKENS, 60).generate(make_requests(4, 2), Decoding(1.0, top_k=1)))
    for rollout in rollouts:
        sequence, start = list(rollout.prompt_token_ids + rollout.token_ids), len(rollout.prompt_token_ids)
        with torch.no_grad():
            likeliest = model(torch.tensor([sequence])).logits[0].argmax(dim=-1).tolist()
        assert sequence[start:] == likeliest[start - 1 : -1]
        assert np.abs(rollout.rollout_logprobs).max() < 1e-6  # log 1


@pytest.mark.engine
def test_every_request_gets_one_rollout_with_version_and_text(rollouts: list[Rollout]) -> None:
    assert sorted(rollout.key for rollout in rollouts) == [(f"p{n}", s) for n in range(8) for s in range(4)]
    for rollout in rollouts:
        assert rollout.token_versions.tolist() == [7] * len(rollout.token_ids)
        assert rollout.rollout_logprobs.shape == (len(rollout.token_ids),)
        assert rollout.text == " ".join(f"w{token}" for token in rollout.token_ids if token > 1)


def test_the_version_of_each_token_is_read_out_of_spans() -> None:
    given = [("3", 0, 2), ("4", 2, 2), ("5", 2, 3)]
    spans = [SimpleNamespace(version=version, start=start, end=end) for version, start, end in given]
    assert token_versions(spans, 3).tolist() == [3, 3, 5]
    assert token_versions([], 0).tolist() == []
    for broken in (None, spans[:1], spans[1:], spans[::-1]):
        with pytest.raises(WorkerError, match=r"for a completion of 3 tokens, expected spans that cover them in order"):
            token_versions(broken, 3)


@pytest.mark.engine
def test_end_of_sequence_is_kept_and_decides_the_finish_reason(rollouts: list[Rollout]) -> None:
    # Ids 1..39 of 300 end a sequence, so of 32 completions of up to 24 tokens some stop and some do not.
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert not any(1 <= token < 40 for token in rollout.token_ids[:-1])
        if rollout.finish_reason == "stop":
            assert 1 <= rollout.token_ids[-1] < 40
        else:
            assert len(rollout.token_ids) == MAX_TOKENS
            assert rollout.token_ids[-1] >= 40


@pytest.mark.engine
def test_a_seed_gives_the_same_sample_whatever_else_is_in_the_batch(
    model_and_engine: tuple[Any, Any], rollouts: list[Rollout]
) -> None:
    by_key = {rollout.key: rollout for rollout in rollouts}
    fewer = list(reversed(make_requests(8, 4)))[::5]
    again = list(VllmGenerator([model_and_engine[1]], MAX_TOKENS, 120).generate(fewer, DECODING))
    assert len(again) == len(fewer)
    for rollout in again:
        assert rollout.token_ids == by_key[rollout.key].token_ids
        np.testing.assert_allclose(rollout.rollout_logprobs, by_key[rollout.key].rollout_logprobs, atol=1e-4)
    assert len({rollout.token_ids for rollout in rollouts}) > 24  # different seeds, different samples


@pytest.mark.engine
def test_prompts_beyond_the_token_budget_of_one_engine_step(model_and_engine: tuple[Any, Any]) -> None:
    # 24 prompts of 200 tokens: 4800 in all, while one step takes 4096, which is no multiple of 200.
    generator = VllmGenerator([model_and_engine[1]], MAX_TOKENS, timeout_s=60)
    requests = make_requests(24, 1, prompt_length=200)
    together = {rollout.key: rollout.token_ids for rollout in generator.generate(requests, DECODING)}
    assert len(together) == 24
    alone = [rollout for request in requests[-6:] for rollout in generator.generate([request], DECODING)]
    assert [together[rollout.key] for rollout in alone] == [rollout.token_ids for rollout in alone]


@pytest.mark.engine
def test_score_matches_transformers_at_temperature_one(model_and_engine: tuple[Any, Any]) -> None:
    model, engine = model_and_engine
    sequences = [tuple(range(50, 90)), (3, 250, 7, 7)]
    for sequence, scored in zip(sequences, ray.get(engine.score.remote(sequences), timeout=60), strict=True):
        assert scored.shape == (len(sequence) - 1,)
        assert np.abs(scored - hf_logprobs(model, sequence, 1, Decoding(1.0))).max() < 1e-4


@pytest.mark.engine
def test_a_prompt_that_cannot_fit_is_reported_and_the_engine_goes_on(model_and_engine: tuple[Any, Any]) -> None:
    generator = VllmGenerator([model_and_engine[1]], MAX_TOKENS, timeout_s=60)
    with pytest.raises(WorkerError, match="generator engine 0 failed while"):
        list(generator.generate([*make_requests(1, 1), *make_requests(1, 1, prompt_length=300)], DECODING))
    assert len(list(generator.generate(make_requests(1, 2), DECODING))) == 2


@pytest.mark.engine
@pytest.mark.parametrize(
    ("text", "schema", "message"),
    [
        # The tokenizer knows the words w0 to w299 only; the version is not looked at in an engine as it was loaded.
        ("w50 w51", {"type": "object"}, "no token of its vocabulary continues the JSON"),
        ("w50 w51", {"type": "bytes"}, "generator engine 0 does not take a chat request: .*Unsupported type"),
    ],
)
def test_chats_that_cannot_be_answered_are_refused_and_the_engine_goes_on(
    model_and_engine: tuple[Any, Any], text: str, schema: dict[str, Any], message: str
) -> None:
    _, engine = model_and_engine
    request = ChatRequest((Message("user", text),), schema, max_tokens=8, temperature=0.0, policy_version=3)
    with pytest.raises(ChatFault, match=message) as fault:
        wait_for(engine.complete.remote(request, 60), 60, "the engine", "answering")
    assert (fault.value.cause, fault.value.is_final) == ("refused", True)
    assert len(list(VllmGenerator([engine], MAX_TOKENS, 60).generate(make_requests(1, 2), DECODING))) == 2


class FakeEngine:
    """Answers at once with one token a request; can die, hang, fail, lose, repeat, garble, or report any version.

    Args:
        notes: a file that gets a line for each call: its process, and how much it was asked for.
    """

    def __init__(self, version: int = 0, behaviour: str = "well", notes: str = os.devnull) -> None:
        self._version = version
        self._behaviour = behaviour
        self._notes = notes
        self._life = new_life()

    def life(self) -> str:
        return self._life

    def generate(
        self, requests: Sequence[RolloutRequest], decoding: Decoding, max_tokens: int
    ) -> Iterator[list[Rollout]]:
        is_first = not os.path.exists(self._notes)
        with open(self._notes, "a") as file:
            print(os.getpid(), len(requests), file=file)
        if self._behaviour == "dies":
            os._exit(1)
        if self._behaviour == "unproven once" and is_first:
            raise WeightSyncError("the engine was asked for rollouts while its weights are unproven")
        if self._behaviour == "hangs":
            time.sleep(600)
        if self._behaviour == "fails":
            raise MemoryError("no memory left for the KV cache")
        for number, request in enumerate(requests[1:] if self._behaviour == "loses" else requests):
            if number == 3 and self._behaviour == "dies once" and is_first:
                time.sleep(0.3)  # what was yielded is on its way
                os._exit(1)
            logprobs, versions = np.zeros(1, dtype=np.float32), np.array([self._version])
            if self._behaviour == "garbles" and number == 1:
                logprobs[:] = np.nan
            text = str(os.getpid())
            ids = request.prompt_token_ids
            rollout = Rollout(request.prompt, request.sample, ids, (1,), logprobs, "stop", versions, text)
            yield [rollout] * (2 if self._behaviour == "repeats" else 1)


def generate_with(*engines: tuple[int, str], timeout_s: float = 30.0) -> list[Rollout]:
    handles = [ray.remote(FakeEngine).options(num_cpus=0.1).remote(*engine) for engine in engines]
    try:
        return list(VllmGenerator(handles, MAX_TOKENS, timeout_s).generate(make_requests(4, 2), DECODING))
    finally:
        for handle in handles:
            ray.kill(handle)


@pytest.mark.engine
def test_engines_share_the_work_and_keep_groups_together(local_ray: None) -> None:
    rollouts = generate_with((3, "well"), (3, "well"))
    assert len(rollouts) == 8
    process_of = {(rollout.prompt.prompt_id, rollout.text) for rollout in rollouts}
    assert len(process_of) == 4
    assert len({process for _, process in process_of}) == 2


@pytest.mark.engine
@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("dies", "generator engine 1 died while"),
        ("hangs", r"before the deadline of 3 s .* generator engine 1 \(4 rollouts missing\)"),
        ("fails", "generator engine 1 failed while .*MemoryError: no memory left for the KV cache"),
        ("loses", "generator engine 1 ended with 1 rollouts missing"),
        ("repeats", r"generator engine 1 sent sample 0 of prompt 'p\d' twice"),
        ("garbles", r"generator engine 1 garbled sample 1 of prompt 'p\d': .*log"),
    ],
)
def test_a_bad_engine_is_named(local_ray: None, behaviour: str, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        generate_with((0, "well"), (0, behaviour), timeout_s=3 if behaviour == "hangs" else 30)


class AnyLife:
    """Every engine is always back."""

    def life(self, index: int) -> str:
        return ""

    def recover(self, index: int, life: str) -> bool:
        return True


def survive(notes: Sequence[Path], behaviour: str, recovery: Any = None, **settings: Any) -> list[Rollout]:
    """What 8 requests give where the second of two engines has a fault that passes."""
    handles = [
        ray.remote(FakeEngine).options(num_cpus=0.1, max_restarts=1).remote(0, each, str(file))
        for each, file in zip(("well", behaviour), notes, strict=True)
    ]
    try:
        recovery = recovery or Lives(handles, 60)
        generator = VllmGenerator(handles, MAX_TOKENS, 30, recovery=recovery, **settings)
        rollouts = list(generator.generate(make_requests(4, 2), DECODING))
        assert {rollout.key for rollout in rollouts} == {
            RolloutKey(request.prompt.prompt_id, request.sample) for request in make_requests(4, 2)
        }
        assert len(rollouts) == 8 and all(meter.num_open == 0 for meter in generator.idle)
        return rollouts
    finally:
        for handle in handles:
            ray.kill(handle)


@pytest.mark.engine
def test_an_engine_that_dies_does_all_of_its_work_again(local_ray: None, tmp_path: Path) -> None:
    notes = [tmp_path / "0", tmp_path / "1"]
    survive(notes, "dies once")
    (well,), (before, after) = ([line.split() for line in file.read_text().splitlines()] for file in notes)
    assert (well[1], before[1], after[1]) == ("4", "4", "4") and before[0] != after[0]


@pytest.mark.engine
def test_other_engines_take_over_what_a_dead_one_has_not_finished(local_ray: None, tmp_path: Path) -> None:
    notes = [tmp_path / "0", tmp_path / "1"]
    survive(notes, "dies once", hands_over=True)
    own, taken_over = (int(line.split()[1]) for line in notes[0].read_text().splitlines())
    assert own == 4 and 1 <= taken_over <= 4
    assert [int(line.split()[1]) for line in notes[1].read_text().splitlines()] == [4]


@pytest.mark.engine
@pytest.mark.parametrize("hands_over", [False, True])
def test_an_engine_that_came_back_unseen_is_proven_before_it_is_asked_again(
    local_ray: None, tmp_path: Path, hands_over: bool
) -> None:
    notes = [tmp_path / "0", tmp_path / "1"]
    survive(notes, "unproven once", AnyLife(), hands_over=hands_over)
    assert [int(line.split()[1]) for line in notes[1].read_text().splitlines()] == [4, 4]


@pytest.mark.engine
def test_engines_whose_weights_are_unproven_without_a_death_are_an_error(local_ray: None, tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError, match="weights are unproven"):
        survive([tmp_path / "0", tmp_path / "1"], "unproven once")


def test_shares_keep_prompts_together_and_are_balanced() -> None:
    shares = split_by_prompt(make_requests(5, 3), [0, 0])
    # Prompts alternate: 0, 2, 4 to the first engine, 1, 3 to the second.
    assert [[request.prompt.prompt_id for request in share[::3]] for share in shares] == [
        ["p0", "p2", "p4"],
        ["p1", "p3"],
    ]
    assert [len(share) for share in shares] == [9, 6]
    assert split_by_prompt(make_requests(1, 2), [0, 0, 0])[1:] == [[], []]
    # 4 open requests are as much as two groups of 2
    shares = split_by_prompt(make_requests(4, 2), [4, 0])
    assert [len({request.prompt.prompt_id for request in share}) for share in shares] == [1, 3]
