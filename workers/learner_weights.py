"""The weights that a learner rank gives to others: under which names, and how sharded ones are gathered.

Names are those of the Hugging Face checkpoint, whatever adapters or shards the learner has: engines, teachers and
checkpoints see a plain model. Must not know who gets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trace_rl.workers.adapters import adapted_linears


@dataclass(frozen=True)
class FullWeight:
    """One weight as others know it."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    """What it is made of; the first has its shape and dtype."""
    make: Callable[[], Tensor]
    """Called while the parameters are whole."""

    @staticmethod
    def of(name: str, parameter: nn.Parameter) -> FullWeight:
        """The parameter itself."""
        return FullWeight(name, (parameter,), parameter.detach)

    @property
    def shape(self) -> tuple[int, ...]:
        """Whether or not ZeRO-3 has partitioned it."""
        return tuple(getattr(self.parameters[0], "ds_shape", self.parameters[0].shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    @property
    def nbytes(self) -> int:
        """Of all parameters that it is made of."""
        shapes = (getattr(parameter, "ds_shape", parameter.shape) for parameter in self.parameters)
        return sum(
            torch.Size(shape).numel() * parameter.element_size()
            for shape, parameter in zip(shapes, self.parameters, strict=True)
        )


def model_weights(policy: PreTrainedModel) -> list[FullWeight]:
    """All weights of the model, adapters added to them, tied ones once."""
    adapted = {f"{layer.name}.weight": layer for layer in adapted_linears(policy)}
    weights = []
    for raw_name, parameter in policy.named_parameters():
        if ".lora_" in raw_name:
            continue
        name = raw_name.replace(".base_layer.", ".")
        if name in adapted:
            layer = adapted[name]
            weights.append(FullWeight(name, (parameter, layer.down, layer.up), layer.merged))
        else:
            weights.append(FullWeight.of(name, parameter))
    return weights


def adapter_weights(policy: PreTrainedModel) -> list[FullWeight]:
    """The adapters alone, by the names of peft's files."""
    return [
        FullWeight.of(name, parameter)
        for layer in adapted_linears(policy)
        for name, parameter in zip(layer.adapter_names, (layer.down, layer.up), strict=True)
    ]


def gathered_buckets(weights: Sequence[FullWeight], bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield full weights in order, in buckets of at most `bucket_bytes` (a larger one alone); collective under ZeRO-3.

    A bucket is valid until the next one is asked for. Every rank must run the iterator to its end.
    """
    bucket: list[FullWeight] = []
    size = 0
    for weight in weights:
        if bucket and size + weight.nbytes > bucket_bytes:
            yield from _gather(bucket)
            bucket, size = [], 0
        bucket.append(weight)
        size += weight.nbytes
    if bucket:
        yield from _gather(bucket)


def _gather(bucket: Sequence[FullWeight]) -> Iterator[list[tuple[str, Tensor]]]:
    parameters = [parameter for weight in bucket for parameter in weight.parameters]
    is_partitioned = any(hasattr(parameter, "ds_id") for parameter in parameters)
    with deepspeed.zero.GatheredParameters(parameters) if is_partitioned else nullcontext():
        yield [(weight.name, weight.make()) for weight in bucket]
