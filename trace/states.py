"""Hidden states as arrays that are stored, cut, joined and sent, in the precision in which a model computed them.

numpy has no bfloat16. Its numbers travel as their bits, in a dtype whose one field names what they are. Such arrays
join only with their own kind, and numpy refuses to calculate with them or to cast them, so bits are never taken for
numbers. Must not know whose states they are.

Invariant: `states_tensor(states_array(x))` has the dtype of x and its very bits.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

BFLOAT16: Final = np.dtype([("bfloat16", "V2")])
"""Numbers in bfloat16, as bits."""


def states_array(states: Float[Tensor, "row hidden"]) -> Shaped[np.ndarray, "row hidden"]:
    """The states in CPU memory, behind numpy's interface."""
    states = states.detach().cpu()
    if states.dtype == torch.bfloat16:
        return states.view(torch.int16).numpy().view(BFLOAT16)
    return states.numpy()


def states_tensor(array: Shaped[np.ndarray, "row hidden"]) -> Float[Tensor, "row hidden"]:
    """What `states_array` was given; shares memory with the array."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
