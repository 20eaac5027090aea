"""What hardware gives at most, and how much of that a run gets: the roofs that step times are worked out from.

Decides the format in which measured roofs are kept: `make bench` writes one with other things around it, and
`trace-rl plan --roofs FILE` reads it. Named GPUs have the figures of their data sheets, which no program reaches, and
the default shares. Must not know runs or models.

All roofs are of one device: a GPU, or the cores of a role where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from trace_rl.config.base import Section
from trace_rl.errors import ConfigError
from trace_rl.overlays import read_document


class Roofs(Section):
    """The most that one device can do."""

    matmul_flops: float = Field(gt=0)
    """Floating point operations a second of a large dense product in the model's precision; a multiplication and an
    addition are two."""
    copy_bytes_per_s: float = Field(gt=0)
    """Memory bandwidth: bytes that a large copy reads plus those that it writes, a second."""
    link_bytes_per_s: float = Field(gt=0)
    """What one device sends to one on another node, one way."""
    collective_bytes_per_s: float = Field(0.0, ge=0)
    """What every rank of the learner receives at a time in a gather over all of them, where the GPUs of a node use
    their links together; 0: `link_bytes_per_s`."""

    @property
    def ring_bytes_per_s(self) -> float:
        return self.collective_bytes_per_s or self.link_bytes_per_s


class Shares(Section):
    """Which part of its roof each stage reaches, in (0, 1]; what is lost to overheads that grow with the work."""

    generation: float = Field(0.5, gt=0)
    """Of memory bandwidth and of products. Ours: an assumption."""
    teacher: float = Field(0.5, gt=0)
    """Of products. Ours: an assumption."""
    learner: float = Field(0.4, gt=0)
    """Of products, those of recomputation counted: with gradient checkpointing 0.4 is an MFU of about 0.3. Published
    RL trainers of dense models are at MFUs of 0.11 to 0.37 (prime-rl, benchmarks/results/BENCHMARKS.md)."""
    sync: float = Field(0.25, gt=0)
    """Of the link. With loading a transfer took four to five times a plain broadcast on CPUs, where vLLM packs weights
    (benchmarks/results/weight_sync.md)."""


class Fixed(Section):
    """Seconds that something takes however small it is."""

    token_s: float = Field(0.0, ge=0)
    """A token step of an engine, of all sequences that it runs."""
    teacher_pass_s: float = Field(0.0, ge=0)
    """A batch through the teacher."""
    learner_pass_s: float = Field(0.0, ge=0)
    """A micro-batch through the learner and back."""
    sync_s: float = Field(0.0, ge=0)
    """A weight sync, its handshake and canary included."""
    grading_s: float = Field(0.0, ge=0)
    """A completion, in one of rewarder.num_processes."""
    driver_s: float = Field(4.1e-4, ge=0)
    """A rollout, on the driver, when nothing else goes on: the teacher's prompt, the training batch, metrics and
    journal. 0.034 + 0.091 + 0.289 ms with 64 engines in benchmarks/results/driver_overhead.md."""


class Hardware(BaseModel):
    """Roofs, and what a run gets of them; other keys of a file are somebody else's."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, allow_inf_nan=False)

    roofs: Roofs
    shares: Shares = Shares()
    fixed: Fixed = Fixed()


GPUS: Mapping[str, Roofs] = {
    "A100-80G": Roofs(
        matmul_flops=312e12, copy_bytes_per_s=2.039e12, link_bytes_per_s=25e9, collective_bytes_per_s=200e9
    ),
    "H100": Roofs(matmul_flops=989.4e12, copy_bytes_per_s=3.35e12, link_bytes_per_s=50e9, collective_bytes_per_s=400e9),
    "H200": Roofs(matmul_flops=989.4e12, copy_bytes_per_s=4.8e12, link_bytes_per_s=50e9, collective_bytes_per_s=400e9),
}
"""NVIDIA's data sheets of the SXM cards: dense bfloat16 without sparsity, memory bandwidth. Links are those of DGX
nodes: one adapter a GPU of 200 Gbit/s (A100) or 400 Gbit/s; a gather uses the eight of a node together, which is less
than NVLink gives one way (300 and 450 GB/s)."""


def named(gpu: str) -> Hardware:
    """A GPU by its data sheet, with the default shares.

    Raises:
        ConfigError: its figures are not known.
    """
    if gpu not in GPUS:
        raise ConfigError(
            f"--gpu is {gpu}, whose data sheet is not known here; give one of {', '.join(GPUS)}, or measured roofs by "
            "--roofs FILE"
        )
    return Hardware(roofs=GPUS[gpu])


def measured(file: Path) -> Hardware:
    """Roofs, shares and fixed times that were measured.

    Raises:
        ConfigError: the file cannot be read, or lacks what is needed.
    """
    return read_document(file).validated(Hardware)
