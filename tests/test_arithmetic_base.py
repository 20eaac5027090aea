"""The shipped base model: its size, its tokenizer, its prompts, and that it is still worth teaching."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from trace_rl.batch import Prompt
from trace_rl.contexts import prompt_question
from trace_rl.errors import ConfigError
from trace_rl.launch.arithmetic_base import Recipe, build_tokenizer, draw_batch, draw_label, make_base
from trace_rl.launch.arithmetic_measure import CONTEXTS, Meter
from trace_rl.prompts import render, student_messages
from trace_rl.tasks.arithmetic import ERROR_TYPES, ArithmeticDifficulty, base_model_path, question_at

PROMPT = question_at(ArithmeticDifficulty(), 0, "heldout", 0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(base_model_path())


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_model_has_the_promised_shape(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    config = json.loads((base_model_path() / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["head_dim"] == 32
    assert config["max_position_embeddings"] == 1024
    assert config["tie_word_embeddings"] is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() <= 1_000_000
    assert len(tokenizer) == config["vocab_size"] <= 512


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name: path for path in base_model_path().iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= set(files)
    assert sum(path.stat().st_size for path in files.values()) <= 4 * 2**20
    with safe_open(files["model.safetensors"], "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert "lm_head.weight" not in names


def test_end_and_padding_agree_everywhere(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generation = GenerationConfig.from_pretrained(base_model_path())
    assert tokenizer.eos_token_id == model.config.eos_token_id == generation.eos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id == generation.pad_token_id
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == text


def test_digits_are_one_token_each_and_templates_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("2047") == ["2", "0", "4", "7"]
    assert len(tokenizer.tokenize("Step 3: 85 - 15 = 70\n")) == 12  # Step_ 3 :_ 8 5 _-_ 1 5 _=_ 7 0 newline
    assert len(tokenizer.tokenize("\\boxed{70}")) == 4
    named = prompt_question(CONTEXTS["type_label"], PROMPT, ["copy", "arith"]).removeprefix(PROMPT.question)
    assert len(tokenizer.tokenize(named)) == 9  # newline Take_ care_ with :_ copy ,_ arith .


def test_chats_are_rendered_with_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = render(tokenizer, student_messages("Start with 4.", system="Be brief."), {})
    assert tokenizer.decode(ids) == "<|system|>Be brief.<|user|>Start with 4.<|assistant|>"
    chat = [*student_messages("Start with 4."), {"role": "assistant", "content": "\\boxed{4}"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>Start with 4.<|assistant|>\\boxed{4}<|end|>"


def test_the_shipped_tokenizer_is_the_one_that_the_script_builds(tokenizer: PreTrainedTokenizerFast) -> None:
    built = build_tokenizer(Recipe())
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template
    text = prompt_question(CONTEXTS["reference"], PROMPT, ())
    assert built(text).input_ids == tokenizer(text).input_ids


def test_only_completions_are_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = draw_batch(Recipe(batch_size=4), tokenizer, 0, random.Random(0))
    for row, trained in zip(ids, labels, strict=True):
        kept = trained != -100
        assert torch.equal(row[kept], trained[kept])
        completion = tokenizer.decode(row[kept])
        assert completion.startswith("Step 1: ")
        assert completion.endswith("}<|end|>")
        before = tokenizer.decode(row[: int(kept.nonzero()[0])])
        assert before.startswith("<|user|>Start with ")
        assert before.endswith("<|assistant|>")


def test_labels_are_in_canonical_order_and_of_all_sizes() -> None:
    rng = random.Random(0)
    labels = {draw_label(rng) for _ in range(500)}
    order = [*ERROR_TYPES, "other"]
    assert all(list(label) == sorted(label, key=order.index) for label in labels)
    assert {("arith",), ("other",), tuple(ERROR_TYPES)} <= labels
    assert {len(label) for label in labels} == {1, 2, 3, 4, 5}


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        make_base(tmp_path, Recipe(num_updates=1))


def test_the_script_makes_a_model_that_loads(tmp_path: Path, one_thread: None) -> None:
    recipe = Recipe(num_updates=2, batch_size=2, hidden_size=32, num_layers=1)
    make_base(tmp_path / "new", recipe)
    made = Qwen3ForCausalLM.from_pretrained(tmp_path / "new")
    assert made.config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(tmp_path / "new").chat_template
    first = made.model.embed_tokens.weight
    shutil.rmtree(tmp_path / "new")
    make_base(tmp_path / "new", recipe)
    assert torch.equal(first, Qwen3ForCausalLM.from_pretrained(tmp_path / "new").model.embed_tokens.weight)


def solution_probabilities(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, turns: list[str], prompts: list[Prompt]
) -> torch.Tensor:
    """Probability of writing the whole correct solution: pass@1 without the noise of sampling (bar lucky slips)."""
    starts = [list(render(tokenizer, student_messages(turn), {})) for turn in turns]
    endings = [tokenizer(p.solution + "<|end|>", add_special_tokens=False).input_ids for p in prompts]
    width = max(len(start) + len(end) for start, end in zip(starts, endings, strict=True))
    ids = torch.full((len(turns), width), tokenizer.pad_token_id)
    mask = torch.zeros(len(turns), width, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(starts, endings, strict=True)):
        ids[row, : len(start) + len(end)] = torch.tensor(start + end)
        mask[row, len(start) : len(start) + len(end)] = True
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=ids).logits[:, :-1], dim=-1)
    of_targets = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (of_targets * mask[:, 1:]).sum(-1).exp()


def test_the_model_is_worth_teaching(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, one_thread: None
) -> None:
    """Exact probabilities, so the only noise is the choice of the 300 questions: bounds widened by three errors."""
    prompts = [question_at(ArithmeticDifficulty(), 11, "heldout", index) for index in range(300)]

    def probabilities(context: str, types: tuple[str, ...] = ()) -> torch.Tensor:
        turns = [prompt_question(CONTEXTS[context], prompt, types) for prompt in prompts]
        return solution_probabilities(model, tokenizer, turns, prompts)

    plain, reference = probabilities("none"), probabilities("reference")
    margin = 3 * float(plain.std()) / 300**0.5
    assert 0.35 - margin <= float(plain.mean()) <= 0.60 + margin
    gain = probabilities("type_label", ("arith",)) - plain
    assert float(gain.mean()) >= 0.10 - 3 * float(gain.std()) / 300**0.5
    assert float((gain > 0).float().mean()) > 0.8
    assert float(reference.mean()) >= 0.90 - 3 * float(reference.std()) / 300**0.5


def test_samples_slip_mostly_in_arithmetic(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, one_thread: None
) -> None:
    """What is sampled agrees with the probabilities: 100 samples at 0.48 have an error of 0.05, three are 0.15."""
    prompts = [question_at(ArithmeticDifficulty(), 11, "heldout", index) for index in range(100)]
    plain, _ = Meter(model, tokenizer, seed=11).measure("plain", prompts)
    assert 0.35 - 0.15 <= plain.accuracy <= 0.60 + 0.15
    assert max(plain.first_errors, key=lambda kind: plain.first_errors[kind]) == "arith"
