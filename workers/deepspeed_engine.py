"""The DeepSpeed engine of one learner rank: how it is configured, fed and read.

Decides everything that is particular to DeepSpeed, so that a step has one meaning for every ZeRO stage: the gradient
is that of the plain sum of all micro-batch losses over all ranks, accumulated and reduced in float32, clipped by its
global norm, and a step whose norm is not finite is not applied.
Must not know batches, losses, Ray or the run. Importing it imports DeepSpeed, which reads the process environment.
"""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from transformers import PreTrainedModel, get_scheduler

from trace_rl.config.learner import LearnerSettings
from trace_rl.errors import ConfigError

_ON_CPU = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
_OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "optimizer": {"offload_optimizer": _ON_CPU},
    "all": {"offload_optimizer": _ON_CPU, "offload_param": _ON_CPU},
}


def join_process_group(store: TCPStore, rank: int, world_size: int, timeout_s: float) -> None:
    """Join the learner's process group and hand it to DeepSpeed."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by the names that torch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # DeepSpeed reads these instead of the group; every rank is an actor with at most one visible device.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
    # The shared-memory op serves inference only; building it takes minutes at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_s)
    backend = get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False, verbose=False)


def share_sequences(policy: PreTrainedModel, num_ranks: int) -> dist.ProcessGroup | None:
    """Let every `num_ranks` neighbouring ranks compute attention over the positions of all of them; collective.

    Inside attention each rank has all positions and its part of the heads (DeepSpeed-Ulysses, arXiv:2309.14509). The
    group is not given to the engine, for which all ranks are data parallel: gradients are summed over all of them.

    Raises:
        ConfigError: the model's heads cannot be divided among the ranks.
    """
    if num_ranks == 1:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    try:
        groups = UlyssesSPAttentionHF.register_with_transformers(
            policy, policy.config._attn_implementation, num_ranks, micro_batch_size=1
        )
    except ValueError as error:
        raise ConfigError(
            f"learner.sequence_parallel is {num_ranks}, which this model or its attention does not allow ({error}); "
            "choose a divisor of its attention heads, and an attention other than eager"
        ) from error
    return groups.get_sequence_parallel_group()


def device() -> torch.device:
    """The device of this rank."""
    return torch.device(get_accelerator().current_device_name())


def build_engine(
    module: nn.Module, settings: LearnerSettings, is_bfloat16: bool, num_optimizer_steps: int
) -> deepspeed.DeepSpeedEngine:
    """Wrap a module, whose parameters that require a gradient are trained with torch's AdamW.

    Args:
        num_optimizer_steps: optimizer steps of the whole run, where the learning-rate schedule ends.
    """
    chosen = settings.optimizer
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=chosen.learning_rate,
        betas=chosen.betas,
        eps=chosen.epsilon,
        weight_decay=chosen.weight_decay,
        fused=settings.offload != "none" or None,  # steps on the CPU, where the plain loop takes several times as long
    )
    scheduler = get_scheduler(
        {"constant": "constant_with_warmup"}.get(settings.schedule.type, settings.schedule.type),
        optimizer,
        num_warmup_steps=settings.schedule.warmup_steps,
        num_training_steps=num_optimizer_steps,
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=engine_config(settings, is_bfloat16),
        dist_init_required=False,
    )
    return engine


def engine_config(settings: LearnerSettings, is_bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    The number of micro-batches differs from step to step, so accumulation steps stay 1 (no division of the loss) and
    `accumulate` tells the engine which backward pass is the last.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.optimizer.max_grad_norm,
        "bf16": {"enabled": is_bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": settings.zero_stage, **_OFFLOADS[settings.offload]},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def accumulate(engine: deepspeed.DeepSpeedEngine, loss: Tensor, is_last: bool) -> None:
    """Add the gradient of one micro-batch; all ranks call it the same number of times.

    DeepSpeed averages gradients over ranks; the factor makes it the sum.
    """
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss * dist.get_world_size())


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> float:
    """Clip, step, advance the schedule; return the global gradient norm before clipping.

    A norm that is not finite comes back as nan, and then no weight has changed.
    """
    if engine.zero_optimization():
        engine.step()
        norm = float(engine.get_global_grad_norm())
        return norm if engine.was_step_applied() and norm >= 0 else float("nan")
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not torch.isfinite(torch.tensor(norm)):
        engine.zero_grad()
        return float("nan")
    engine.step()
    return norm
