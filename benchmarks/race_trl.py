"""TRL's GRPOTrainer on what `race.py` hands over; runs in an environment of its own, which has TRL and not us.

    python race_trl.py SPEC.json RESULT.json

Generation is that of the trainer by default (transformers' generate). Evaluations are taken out of the wall time.
"""

from __future__ import annotations

import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PACKAGES = ("trl", "transformers", "torch", "accelerate")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def is_right(text: str, answer: str) -> bool:
    """Whether the last boxed answer is the one that is sought; answers of the task are whole numbers."""
    found = BOXED.findall(text)
    return bool(found) and found[-1].strip() == answer


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    texts = [each[-1]["content"] if isinstance(each, list) else each for each in completions]
    return [float(is_right(text, sought)) for text, sought in zip(texts, answer, strict=True)]


class Stopwatch(TrainerCallback):
    """Seconds of each step, and the held-out accuracy on the way, whose own time does not count."""

    def __init__(self, spec: dict[str, Any], tokenizer: Any) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self.seconds: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.rewards: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._evaluate(0, model)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        every = self._spec["evaluate_every"]
        if every and state.global_step % every == 0:
            self._evaluate(state.global_step, model)
        self._started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            self.rewards.append(logs["reward"])

    def _evaluate(self, step: int, model: Any) -> None:
        if not self._spec["evaluate_every"]:
            return
        rows, tokenizer = self._spec["heldout"], self._tokenizer
        texts = [
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        was_training = model.training
        model.eval()
        rng = torch.random.get_rng_state()  # an evaluation must not change what is trained on
        torch.manual_seed(step)
        with torch.no_grad():
            found = model.generate(
                **{name: value.to(model.device) for name, value in batch.items() if name != "token_type_ids"},
                max_new_tokens=self._spec["max_response_tokens"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
        torch.random.set_rng_state(rng)
        model.train(was_training)
        written = tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [is_right(text, row["answer"]) for text, row in zip(written, rows, strict=True)]
        self.curve.append({"step": step, "train_s": sum(self.seconds), "accuracy": sum(right) / len(right)})


def main(spec_file: Path, result: Path) -> None:
    """Train, and write what it took."""
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    completions = spec["prompts_per_step"] * spec["samples_per_prompt"]
    size = min(completions, spec["micro_batch"])
    config = GRPOConfig(
        output_dir=str(result.parent / "trl"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=completions // size,
        num_generations=spec["samples_per_prompt"],
        max_completion_length=spec["max_response_tokens"],
        max_steps=spec["steps"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        temperature=1.0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="grpo",
        scale_rewards="group",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        seed=spec["seed"],
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    watch = Stopwatch(spec, tokenizer)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(spec["train"]),
        callbacks=[watch],
    )
    trainer.train()
    found = {
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "seconds": watch.seconds,
        "curve": watch.curve,
        "rewards": watch.rewards,
    }
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
