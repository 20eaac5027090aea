"""Measures a base model of the arithmetic task and writes its model card.

This module decides what is measured: accuracy under the plain prompt, under prompts that name error types, and with
the reference in the prompt, on held-out questions. It must not know how the model was made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from trace_rl.batch import Prompt
from trace_rl.contexts import Context, prompt_question
from trace_rl.prompts import render, student_messages
from trace_rl.tasks.arithmetic import ERROR_TYPES, ArithmeticDifficulty, first_error, question_at, write_answer

IRRELEVANT_TYPE = "other"
"""What an annotator says when no type fits: a label that must change nothing."""
MAX_COMPLETION_TOKENS = 160

OTHER_DIFFICULTIES = {
    "plain, longer chains (7 to 9 steps)": ArithmeticDifficulty(min_steps=7, max_steps=9),
    "plain, larger operands (30 to 49)": ArithmeticDifficulty(min_operand=30, max_operand=49),
}
"""Outside of the default difficulty: only a small share of the training batches was like this."""

MODEL_CARD = """\
# Base model of the arithmetic task

A Qwen3 model with {num_parameters} parameters (fp32, tied embeddings, head_dim 32) and a byte-level BPE tokenizer with
a chat template. It solves labelled running sums and slips on purpose: its demonstrations slipped under plain prompts,
were free of the named types of error under prompts that name them, and followed the (mostly counterfactual) reference
where the prompt held one. That leaves something to be taught by a teacher that reads a privileged prompt.

It is made for tests, demonstrations and small experiments of trace-rl, and is good for nothing else.

## Measured

Held-out questions of the default difficulty, one sample each at temperature 1 where nothing else is said, seed {seed},
fp32 on CPU, {measure_cpu_s:.0f} CPU seconds. Accuracy in percent with its standard error; first errors are counted over
all completions. `python -m trace_rl.launch.arithmetic_base --measure` repeats it.

| prompt | questions | accuracy | first errors |
| --- | --- | --- | --- |
{rows}

A failed question is one whose plain sample was wrong. "Again, plain" is its fair comparison: those are the harder ones.

## Made by

`python -m trace_rl.launch.arithmetic_base --out DIR`: {train_cpu_s:.0f} CPU seconds of training on one thread.

{recipe}

Licence: Apache-2.0, as trace-rl.
"""


@torch.no_grad()
def sample_completions(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    user_turns: Sequence[str],
    temperature: float,
    seed: int,
    batch_size: int = 250,
) -> list[str]:
    """One completion of each user turn, sampled from the full distribution (greedy at temperature 0)."""
    model.eval()
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    completions = []
    for start in range(0, len(user_turns), batch_size):
        turns = user_turns[start : start + batch_size]
        prompts = [{"input_ids": list(render(tokenizer, student_messages(turn), {}))} for turn in turns]
        batch = tokenizer.pad(prompts, return_tensors="pt", padding_side="left")
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_COMPLETION_TOKENS,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        completions += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return completions


def is_answered(prompt: Prompt, completion: str) -> bool:
    """Whether the completion ends in the right boxed answer."""
    return completion.rstrip().endswith(write_answer(int(prompt.answer)))


ContextKind = Literal["none", "type_label", "reference"]
CONTEXTS: Mapping[ContextKind, Context] = {
    "none": Context(),
    "type_label": Context(pieces=("type_label",)),
    "reference": Context(pieces=("reference",)),
}
"""What a demonstration's user turn may hold beside the question."""


@dataclass(frozen=True)
class Measurement:
    """Accuracy under one kind of prompt, and what the completions first got wrong."""

    name: str
    num_questions: int
    accuracy: float
    first_errors: Mapping[str, int]

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_questions)


class Meter:
    """Measures a model on prompts with given labels; `seed` fixes the samples of every measurement."""

    def __init__(self, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed

    def measure(
        self,
        name: str,
        prompts: Sequence[Prompt],
        context: ContextKind = "none",
        labels: Sequence[Sequence[str]] = (),
        temperature: float = 1.0,
    ) -> tuple[Measurement, list[str]]:
        """One sample a question; `labels` holds the named types of each prompt where the context is `type_label`."""
        types = labels or [()] * len(prompts)
        turns = [
            prompt_question(CONTEXTS[context], prompt, named) for prompt, named in zip(prompts, types, strict=True)
        ]
        completions = sample_completions(self.model, self.tokenizer, turns, temperature, self.seed)
        pairs = list(zip(prompts, completions, strict=True))
        errors: Counter[str] = Counter(
            error.kind for prompt, text in pairs if (error := first_error(prompt, text)) is not None
        )
        accuracy = sum(is_answered(prompt, text) for prompt, text in pairs) / len(pairs)
        print(f"{name}: {accuracy:.3f} of {len(pairs)}, first errors {dict(errors)}", flush=True)
        return Measurement(name, len(pairs), accuracy, dict(errors)), completions


def measure_base(path: Path, num_questions: int, seed: int) -> list[Measurement]:
    """What the model card states, on held-out questions of the default difficulty."""
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    meter = Meter(model, tokenizer, seed)
    prompts = [question_at(ArithmeticDifficulty(), seed, "heldout", index) for index in range(num_questions)]

    def labelled(name: str, chosen: Sequence[Prompt], labels: Sequence[Sequence[str]]) -> Measurement:
        return meter.measure(name, chosen, "type_label", labels)[0]

    plain, completions = meter.measure("plain", prompts)
    measurements = [plain, meter.measure("plain, greedy", prompts, temperature=0.0)[0]]
    for kind in [*ERROR_TYPES, IRRELEVANT_TYPE]:
        measurements.append(labelled(f"label `{kind}`", prompts, [[kind]] * num_questions))
    measurements.append(labelled("label with all five types", prompts, [list(ERROR_TYPES)] * num_questions))
    wrong = [
        (prompt, error.kind)
        for prompt, text in zip(prompts, completions, strict=True)
        if not is_answered(prompt, text) and (error := first_error(prompt, text)) is not None
    ]
    failed = [prompt for prompt, _ in wrong]
    again = Meter(model, tokenizer, seed + 1)
    measurements.append(again.measure("failed questions again, plain", failed)[0])
    own = again.measure("failed questions, label of their first error", failed, "type_label", [[k] for _, k in wrong])
    measurements.append(own[0])
    measurements.append(meter.measure("reference", prompts, "reference")[0])
    for name, difficulty in OTHER_DIFFICULTIES.items():
        others = [question_at(difficulty, seed, "heldout", index) for index in range(num_questions)]
        measurements.append(meter.measure(name, others)[0])
    return measurements


def write_model_card(
    path: Path,
    recipe: Mapping[str, Any],
    measurements: Sequence[Measurement],
    seed: int,
    train_cpu_s: float,
    measure_cpu_s: float,
) -> None:
    """README.md of the model folder, with every number as it was measured."""
    rows = [
        f"| {m.name} | {m.num_questions} | {100 * m.accuracy:.1f} ± {100 * m.standard_error:.1f} | "
        + ", ".join(f"{kind} {m.first_errors[kind]}" for kind in ERROR_TYPES if kind in m.first_errors)
        + " |"
        for m in measurements
    ]
    card = MODEL_CARD.format(
        num_parameters=f"{Qwen3ForCausalLM.from_pretrained(path).num_parameters():,}",
        rows="\n".join(rows),
        recipe="\n".join(f"- {name}: `{value}`" for name, value in recipe.items()),
        train_cpu_s=train_cpu_s,
        measure_cpu_s=measure_cpu_s,
        seed=seed,
    )
    (path / "README.md").write_text(card, encoding="utf-8")
