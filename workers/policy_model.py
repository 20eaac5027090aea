"""Loading of Hugging Face causal LMs, and the forward passes that learner and teacher share.

Decides what a usable model is: one whose logits are exactly `hidden @ head.T`, with the head of `head_weight`. The
divergences rebuild the teacher's logits from its hidden states in that way, so soft-capped, scaled or biased logits
are refused when the model is loaded, by comparing numbers rather than by a list of architectures.
Must not know Ray, DeepSpeed or the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from trace_rl.config.learner import LearnerSettings
from trace_rl.config.roles import Model
from trace_rl.errors import ModelError
from trace_rl.flops import TransformerShape
from trace_rl.head_loss import Projection
from trace_rl.packing import MicroBatch
from trace_rl.token_layout import Layout, Packed, Padded, SharedPrompts, TokenGrid

Result = TypeVar("Result")

_PROBE_TOKENS = 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""By which two ways to compute the same of a model may differ when it is loaded, relative to its size."""


def states_gap(found: Float[Tensor, "row hidden"], expected: Float[Tensor, "row hidden"]) -> float:
    """The largest difference of two states of the same token, relative to the size of what is expected."""
    return float(((found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)).max())


def load_policy(model: Model, device: torch.device, setting: str = "model.path") -> PreTrainedModel:
    """Load a causal LM in the configured precision, without dropout.

    Args:
        setting: which setting gave the path; named in errors.

    Raises:
        ModelError: it cannot be loaded, or its logits are not `hidden @ head.T`.
    """
    try:
        policy = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=getattr(torch, model.dtype),
            trust_remote_code=model.trust_remote_code,
            attn_implementation=attention_of(model, device),
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        found = "the folder" if Path(model.path).is_dir() else "no folder of that name exists, and the hub name"
        raise ModelError(
            f"{setting}: {found} {model.path!r} cannot be loaded as a causal language model ({error}); give a folder "
            "with config.json and safetensors, or the hub name of a model that transformers.AutoModelForCausalLM knows"
        ) from error
    policy.to(device)
    _disable_dropout(policy)
    check_head(policy, model.path, setting)
    return policy


def attention_of(model: Model, device: torch.device) -> str:
    """Which attention, by transformers' names, a model runs with on a device."""
    if model.attention != "auto":
        return model.attention
    has_flash = device.type == "cuda" and model.dtype == "bfloat16" and is_flash_attn_2_available()
    return "flash_attention_2" if has_flash else "sdpa"


def learner_model(model: Model, settings: LearnerSettings) -> Model:
    """The model as the learner loads it: prompts are shared in torch's attention."""
    return model.model_copy(update={"attention": "sdpa"}) if settings.shares_prompts else model


def is_flash(policy: PreTrainedModel) -> bool:
    """Whether the model's attention computes each of several sequences in one row on its own."""
    return str(policy.config._attn_implementation).startswith("flash_attention")


def layout_of(policy: PreTrainedModel, settings: LearnerSettings) -> Layout:
    """How sequences are laid out for a model's attention under `settings.layout`."""
    shares = settings.sequence_parallel
    if shares > 1:
        # ranks that share sequences drop masks: without flash attention a row must be one sequence, before its padding
        return Packed(multiple_of=shares, max_sequences=None if is_flash(policy) else 1)
    if settings.shares_prompts:
        return SharedPrompts()
    is_packed = settings.layout == "packed" or (settings.layout == "auto" and is_flash(policy))
    return Packed() if is_packed else Padded()


def vocabulary_size(model: Model) -> int:
    """Rows of the output head that a model's own config names, padding included; reads no weights."""
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    return int(config.get_text_config().vocab_size)


