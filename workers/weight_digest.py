"""The digest by which sender and receivers agree on what travelled: names, shapes, dtypes and contents, in order.

Decides what it takes for two sides to hold the same weights; it must not know how weights travel.

Invariant: contents are summed where they lie, so that an accelerator's weights never come to the host for it. Both
sides of every transport hold them in the same kind of memory: xxh3 (128 bits) sums the host's, `device_checksum` an
accelerator's. Neither is a cryptographic hash: they find faults, not forgers.
"""

from __future__ import annotations

import hashlib

import torch
import xxhash
from torch import Tensor

_SLICE = 1 << 22
_MODULUS = 1 << 64


class WeightDigest:
    """Running digest of weights, in the order in which they are given."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._sums: list[bytes | Tensor] = []

    def update(self, name: str, tensor: Tensor) -> None:
        """Take in one weight; does not wait for an accelerator."""
        self._hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.device.type == "cpu":
            self._sums.append(xxhash.xxh3_128_digest(_bytes(tensor).numpy().data))
        else:
            self._sums.append(device_checksum(tensor))

    def hexdigest(self) -> str:
        """Digest of everything so far; waits for the accelerator where there is one."""
        final = self._hash.copy()
        on_device = [total for total in self._sums if isinstance(total, Tensor)]
        fetched = iter(torch.stack(on_device).tolist() if on_device else ())
        for total in self._sums:
            final.update((next(fetched) % _MODULUS).to_bytes(8, "little") if isinstance(total, Tensor) else total)
        return final.hexdigest()


def device_checksum(tensor: Tensor) -> Tensor:
    """sum_i (w[i] ^ (w[i] >> 32)) * (2 i + 1) mod 2**64 over the tensor's bytes as 64-bit words, zeros at the end.

    Mixing a word is reversible and the factors are odd, hence invertible: one changed word changes the sum, and so does
    any exchange of two words of which the lower halves differ. Without the mixing, flips of the highest bits of two
    words, for example the signs of two weights, would cancel out.

    Returns:
        int64 scalar on the tensor's device, not waited for.
    """
    words = _words(tensor)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), _SLICE):  # in slices: it takes several copies of them
        part = words[start : start + _SLICE]
        mixed = part ^ ((part >> 32) & 0xFFFFFFFF)  # the shift of signed words brings in their sign
        total += (mixed * (2 * torch.arange(start, start + part.numel(), device=words.device) + 1)).sum()
    return total


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes as int64 words, filled up with zeros."""
    flat = _bytes(tensor)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)
