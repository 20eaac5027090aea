"""Which stretch of every parameter a learner rank holds, under each ZeRO stage, and how it is replaced.

Decides where DeepSpeed 0.19.8 keeps the float32 weights and moments that a rank steps: ZeRO-0 in the parameters
themselves, ZeRO 1 and 2 in a stretch of all of them behind each other, ZeRO-3 in an equal part of each. A stretch is
known by the name of its parameter and where it begins in it, which no stage and no number of ranks changes. Must not
know files.

Invariant: over all ranks, the parts that are written hold every value of every parameter once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every value."""


@dataclass(frozen=True)
class Part:
    """A stretch of a flattened parameter that this rank holds."""

    name: str
    start: int
    """Where it begins in the parameter."""
    weight: Tensor
    """[values] a view; of a trained parameter in float32, of one that is not trained in its own precision."""
    stepped: Tensor | None
    """What the optimizer steps, of which `weight` is a stretch; None where the parameter is not trained."""
    offset: int
    """Where it begins in that."""
    is_written: bool
    """Whether it is this rank that writes it; other ranks may hold it too."""

    def moment(self, optimizer: torch.optim.Optimizer, name: str) -> Tensor:
        """[values] a view into the optimizer's state, which there is after the first step."""
        assert self.stepped is not None
        return optimizer.state[self.stepped][name].view(-1).narrow(0, self.offset, self.weight.numel())

    def steps_taken(self, optimizer: torch.optim.Optimizer) -> int:
        """Steps that the optimizer has taken with it; 0 where nothing is trained."""
        return 0 if self.stepped is None else int(optimizer.state.get(self.stepped, {}).get("step", 0))


def optimizer_of(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The AdamW below DeepSpeed's wrapping."""
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def parts_of(engine: deepspeed.DeepSpeedEngine) -> Iterator[Part]:
    """The parts of this rank in the order of the parameters; not while the states are put away."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for index, (name, parameter) in enumerate(engine.module.named_parameters()):
        is_turn = index % world_size == rank
        if hasattr(parameter, "ds_id"):
            yield from _partitioned(engine.optimizer, name, parameter, rank)
        elif not parameter.requires_grad:
            yield Part(name, 0, parameter.detach().view(-1), None, 0, is_turn)
        elif not engine.zero_optimization():
            yield Part(name, 0, parameter.detach().view(-1), parameter, 0, is_turn)
        elif (mapping := parameter._hp_mapping) is not None:
            (stepped,) = optimizer_of(engine).param_groups[mapping.param_group_index]["params"]
            place = mapping.hp_fragment_address
            weight = stepped.detach().narrow(0, place.start, place.numel)
            yield Part(name, mapping.lp_fragment_address.start, weight, stepped, place.start, True)


def shapes_of(engine: deepspeed.DeepSpeedEngine) -> dict[str, list[int]]:
    """The whole parameters by name."""
    return {name: list(getattr(each, "ds_shape", each.shape)) for name, each in engine.module.named_parameters()}


def set_steps(optimizer: torch.optim.Optimizer, stepped: Tensor, steps: int) -> None:
    """Make room for the moments of what the optimizer steps, as it would have after so many steps."""
    if steps == 0:
        optimizer.state.pop(stepped, None)
        return
    is_fused = any(group["fused"] for group in optimizer.param_groups)  # which counts beside the weights
    place = stepped.device if is_fused else torch.device("cpu")
    state = optimizer.state[stepped]
    state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=place)
    for name in MOMENTS:
        state[name] = torch.zeros_like(stepped, memory_format=torch.preserve_format).detach()


def release(engine: deepspeed.DeepSpeedEngine) -> None:
    """Before parts are replaced: forget what was gathered of partitioned parameters."""
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_prologue()


def refresh(engine: deepspeed.DeepSpeedEngine) -> None:
    """After parts were replaced: make the model's weights of them; collective."""
    zero: Any = engine.optimizer
    if engine.zero_optimization_partition_weights():
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
    elif engine.zero_optimization():
        zero.update_lp_params()


def set_schedule(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """Put the learning-rate schedule to where it is after so many steps."""
    schedule = engine.lr_scheduler
    schedule.last_epoch = steps
    rules = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, rule in rules:
        group["lr"] = base * rule(steps)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _partitioned(zero: Any, name: str, parameter: Any, rank: int) -> Iterator[Part]:
    """The part of one parameter under ZeRO-3: the last ranks have less of it, or nothing but padding."""
    size = parameter.ds_tensor.numel()
    start = rank * size
    count = min(size, parameter.ds_numel - start)
    if count <= 0:
        return
    if not parameter.requires_grad:
        yield Part(name, start, parameter.ds_tensor.detach().view(-1).narrow(0, 0, count), None, 0, True)
        return
    group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
    stepped = zero.fp32_partitioned_groups_flat[group]
    yield Part(name, start, stepped.detach().narrow(0, offset, count), stepped, offset, True)
