"""A last layer that works on wanted tokens alone: the same states, less work, and models that cannot be treated so."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from trace_rl.token_layout import Padded, SharedPrompts, TokenGrid
from trace_rl.workers import shared_attention
from trace_rl.workers.last_layer import LastLayer
from trace_rl.workers.policy_model import final_hidden

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
PROBE = Padded().grid([(1, 2, 3, 4), (1, 2, 5)])
GRID = Padded().grid([tuple(range(9)), (5, 3, 1), (7, 7, 7, 7, 7)])
ROWS = torch.tensor([3, 8, 10, 11, 22])  # of 3 x 9; the second sequence ends at 11, the third at 22


@pytest.fixture(params=[Qwen3ForCausalLM, LlamaForCausalLM])
def policy(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    torch.manual_seed(0)
    config = {Qwen3ForCausalLM: Qwen3Config, LlamaForCausalLM: LlamaConfig}[request.param]
    yield request.param(config(**SIZES)).eval()


def prepared(policy: PreTrainedModel) -> LastLayer:
    return LastLayer(policy, partial(final_hidden, policy), PROBE)


@torch.no_grad()
def states(policy: PreTrainedModel, grid: TokenGrid = GRID) -> torch.Tensor:
    return final_hidden(policy, grid).flatten(0, 1)


def test_what_is_read_is_the_same_and_the_rest_is_not_computed(policy: PreTrainedModel) -> None:
    expected = states(policy)
    last_layer = prepared(policy)
    with FlopCounterMode(display=False) as whole:
        assert torch.equal(states(policy), expected)  # nothing was said about what is read
    with FlopCounterMode(display=False) as spared, last_layer.reading(ROWS):
        found = states(policy)
    torch.testing.assert_close(found[ROWS], expected[ROWS])
    assert not torch.allclose(found[0], expected[0])
    assert torch.equal(states(policy), expected)
    # queries 32 x 64, their output 64 x 32 and an MLP 3 x 32 x 80
    assert last_layer.num_parameters == 2 * 32 * 64 + 3 * 32 * 80
    spared_flops = 2 * last_layer.num_parameters * (27 - len(ROWS))
    assert whole.get_total_flops() - spared.get_total_flops() == spared_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", shared_attention.NAME])
def test_a_teachers_layouts_read_the_same(policy: PreTrainedModel, attention: str, dtype: torch.dtype) -> None:
    policy.to(dtype)
    if attention == shared_attention.NAME:
        assert not shared_attention.prepare(policy)
    layout = SharedPrompts() if attention == shared_attention.NAME else Padded()
    sequences, prompts = [(1, 2, 3, 4, 5), (1, 2, 3, 9), (7, 8, 9, 1, 2, 3, 4)], [3, 3, 2]
    grid = layout.grid(sequences, prompts)
    rows = torch.tensor([grid.starts[0] + 2, grid.starts[1] + 3, grid.starts[2] + 4])
    expected = states(policy, grid)[rows]
    last_layer = LastLayer(policy, partial(final_hidden, policy), layout.grid(sequences[:2], prompts[:2]))
    assert last_layer.num_parameters > 0
    with last_layer.reading(rows):
        found = states(policy, grid)[rows]
    torch.testing.assert_close(found, expected)


def test_a_layer_with_a_convolution_is_left_whole(policy: PreTrainedModel) -> None:
    policy.get_decoder().layers[-1].convolution = nn.Conv1d(1, 1, 2)
    assert prepared(policy).num_parameters == 0


class Mixing(nn.Module):
    """An MLP in which each token depends on the one before."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.roll(1, dims=1)


class Telling(nn.Module):
    """An MLP that returns more than its output."""

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        return tokens, None


def test_a_layer_whose_mlp_mixes_tokens_is_left_whole(
    policy: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    policy.get_decoder().layers[-1].mlp = Mixing()
    expected = states(policy)
    with caplog.at_level("INFO"):
        last_layer = prepared(policy)
    assert last_layer.num_parameters == 0 and "is off by" in caplog.text
    with last_layer.reading(ROWS):
        assert torch.equal(states(policy), expected)


def test_a_layer_whose_mlp_returns_something_else_is_left_whole(caplog: pytest.LogCaptureFixture) -> None:
    class Taking(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens + self.mlp(tokens)[0]

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Taking(Telling())])

        def get_decoder(self) -> nn.Module:
            return self

    decoder: Any = Decoder()

    @torch.no_grad()
    def passed(grid: TokenGrid) -> torch.Tensor:
        tokens = grid.input_ids.unsqueeze(-1).float()
        return decoder.layers[0](tokens)

    expected = passed(GRID)
    with caplog.at_level("INFO"):
        last_layer = LastLayer(decoder, passed, PROBE)
    assert last_layer.num_parameters == 0 and "cannot be computed for some tokens alone" in caplog.text
    with last_layer.reading(ROWS):
        assert torch.equal(passed(GRID), expected)
