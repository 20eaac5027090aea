"""What a learner rank moves out of its GPU while engines have it, and back, by DeepSpeed's own offloading of states.

Decides what `states` and `weights` are under each ZeRO stage. Must not know who has the GPU meanwhile.

Moving changes no number: a rank that put everything away and took it back trains on as if nothing had been.
DeepSpeed 0.19.8 offloads every state under ZeRO 1 and 2; under ZeRO-3 it refuses float32 weights and moments of
optimizers other than its own fused Adam, so those are moved here in the same way. Under ZeRO-0 it offloads nothing,
and what learner.offload keeps in CPU memory anyway is left where it is.
"""

from __future__ import annotations

from typing import cast

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import offload_optimizer_states, reload_optimizer_states

_TRAINED = [OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states]
_GRADIENTS = [OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer]


def put_away(engine: deepspeed.DeepSpeedEngine, part: str) -> None:
    """Move to CPU memory the `states` (float32 weights, moments, gradients), or then the `weights` of the model."""
    if _keeps_weights_on_cpu(engine):
        get_accelerator().empty_cache()
        return
    include = [OffloadStateTypeEnum.lp_params]
    if part == "states":  # all but the weights
        include = _GRADIENTS if _is_moved_here(engine) else [*_TRAINED, *_GRADIENTS]
        if _is_moved_here(engine):
            _move_trained(engine, "cpu")
    engine.offload_states(include, OffloadDeviceEnum.cpu, pin_memory=torch.cuda.is_available())
    get_accelerator().empty_cache()  # activations of the last step too


def take_back(engine: deepspeed.DeepSpeedEngine) -> None:
    """Move everything back to where it was."""
    if _keeps_weights_on_cpu(engine):
        return
    engine.reload_states()
    if _is_moved_here(engine):
        _move_trained(engine, get_accelerator().current_device_name())


def _keeps_weights_on_cpu(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether learner.offload is all: DeepSpeed then holds nothing on the GPU between steps that it could move."""
    offload = engine.zero_offload_param()
    return offload is not None and offload.device != OffloadDeviceEnum.none


def _is_moved_here(engine: deepspeed.DeepSpeedEngine) -> bool:
    return bool(engine.zero_optimization_partition_weights()) and not engine.zero_use_cpu_optimizer()


def _move_trained(engine: deepspeed.DeepSpeedEngine, device: str) -> None:
    """Float32 weights and moments under ZeRO-3."""
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        flat.data = flat.data.to(device)
    optimizer = cast(torch.optim.Optimizer, engine.optimizer.optimizer)
    if device == "cpu":
        offload_optimizer_states(optimizer, device)
    else:
        reload_optimizer_states(optimizer, device)
