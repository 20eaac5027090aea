"""Makes and measures the base model of the arithmetic task: `python -m trace_rl.launch.arithmetic_base [--out DIR]`.

The model is worth teaching because of what its demonstrations hold: completions of plain prompts slip, completions of
prompts that name error types are free of exactly these types, and most references in the prompt are counterfactual,
so that they must be read. Prompts are rendered as in training, through `trace_rl.prompts`.

This module decides the recipe. It must not know the RL loop or its engines, nor how the model is measured.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trace_rl.batch import Prompt
from trace_rl.contexts import prompt_question
from trace_rl.errors import ConfigError, TraceError
from trace_rl.launch.arithmetic_measure import (
    CONTEXTS,
    IRRELEVANT_TYPE,
    ContextKind,
    measure_base,
    write_model_card,
)
from trace_rl.prompts import render, student_messages
from trace_rl.tasks.arithmetic import ERROR_TYPES, ArithmeticDifficulty, base_model_path, parse_question, question_at
from trace_rl.tasks.demonstrations import SlipRates, counterfactual_solution, demonstrate

PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECES = r"\\\p{L}+\{|\p{N}|\p{L}+ ?| ?[^\s\p{L}\p{N}]+ ?|\s"
"""A LaTeX command, one digit, a word with its blank, punctuation with its blanks, any other white space."""

REPORT_EVERY = 100
WIDE_DIFFICULTY = ArithmeticDifficulty(min_steps=3, max_steps=9, max_operand=49)


@dataclass(frozen=True)
class Recipe:
    """Everything that the base model depends on."""

    difficulty: ArithmeticDifficulty = field(default_factory=ArithmeticDifficulty)
    wide_difficulty: ArithmeticDifficulty = WIDE_DIFFICULTY
    """What some batches are drawn from, so that longer chains and larger operands are not entirely foreign."""
    wide_share: float = 0.15
    slips: SlipRates = field(default_factory=SlipRates)
    seed: int = 0
    num_updates: int = 1150
    batch_size: int = 32
    muon_learning_rate: float = 0.01
    adam_learning_rate: float = 3e-3
    num_warmup_updates: int = 60
    reference_share: float = 0.2
    """Share of the batches whose prompts hold a reference; the others mix plain and labelled prompts."""
    label_share: float = 0.6
    """Share of labelled prompts in a mixed batch."""
    slip_schedule: tuple[tuple[float, float], ...] = ((0.33, 0.3), (0.36, 6.0), (0.64, 6.0), (0.76, 1.0))
    """(share of the updates, factor on the slip rates), linear in between: first the skill is learned from nearly clean
    demonstrations, then slips abound, because at their final rates they are too rare to teach reading the label."""
    decay_from: float = 0.05
    """Share of the updates after which the learning rates fall linearly to 0."""
    counterfactual_share: float = 0.8
    """Share of the references that are counterfactual."""
    counterfactual_rate: float = 0.5
    hidden_size: int = 96
    num_layers: int = 4
    vocab_size: int = 384


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges are the words of the task and of the prompt templates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_corpus(recipe), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _tokenizer_corpus(recipe: Recipe) -> Iterator[str]:
    for index in range(200):
        prompt = question_at(recipe.difficulty, recipe.seed, "train", index)
        for context in ("none", "type_label", "reference"):
            yield prompt_question(CONTEXTS[context], prompt, [*ERROR_TYPES, IRRELEVANT_TYPE])
        yield prompt.solution


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 model small enough for one CPU core; head_dim 32 is the smallest that vLLM's CPU attention supports."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        use_sliding_window=False,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def draw_example(
    recipe: Recipe, prompt: Prompt, context: ContextKind, slips: SlipRates, rng: random.Random
) -> tuple[str, str]:
    """(user turn, completion) of one demonstration."""
    steps = parse_question(prompt.question)
    if context == "reference":
        if rng.random() < recipe.counterfactual_share:
            solution = counterfactual_solution(steps, recipe.difficulty.max_total, recipe.counterfactual_rate, rng)
            prompt = replace(prompt, solution=solution)
        return prompt_question(CONTEXTS[context], prompt, ()), prompt.solution
    types = draw_label(rng) if context == "type_label" else ()
    return prompt_question(CONTEXTS[context], prompt, types), demonstrate(steps, slips, types, rng)


def draw_label(rng: random.Random) -> tuple[str, ...]:
    """Types to beware of, in canonical order: often `arith` alone, else any one, a few or all; some irrelevant."""
    kinds = list(ERROR_TYPES)
    choice = rng.random()
    if choice < 0.35:
        named = {"arith"}
    elif choice < 0.6:
        named = {rng.choice([*kinds, IRRELEVANT_TYPE])}
    elif choice < 0.8:
        named = set(rng.sample([*kinds, IRRELEVANT_TYPE], rng.randint(2, 4)))
    else:
        named = set(kinds)
    return tuple(kind for kind in [*kinds, IRRELEVANT_TYPE] if kind in named)


def slip_factor(recipe: Recipe, update: int) -> float:
    """Factor on the slip rates at this update."""
    shares, factors = zip(*recipe.slip_schedule, strict=True)
    return float(np.interp(update / recipe.num_updates, shares, factors))


def draw_batch(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, update: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, labels) [batch, time], padded on the right; labels are -100 outside the completions."""
    is_reference = rng.random() < recipe.reference_share
    difficulty = recipe.wide_difficulty if rng.random() < recipe.wide_share else recipe.difficulty
    slips = recipe.slips.scaled(slip_factor(recipe, update))
    rows = []
    for index in range(update * recipe.batch_size, (update + 1) * recipe.batch_size):
        unreferenced: ContextKind = "type_label" if rng.random() < recipe.label_share else "none"
        context: ContextKind = "reference" if is_reference else unreferenced
        prompt = question_at(difficulty, recipe.seed, "train", index)
        question, completion = draw_example(recipe, prompt, context, slips, rng)
        prompt_ids = list(render(tokenizer, student_messages(question), {}))
        completion_ids = tokenizer(completion + END, add_special_tokens=False).input_ids
        rows.append((prompt_ids + completion_ids, [-100] * len(prompt_ids) + completion_ids))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return ids, labels


