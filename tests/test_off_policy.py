"""Completions of reference solutions and of teachers: the tokens they are made of, what is unknown of them, who writes
which prompt."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from trace_rl.batch import NOT_THE_POLICY, Prompt, Rollout, RolloutRequest
from trace_rl.config.roles import Sampling
from trace_rl.errors import DataError
from trace_rl.launch.arithmetic_base import Recipe, draw_batch
from trace_rl.off_policy import MixedGenerator, SolutionGenerator, TeacherGenerator
from trace_rl.prompts import PromptEncoder, derive_seed
from trace_rl.protocols import Decoding
from trace_rl.tasks.arithmetic import ArithmeticDifficulty, base_model_path, question_at
from trace_rl.tasks.demonstrations import SlipRates

DECODING = Decoding(0.7, top_p=0.9, top_k=5)


class CodePoints:
    """One token a character: its code point; 0 ends a sequence, 1 begins one."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + [ord(char) for char in text]


def make_requests(num_prompts: int, samples: int, step: int = 0) -> list[RolloutRequest]:
    return [
        RolloutRequest(prompt, sample, (5, 6), derive_seed(0, "train", step, prompt.prompt_id, sample))
        for prompt in (Prompt(f"p{number}", "q", "a", f"s{number}") for number in range(num_prompts))
        for sample in range(samples)
    ]


@dataclass
class Engine:
    """Samples two tokens a request as soon as it is iterated; keeps what it was asked for."""

    token: int
    asked: list[tuple[list[RolloutRequest], Decoding]] = field(default_factory=list)
    num_yielded: int = 0

    def generate(self, requests: Sequence[RolloutRequest], decoding: Decoding) -> Iterator[Rollout]:
        self.asked.append((list(requests), decoding))
        return map(self._sample, requests)

    def _sample(self, request: RolloutRequest) -> Rollout:
        self.num_yielded += 1
        logprobs = np.array([-0.5, -1.5], dtype=np.float32)
        ids, versions = (self.token, request.sample), np.array([3, 4])
        prompt_ids = request.prompt_token_ids
        return Rollout(request.prompt, request.sample, prompt_ids, ids, logprobs, "length", versions, "text")


def sides(num_prompts: int, samples: int, frac: float, step: int = 0) -> dict[str, str]:
    """Who wrote the completions of each prompt."""
    mixed = MixedGenerator(Engine(1), Engine(2), frac)
    return written_by(mixed.generate(make_requests(num_prompts, samples, step), DECODING))


def written_by(rollouts: Iterator[Rollout]) -> dict[str, str]:
    found: dict[str, set[str]] = {}
    for rollout in rollouts:
        found.setdefault(rollout.prompt.prompt_id, set()).add({1: "policy", 2: "source"}[rollout.token_ids[0]])
    assert all(len(writers) == 1 for writers in found.values())
    return {name: writers.pop() for name, writers in found.items()}


def test_a_solution_becomes_the_completion_of_every_sample() -> None:
    # "s0" is (115, 48), then end-of-sequence 0; no token that begins a sequence.
    first, second = SolutionGenerator(CodePoints(), 3).generate(make_requests(1, 2), DECODING)
    assert (first.key, second.key) == (("p0", 0), ("p0", 1))
    for rollout in (first, second):
        assert rollout.prompt_token_ids == (5, 6)
        assert rollout.token_ids == (115, 48, 0)
        assert rollout.finish_reason == "stop"
        assert rollout.rollout_logprobs.shape == (3,)
        assert rollout.rollout_logprobs.dtype == np.float32
        assert np.isnan(rollout.rollout_logprobs).all()
        assert rollout.token_versions.tolist() == [NOT_THE_POLICY] * len(rollout.token_ids)
        assert rollout.text == "s0"