def check_head(policy: PreTrainedModel, name: str, setting: str = "model.path") -> None:
    """Refuse a model whose logits are not `hidden @ head.T`.

    Raises:
        ModelError: soft-capping, scaling, a bias or a missing head makes the logits something else.
    """
    head = policy.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise ModelError(f"{setting}: {name!r} has no linear output head; choose a causal language model with one")
    grid = Padded().grid([tuple(range(_PROBE_TOKENS))]).to(policy.device)
    was_training = policy.training
    policy.eval()
    with torch.no_grad():
        actual = policy(input_ids=grid.input_ids, use_cache=False).logits.float()
        hidden = final_hidden(policy, grid)
        rebuilt = (hidden.to(head.weight.dtype) @ head.weight.T).float()
    policy.train(was_training)
    gap = (actual - rebuilt).abs().max().item()
    scale = max(1.0, actual.abs().max().item())
    if not gap <= TOLERANCE[head.weight.dtype] * scale:
        raise ModelError(
            f"{setting}: the logits of {name!r} differ by {gap:.3g} from hidden @ head.T (soft-capping, scaling or a "
            "bias of the head, or weights that are not finite); choose a model with a plain linear head"
        )


def final_hidden(policy: PreTrainedModel, grid: TokenGrid) -> Float[Tensor, "batch time hidden"]:
    """Hidden states after the last norm: what the output head reads."""
    # without a mask transformers tells sequences apart by their position ids
    if grid.shared is not None:
        apart: dict[str, Any] = {"shared_reads": grid.shared}
    else:
        apart = _run_borders(policy, grid) if grid.runs else {"attention_mask": grid.attention_mask}
    output = policy.get_decoder()(
        input_ids=grid.input_ids,
        position_ids=grid.position_ids,
        use_cache=False,
        **apart,
    )
    return output.last_hidden_state


def _run_borders(policy: PreTrainedModel, grid: TokenGrid) -> dict[str, Any]:
    """What flash attention reads of a packed row, or it would look for the borders in every layer."""
    if not is_flash(policy):
        return {}
    borders = torch.tensor([0, *accumulate(grid.runs)], dtype=torch.int32, device=grid.input_ids.device)
    longest = max(grid.runs)
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def head_weight(policy: PreTrainedModel) -> Float[Tensor, "vocab hidden"]:
    """The output head (under ZeRO-3 only a placeholder, unless it is gathered)."""
    return policy.get_output_embeddings().weight


def transformer_shape(model: PreTrainedModel, vocab_size: int) -> TransformerShape:
    """What a loaded model's work depends on, under a head of `vocab_size` rows."""
    config = model.config.get_text_config()
    decoder = model.get_decoder()
    looked_up = (each.weight for each in decoder.modules() if isinstance(each, nn.Embedding))
    heads = config.num_attention_heads
    return TransformerShape(
        num_layer_parameters=sum(each.numel() for each in decoder.parameters()) - sum(map(Tensor.numel, looked_up)),
        num_layers=config.num_hidden_layers,
        attention_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden=head_weight(model).shape[1],
        vocab=vocab_size,
    )


class RowModel(nn.Module):
    """The policy as the learner runs it: hands over the states that predict response tokens, and the output head.

    One module for training and scoring, because ZeRO-3 gathers and releases weights by the hooks of the module that
    its engine wraps; what is done with states and head comes in as a function. The head's module is called with it, so
    that the head is whole while the function runs, and is gathered once for all of it.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy
        head = policy.get_output_embeddings()
        head.forward = lambda states, function: function(Projection(states, head.weight))

    def forward(self, micro_batch: MicroBatch, objective: Callable[[Projection, MicroBatch], Result]) -> Result:
        """Return `objective(projection, micro_batch)`; the head is called even without rows, as on every rank."""
        hidden = final_hidden(self.policy, micro_batch.grid)
        states = hidden.flatten(0, 1)[micro_batch.row_index]
        return self.policy.get_output_embeddings()(states, lambda projection: objective(projection, micro_batch))


def _disable_dropout(policy: PreTrainedModel) -> None:
    """The ratio to the sampler's log-probs means nothing under dropout."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
