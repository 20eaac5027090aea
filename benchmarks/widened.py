"""The embedded base model at the cost of a larger one: more neurons in its MLPs, which at first add nothing.

A new neuron reads at random and writes with weight 0, so that the wide model writes what the base model writes, and
learns from there with all of its weights. Races need models that have learnt something, of several sizes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

READS, WRITES = ("gate_proj.weight", "up_proj.weight"), ("down_proj.weight",)


def widen(source: Path, neurons: int, folder: Path) -> None:
    """Write the model in `source` with so many neurons in each MLP to `folder`.

    Raises:
        ValueError: it has as many already.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    present = model.config.intermediate_size
    if neurons <= present:
        raise ValueError(f"{source} has {present} neurons in an MLP; {neurons} are not more")
    config = model.config.__class__.from_pretrained(source, intermediate_size=neurons)
    torch.manual_seed(0)  # the new neurons' weights are drawn as those of a new model
    wide = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for (name, old), new in zip(model.named_parameters(), wide.parameters(), strict=True):
            if name.endswith(READS):
                new[:present] = old
            elif name.endswith(WRITES):
                new.zero_()
                new[:, :present] = old
            else:
                new.copy_(old)
    wide.generation_config = model.generation_config
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def num_parameters(folder: Path) -> int:
    """Of a model's files."""
    return sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())
