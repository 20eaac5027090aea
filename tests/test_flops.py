"""Operations of a forward pass by hand, and against those that torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from trace_rl.flops import TransformerShape
from trace_rl.workers.policy_model import transformer_shape

SHAPE = TransformerShape(num_layer_parameters=100, num_layers=2, attention_width=8, hidden=4, vocab=10)


def test_operations_by_hand() -> None:
    # layers 2 x 100 x 5 = 1000; attention 2 x 2 layers x 8 x 25 = 800; head 2 x 4 x 10 x 3 = 240
    assert SHAPE.forward_flops(5, 3) == 1000 + 800 + 240
    assert SHAPE.forward_flops(5, 0) == 1800
    assert SHAPE.forward_flops(0, 0) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_takes_what_torch_counts(tied: bool) -> None:
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    model, length = Qwen3ForCausalLM(config).eval(), 11
    shape = transformer_shape(model, 97)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(length).unsqueeze(0), use_cache=False)
    # torch leaves out the norms, 2 x 48 + 2 x 32 a layer and 48 at the end, and counts the half of the attention that
    # the mask hides
    norms = 3 * (2 * 48 + 2 * 32) + 48
    hidden_half = 2 * 3 * (4 * 32) * length**2
    assert counter.get_total_flops() == shape.forward_flops(length, length) - 2 * norms * length + hidden_half