@pytest.mark.parametrize(("max_tokens", "token_ids"), [(2, (115, 48)), (1, (115,))])
def test_a_long_solution_is_cut_and_counts_as_truncated(max_tokens: int, token_ids: tuple[int, ...]) -> None:
    # With end-of-sequence "s0" has three tokens: a budget of two already loses that one.
    (rollout,) = SolutionGenerator(CodePoints(), max_tokens).generate(make_requests(1, 1), DECODING)
    assert rollout.token_ids == token_ids
    assert rollout.finish_reason == "length"
    assert len(rollout.rollout_logprobs) == max_tokens


def test_a_prompt_without_a_solution_is_named() -> None:
    requests = [*make_requests(1, 1), RolloutRequest(Prompt("bare", "q", "a"), 0, (5,), 0)]
    with pytest.raises(DataError, match=r"^prompt bare has no reference solution .* set sampling.source=policy$"):
        list(SolutionGenerator(CodePoints(), 3).generate(requests, DECODING))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base_model_path())


def arithmetic_rollouts(tokenizer: PreTrainedTokenizerFast, count: int) -> list[Rollout]:
    prompts = [question_at(ArithmeticDifficulty(), 0, "train", index) for index in range(count)]
    requests = PromptEncoder(tokenizer, "", {}).requests(prompts, 1, 0, "train", 0)
    return list(SolutionGenerator(tokenizer, 128).generate(requests, DECODING))


def test_arithmetic_solutions_decode_to_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for rollout in arithmetic_rollouts(tokenizer, 200):
        assert rollout.finish_reason == "stop"
        assert tokenizer.decode(rollout.token_ids, skip_special_tokens=True) == rollout.prompt.solution
        assert rollout.token_ids.count(tokenizer.eos_token_id) == 1
        assert type(rollout.token_ids[0]) is int


def test_arithmetic_solutions_are_the_rows_that_the_base_model_was_trained_on(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # The first batch of a recipe without slips, labels and references has the questions 0 to 31 and their solutions.
    clean = Recipe(slips=SlipRates().scaled(0), reference_share=0, label_share=0, wide_share=0)
    ids, labels = draw_batch(clean, tokenizer, 0, random.Random(0))
    rollouts = arithmetic_rollouts(tokenizer, clean.batch_size)
    for row, row_labels, rollout in zip(ids.tolist(), labels.tolist(), rollouts, strict=True):
        sequence = list(rollout.prompt_token_ids + rollout.token_ids)
        assert row[: len(sequence)] == sequence
        assert set(row[len(sequence) :]) <= {tokenizer.pad_token_id}
        assert [label for label in row_labels if label != -100] == list(rollout.token_ids)


def test_arithmetic_solutions_are_token_for_token_what_the_policy_writes(tokenizer: PreTrainedTokenizerFast) -> None:
    model = Qwen3ForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()
    num_equal = 0
    for rollout in arithmetic_rollouts(tokenizer, 12):
        prompt = torch.tensor([rollout.prompt_token_ids])
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=128, do_sample=False)
        written = output[0, prompt.shape[1] :].tolist()
        if tokenizer.decode(written, skip_special_tokens=True) == rollout.text:
            assert tuple(written) == rollout.token_ids
            num_equal += 1
    assert num_equal >= 3  # the base model solves about half of the questions


def test_a_teacher_keeps_its_tokens_and_its_logprobs_are_unknown() -> None:
    engine = Engine(7)
    requests = make_requests(2, 2)
    rollouts = list(TeacherGenerator(engine).generate(requests, DECODING))
    assert engine.asked == [(requests, DECODING)]
    assert [rollout.key for rollout in rollouts] == [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]
    for rollout in rollouts:
        assert rollout.token_ids == (7, rollout.sample)
        assert (rollout.finish_reason, rollout.text, rollout.prompt_token_ids) == ("length", "text", (5, 6))
        assert rollout.token_versions.tolist() == [NOT_THE_POLICY] * len(rollout.token_ids)
        assert rollout.rollout_logprobs.shape == (2,)
        assert np.isnan(rollout.rollout_logprobs).all()