def train(recipe: Recipe, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Supervised training from scratch: Muon for the hidden matrices, AdamW for the rest.

    Muon reaches the same loss in about half the updates that AdamW alone needs here.
    """
    rng = random.Random(recipe.seed)
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=recipe.muon_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.adam_learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def scale(update: int) -> float:
        warmup = min(1.0, (update + 1) / recipe.num_warmup_updates)
        decay = min(1.0, (recipe.num_updates - update) / (recipe.num_updates * (1 - recipe.decay_from)))
        return warmup * decay

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    model.train()
    recent_loss = 0.0
    for update in range(recipe.num_updates):
        ids, labels = draw_batch(recipe, tokenizer, update, rng)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        recent_loss += loss.item() / REPORT_EVERY
        if (update + 1) % REPORT_EVERY == 0:
            print(f"update {update + 1}/{recipe.num_updates}: mean loss {recent_loss:.4f}", flush=True)
            recent_loss = 0.0


def make_base(path: Path, recipe: Recipe) -> float:
    """Trains and saves the model, its tokenizer and generation settings; returns the CPU seconds of training.

    Raises:
        ConfigError: the folder is not empty.
    """
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"The folder {path} is not empty: name a new one with --out, or clear it first.")
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    started_s = time.process_time()
    train(recipe, model, tokenizer)
    cpu_s = time.process_time() - started_s
    save_base(path, model, tokenizer)
    return cpu_s


def save_base(path: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The folder that `from_pretrained` and vLLM load, readable by every user of the machine."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    for file in path.iterdir():
        file.chmod(0o644)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes and measures a model, or measures an existing one; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trace_rl.launch.arithmetic_base")
    parser.add_argument("--out", type=Path, default=Path("arithmetic_base"), help="new folder for the model")
    parser.add_argument("--measure", action="store_true", help="only measure: the model in --model")
    parser.add_argument("--model", type=Path, help="folder of the model to measure (default: the shipped one)")
    parser.add_argument("--num-questions", type=int, default=1000, help="held-out questions of each measurement")
    parser.add_argument("--measure-seed", type=int, default=1, help="seed of the measured questions and samples")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        if options.measure:
            measure_base(options.model or base_model_path(), options.num_questions, options.measure_seed)
            return 0
        recipe = Recipe()
        train_cpu_s = make_base(options.out, recipe)
    except TraceError as error:
        print(error, file=sys.stderr)
        return 2
    started_s = time.process_time()
    measurements = measure_base(options.out, options.num_questions, options.measure_seed)
    measure_cpu_s = time.process_time() - started_s
    write_model_card(options.out, vars(recipe), measurements, options.measure_seed, train_cpu_s, measure_cpu_s)
    print(f"The model and its card are in {options.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
