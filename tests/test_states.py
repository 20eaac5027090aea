"""States as arrays: the bits that went in come out, and bits of bfloat16 cannot be mistaken for numbers."""

import io
import pickle

import numpy as np
import pytest
import torch

from trace_rl.head_loss import Projection
from trace_rl.states import BFLOAT16, states_array, states_tensor

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def states(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)).to(dtype)


@PRECISIONS
def test_bits_survive_cutting_joining_and_every_way_of_sending(dtype: torch.dtype) -> None:
    first, second = states(3, dtype), states(5, dtype)
    joined = np.concatenate([states_array(first)[[2, 0]], states_array(second[:, :]), states_array(first[:0])])
    saved = io.BytesIO()
    torch.save({"hidden": joined}, saved)
    saved.seek(0)
    sent = [
        joined,
        pickle.loads(pickle.dumps(joined, protocol=5)),
        torch.load(saved, weights_only=False)["hidden"],
    ]
    for array in sent:
        found = states_tensor(array)
        assert found.dtype == dtype and torch.equal(found, torch.cat([first[[2, 0]], second]))


def test_a_bfloat16_number_takes_two_bytes_and_odd_ones_keep_their_bits() -> None:
    odd = torch.tensor([[0.0, -0.0, float("inf"), float("nan")]], dtype=torch.bfloat16)
    array = states_array(odd)
    assert array.nbytes == 2 * 4
    assert states_tensor(array).view(torch.int16).tolist() == odd.view(torch.int16).tolist()


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_do_not_tell_how_the_states_of_a_bfloat16_teacher_travelled(head_dtype: torch.dtype) -> None:
    computed = states(6, torch.bfloat16)
    head = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).to(head_dtype)
    sent = Projection(states_tensor(states_array(computed)), head).logits()
    assert torch.equal(sent, Projection(computed.float(), head).logits())


def test_bits_are_not_numbers() -> None:
    array = states_array(states(2, torch.bfloat16))
    with pytest.raises(TypeError):
        array + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="array element"):
        array.astype(np.float32)
    with pytest.raises(TypeError, match="could not be promoted"):
        np.concatenate([array, np.zeros((1, 4), dtype=np.float32)])
    assert array.dtype == BFLOAT16