def test_a_prompt_has_one_writer_and_both_sides_answer_everything() -> None:
    policy, source = Engine(1), Engine(2)
    requests = make_requests(40, 3)
    rollouts = list(MixedGenerator(policy, source, 0.5).generate(requests, DECODING))
    assert sorted(rollout.key for rollout in rollouts) == sorted(("p" + str(n), s) for n in range(40) for s in range(3))
    assert set(written_by(iter(rollouts)).values()) == {"policy", "source"}
    assert [decoding for engine in (policy, source) for _, decoding in engine.asked] == [DECODING, DECODING]
    for engine in (policy, source):
        ((asked, _),) = engine.asked
        assert asked == [request for request in requests if request in asked]  # order and groups stay together


def test_the_share_holds_over_many_prompts_and_one_means_all() -> None:
    # 4000 draws: the standard deviation of the share is sqrt(0.3 * 0.7 / 4000) = 0.007; four of them are 0.029.
    drawn = list(sides(4000, 1, 0.3).values())
    assert drawn.count("source") / 4000 == pytest.approx(0.3, abs=0.029)
    assert set(sides(4000, 1, 1.0).values()) == {"source"}


def test_sides_are_the_same_whatever_the_order_and_the_neighbours() -> None:
    requests = make_requests(60, 4)
    expected = sides(60, 4, 0.4)
    assert sides(60, 4, 0.4) == expected
    shuffled = random.Random(1).sample(requests, len(requests))
    assert written_by(MixedGenerator(Engine(1), Engine(2), 0.4).generate(shuffled, DECODING)) == expected
    assert sides(20, 1, 0.4) == {f"p{number}": expected[f"p{number}"] for number in range(20)}


def test_sides_are_drawn_anew_at_each_step() -> None:
    # Two independent draws differ with probability 2 * 0.4 * 0.6 = 0.48; over 1000 prompts four deviations are 0.063.
    first, second = sides(1000, 2, 0.4, step=0), sides(1000, 2, 0.4, step=1)
    assert np.mean([first[name] != second[name] for name in first]) == pytest.approx(0.48, abs=0.063)


def test_a_larger_share_only_adds_prompts() -> None:
    few, many = ({n for n, side in sides(300, 1, frac).items() if side == "source"} for frac in (0.2, 0.6))
    assert few < many


def test_both_sides_are_asked_at_once_and_read_one_by_one() -> None:
    policy, source = Engine(1), Engine(2)
    stream = MixedGenerator(policy, TeacherGenerator(source), 0.5).generate(make_requests(40, 1), DECODING)
    assert len(policy.asked) == len(source.asked) == 1
    assert (policy.num_yielded, source.num_yielded) == (0, 0)
    next(stream)
    assert policy.num_yielded + source.num_yielded == 1
    list(stream)
    assert policy.num_yielded + source.num_yielded == 40


def test_nothing_is_asked_of_a_side_without_prompts() -> None:
    policy, source = Engine(1), Engine(2)
    assert list(MixedGenerator(policy, source, 1.0).generate([], DECODING)) == []
    assert (policy.asked, source.asked) == ([], [])
    assert len(list(MixedGenerator(policy, source, 1.0).generate(make_requests(3, 1), DECODING))) == 3
    assert policy.asked == []
    solutions = SolutionGenerator(CodePoints(), 3)
    assert list(solutions.generate([], DECODING)) == list(TeacherGenerator(source).generate([], DECODING)) == []


def test_a_share_needs_a_source_beside_the_policy() -> None:
    assert Sampling(source="solutions", off_policy_frac=0.5, samples_per_prompt=1).off_policy_frac == 0.5
    with pytest.raises(ValidationError, match=r"off_policy_frac is 0.5, but sampling.source is policy"):
        Sampling(off_policy_frac=0.5)
    for wrong in ({"source": "teacher", "off_policy_frac": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}):
        with pytest.raises(ValidationError, match=next(reversed(wrong))):
            Sampling.model_validate(wrong)
