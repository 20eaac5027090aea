"""The digest by which sender and receivers agree on what travelled: names, shapes, dtypes and contents, in order.

Decides what it takes for two sides to hold the same weights; it must not know how weights travel.

Invariant: contents are summed where they lie, with the same result on every device, so that an accelerator's weights
never come to the host for it. The sum is no cryptographic hash: it finds faults, not forgers. Any change of one 64-bit
word of a tensor changes it, and so does any exchange of two words of which the lower halves differ.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_SLICE = 1 << 16  # words summed at a time: they, their weights and the mixed copy stay in a core's cache
_WEIGHTS = np.arange(1, 2 * _SLICE, 2, dtype=np.uint64)
_MODULUS = 1 << 64


class WeightDigest:
    """Running digest of weights, in the order in which they are given."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._sums: list[int | Tensor] = []

    def update(self, name: str, tensor: Tensor) -> None:
        """Take in one weight; does not wait for an accelerator."""
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        words = _words(tensor)
        self._sums.append(_host_checksum(words) if words.device.type == "cpu" else device_checksum(words))

    def hexdigest(self) -> str:
        """Digest of everything so far; waits for the accelerator where there is one."""
        final = self._hash.copy()
        on_device = [total for total in self._sums if isinstance(total, Tensor)]
        fetched = iter(torch.stack(on_device).tolist() if on_device else ())
        for total in self._sums:
            final.update(((next(fetched) if isinstance(total, Tensor) else total) % _MODULUS).to_bytes(8, "little"))
        return final.hexdigest()


def checksum(tensor: Tensor) -> int:
    """sum_i (w[i] ^ (w[i] >> 32)) * (2 i + 1) mod 2**64 over the tensor's bytes as 64-bit words, zeros at the end.

    Mixing a word is reversible and the weights are odd, hence invertible: one changed word changes the sum. Without the
    mixing, flips of the highest bits of two words, for example the signs of two weights, would cancel out.
    """
    words = _words(tensor)
    return _host_checksum(words) if words.device.type == "cpu" else int(device_checksum(words).item()) % _MODULUS


def device_checksum(words: Tensor) -> Tensor:
    """`checksum` of int64 words [n] as an int64 scalar on their device, not waited for."""
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), 1 << 22):  # in slices: it takes several copies of them
        part = words[start : start + (1 << 22)]
        mixed = part ^ ((part >> 32) & 0xFFFFFFFF)  # the shift of signed words brings in their sign
        total += (mixed * (2 * torch.arange(start, start + part.numel(), device=words.device) + 1)).sum()
    return total


def _host_checksum(words: Tensor) -> int:
    numbers = words.numpy().view(np.uint64)
    mixed = np.empty(min(_SLICE, numbers.size), dtype=np.uint64)
    total = 0
    for start in range(0, numbers.size, _SLICE):
        part = numbers[start : start + _SLICE]
        slot = mixed[: part.size]
        np.right_shift(part, 32, out=slot)
        np.bitwise_xor(slot, part, out=slot)
        # sum m * (2 (start + j) + 1) = sum m * (2 j + 1) + 2 start * sum m
        total += int(np.dot(slot, _WEIGHTS[: part.size])) + 2 * start * int(np.add.reduce(slot))
    return total % _MODULUS


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as int64 words, filled up with zeros."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)
