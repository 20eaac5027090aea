"""Low-rank adapters: how a policy gets them, and how they travel to engines and into checkpoints.

The format is peft's own, which vLLM and peft load as it is. Must not know DeepSpeed, Ray or vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trace_rl.config.learner import Lora
from trace_rl.config.roles import Model
from trace_rl.errors import ConfigError
from trace_rl.workers.weight_digest import WeightDigest

_PREFIX = "base_model.model."
"""What peft puts before the names of modules in its files."""
_NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """Adapters as they travel."""

    weights: Mapping[str, Tensor]
    """By their names in peft's files, on the CPU."""
    config: Mapping[str, Any]
    """Of `adapter_config.json`."""

    def digest(self) -> str:
        """Over names, shapes, dtypes and bytes."""
        digest = WeightDigest()
        for name, weight in self.weights.items():
            digest.update(name, weight)
        return digest.hexdigest()

    def write(self, folder: Path) -> None:
        """Write the two files that peft and vLLM load."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.contiguous() for name, weight in self.weights.items()}
        save_file(weights, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer of the policy with its adapter."""

    name: str
    """Of the layer, as the model without adapters names it."""
    weight: nn.Parameter
    down: nn.Parameter
    """[rank, in]"""
    up: nn.Parameter
    """[out, rank]"""
    scale: float

    def merged(self) -> Tensor:
        """The weight with the adapter added, computed in float32; all three must be whole."""
        added = self.up.detach().float() @ self.down.detach().float()
        return (self.weight.detach().float() + self.scale * added).to(self.weight.dtype)

    @property
    def adapter_names(self) -> tuple[str, str]:
        """Of `down` and `up` in peft's files."""
        return f"{_PREFIX}{self.name}.lora_A.weight", f"{_PREFIX}{self.name}.lora_B.weight"


def add_adapters(policy: PreTrainedModel, settings: Lora, seed: int) -> None:
    """Put adapters that change nothing yet beside the chosen layers, and freeze everything else.

    Raises:
        ConfigError: peft is not installed, no module has such a name, or the output head would get an adapter.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ConfigError(
            f"learner.lora.rank is {settings.rank}, but the package peft cannot be imported ({error}); install "
            "trace-rl[lora], or train all weights with learner.lora.rank=0"
        ) from error
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(policy.config._name_or_path),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same adapters on every rank
        try:
            inject_adapter_in_model(config, policy, adapter_name=_NAME)
        except ValueError as error:
            raise ConfigError(f"learner.lora.target_modules is {targets!r}, which peft refuses ({error})") from error
    if isinstance(policy.get_output_embeddings(), BaseTunerLayer):
        raise ConfigError(
            f"learner.lora.target_modules is {targets!r}, which takes in the output head; the loss multiplies with its "
            "weight and would not see an adapter, so name other modules"
        )


def linear_names(model: Model) -> list[str]:
    """Last parts of the names of a model's linear layers, without the output head; reads no weights."""
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    head = policy.get_output_embeddings()
    layers = (name for name, module in policy.named_modules() if isinstance(module, nn.Linear) and module is not head)
    return sorted({name.rpartition(".")[-1] for name in layers})


def adapted_linears(policy: PreTrainedModel) -> list[AdaptedLinear]:
    """Every layer with an adapter, in the order of the model."""
    return [
        AdaptedLinear(
            name,
            module.base_layer.weight,
            module.lora_A[_NAME].weight,
            module.lora_B[_NAME].weight,
            module.scaling[_NAME],
        )
        for name, module in policy.named_modules()
        if hasattr(module, "lora_A")
    ]


def adapter_config(policy: PreTrainedModel) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    config: dict[str, Any] = policy.peft_config[_NAME].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
