"""Settings of the learner: how batches are run, what is trained, and the optimizer.

This module must not know DeepSpeed or how ranks are started.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trace_rl.config.base import Section


class Optimizer(Section):
    learning_rate: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)


class LearningRateSchedule(Section):
    type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)


class Lora(Section):
    """Low-rank adapters, W + alpha / rank B A (arXiv:2106.09685), by the library peft."""

    rank: int = Field(0, ge=0)
    """0: all weights are trained; otherwise only adapters of this rank. They want a learning rate of 1e-5 to 1e-4."""
    alpha: int = Field(32, ge=1)
    """The adapters' product is scaled by alpha / rank."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of modules as peft reads them; `all-linear`: every linear layer but the output head, which cannot have an
    adapter, because the loss multiplies with its weight."""
    sync: Literal["adapter", "merged"] = "adapter"
    """What engines get: the adapters alone, computed beside the weights as the learner does; or, for models of which
    vLLM cannot load adapters, all weights with the adapters added, which in bfloat16 rounds small updates away."""


class LearnerSettings(Section):
    world_size: int = Field(1, ge=1)
    """Ranks of the learner; the loss does not depend on it."""
    sequence_parallel: int = Field(1, ge=1)
    """Neighbouring ranks that share every sequence (DeepSpeed-Ulysses, arXiv:2309.14509), for responses that are too
    long for one of them; divides world_size and the model's attention heads. Sequences are then packed."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    """Tokens (prompt, response and padding) of one forward on one rank, or on those that share its sequences; the loss
    does not depend on it."""
    tile_mib: int = Field(512, ge=1)
    """Size in float32 of the logits that are alive at a time; at most twice that is held. The loss does not depend on
    it."""
    minibatches_per_step: int = Field(1, ge=1)
    """Optimizer steps on one batch of rollouts; above 1, old log-probs are computed before the first."""
    layout: Literal["auto", "padded", "packed", "shared"] = "auto"
    """`padded`: sequences of similar length in rows of one length. `packed`: all sequences of a micro-batch behind each
    other in one row, without padding; without flash-attn the attention of such a row costs its length squared.
    `shared`: packed, and the prompt of a group is computed once for all of its responses (arXiv:2506.05433), with
    torch's attention. `auto`: packed where model.attention is flash_attention_2, else padded."""
    measured_sequences: Literal["all", "trained"] = "all"
    """Which sequences the learner's metrics are means over, the entropy that the collapse watch reads among them.
    `trained`: those that cannot have a gradient, because all of their group were rewarded alike and no route takes
    them, are left out, which saves a forward pass over them; no gradient changes. Where none has one, all are read."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in CPU memory while it is not used: the optimizer's states and float32 weights (ZeRO 1 to 3), or the
    weights of the model too (ZeRO-3)."""
    lora: Lora = Lora()
    """Adapters to train instead of all weights; teachers and checkpoints get the weights with the adapters added."""
    optimizer: Optimizer = Optimizer()
    schedule: LearningRateSchedule = LearningRateSchedule()

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> LearnerSettings:
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(
                f"learner.offload is {self.offload}, but learner.zero_stage is {self.zero_stage}; set the stage to "
                f"{needed}{' or more' if needed < 3 else ''}, or learner.offload=none"
            )
        return self

    @model_validator(mode="after")
    def _ranks_share_sequences_evenly(self) -> LearnerSettings:
        shares = self.sequence_parallel
        if self.world_size % shares:
            raise ValueError(
                f"learner.sequence_parallel is {shares}, which does not divide learner.world_size = {self.world_size}; "
                "every sequence is shared by that many ranks"
            )
        if shares > 1 and self.layout in ("padded", "shared"):
            raise ValueError(
                f"learner.sequence_parallel is {shares} and learner.layout is {self.layout}, but sequences that ranks "
                "share are packed, each with its own prompt; set learner.layout=auto"
            )
        return self

    @property
    def shares_prompts(self) -> bool:
        """Whether the prompt of a group is computed once for all of its responses."""
        return self.layout == "shared"

    @property
    def sends_adapters(self) -> bool:
        """Whether engines get adapters instead of weights."""
        return self.lora.rank > 0 and self.lora.sync == "adapter"

    @property
    def tile_bytes(self) -> int:
        """Size of a tile of logits."""
        return self.tile_mib * 2**20
