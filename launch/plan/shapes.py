"""What a model's config.json says of its size: parameters, weights by name, and the widths that memory depends on.

The model is built without its weights (torch's meta device), so that names, shapes and counts are those that learner,
engines and checkpoints will have, whatever the architecture. Must not know roles, GPUs or how memory is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trace_rl.config.learner import LearnerSettings, Lora
from trace_rl.config.roles import Model
from trace_rl.errors import ModelError, first_line
from trace_rl.flops import TransformerShape
from trace_rl.token_layout import Layout
from trace_rl.workers.adapters import add_adapters
from trace_rl.workers.policy_model import attention_of, layout_of, learner_model, transformer_shape
from trace_rl.workers.weight_wire import WeightManifest


@dataclass(frozen=True)
class ModelShape:
    """A causal LM without its weights."""

    weights: WeightManifest
    """All weights in the order in which they are sent, tied ones once."""
    adapters: WeightManifest
    """Those of learner.lora; none where all weights are trained."""
    num_layers: int
    hidden: int
    intermediate: int
    """Width of the MLP that a token passes, or of all its experts together."""
    query_width: int
    """Query heads times the size of a head."""
    num_kv_heads: int
    head_dim: int
    vocab: int
    """Rows of the output head."""
    bytes_per_value: int
    """4 for float32, 2 for bfloat16."""
    is_flash: bool
    """Whether the learner's attention is flash attention, as far as this machine can tell."""
    layout: Layout
    """How the learner lays out sequences for it."""
    transformer: TransformerShape
    """By which the work of a pass is counted; of a mixture that of all experts."""
    is_mixture: bool
    """Whether a token passes some of many experts, so that its work does not follow from the number of weights."""

    @property
    def num_parameters(self) -> int:
        """Of the model without adapters, tied ones once."""
        return self.weights.nbytes // self.bytes_per_value

    @property
    def num_trained(self) -> int:
        """What the optimizer holds."""
        return (self.adapters.nbytes or self.weights.nbytes) // self.bytes_per_value

    @property
    def key_width(self) -> int:
        """Heads of keys times the size of a head; values have as many."""
        return self.num_kv_heads * self.head_dim


def model_shape(
    model: Model, settings: LearnerSettings, device: torch.device, setting: str = "model.path"
) -> ModelShape:
    """The shape of a resolved model, read from its config.json alone.

    Args:
        settings: of the learner that trains it; `LearnerSettings()` for a model that is only read.
        device: what it runs on.
        setting: which setting gave the path; named in errors.

    Raises:
        ModelError: there is no config that makes a causal LM.
        ConfigError: the adapters do not fit the model.
    """
    policy = _without_weights(model, setting)
    text = policy.config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    dtype = getattr(torch, model.dtype)
    weights = WeightManifest.of((name, tuple(each.shape), dtype) for name, each in policy.named_parameters())
    policy.config._attn_implementation = attention_of(learner_model(model, settings), device)
    transformer = transformer_shape(policy, text.vocab_size)  # before adapters are added
    layout, is_flash = layout_of(policy, settings), policy.config._attn_implementation.startswith("flash_attention")
    return ModelShape(
        weights=weights,
        adapters=_adapters(policy, settings.lora, dtype),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=_intermediate(text),
        query_width=heads * head_dim,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab=text.vocab_size,
        bytes_per_value=dtype.itemsize,
        is_flash=is_flash,
        layout=layout,
        transformer=transformer,
        is_mixture=bool(getattr(text, "num_experts_per_tok", None)),
    )


def _without_weights(model: Model, setting: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        with torch.device("meta"):
            policy: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=model.trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{setting}: the shape of {model.path!r} cannot be read ({first_line(error)}); give a folder whose "
            "config.json transformers.AutoModelForCausalLM knows, or a hub name that can be reached"
        ) from error
    return policy


def _adapters(policy: PreTrainedModel, settings: Lora, dtype: torch.dtype) -> WeightManifest:
    if not settings.rank:
        return WeightManifest.of(())
    add_adapters(policy, settings, seed=0)
    return WeightManifest.of(
        (name, tuple(each.shape), dtype) for name, each in policy.named_parameters() if each.requires_grad
    )


def _intermediate(text: object) -> int:
    """Width of the gated MLP; of a mixture, of the experts that a token passes."""
    experts = getattr(text, "num_experts_per_tok", None)
    width = getattr(text, "moe_intermediate_size", None) if experts else None
    if experts and width:
        return int(experts * width)
    return int(getattr(text, "intermediate_size", None) or 4 * getattr(text, "hidden_size", 0))
