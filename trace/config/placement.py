"""Settings of where the roles run, what each takes of the cluster, and how long they are waited for.

This module must not know how roles are laid out on nodes or how they are started.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trace_rl.config.base import Section


class Resources(Section):
    """What one actor of a role takes of the cluster."""

    num_cpus: float = Field(1.0, ge=0)
    """Without GPUs also the number of threads that it computes with, rounded down, but at least one."""
    num_gpus: float = Field(0.0, ge=0)
    """Of a guest it is not read: that takes none and is shown those of its hosts."""
    custom: dict[str, float] = {}
    """Custom resources of Ray, by which a role is held to the nodes that were started with them."""


class Placement(Section):
    """Where the roles run."""

    mode: Literal["disaggregated", "colocated"] = "disaggregated"
    """`colocated`: engines and learner ranks share GPUs and take turns (vLLM sleeps, the learner's states wait in CPU
    memory): an engine is a guest of as many ranks as it has workers; `disaggregated`: each has its own."""
    teacher_place: Literal["own", "with_learner", "with_generator"] = "own"
    """Whether the teacher has its own GPU, or is a guest on that of the learner's last rank or of the first engine. It
    never leaves it, whoever's turn it is."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK"] = "PACK"
    """How Ray lays the roles over nodes: on as few as possible, on as many as possible, or on exactly one."""
    ray_address: str = "local"
    """`local`: a private Ray on this machine; `auto` or host:port: join a running cluster."""
    ray_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of the private Ray; by default enough for the roles."""
    resources_timeout_s: float = Field(60.0, gt=0)
    """How long a cluster is waited for that has not got the resources of all roles (an autoscaler may need longer)."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Deadline for each role to be ready; all of them start at the same time."""
    role_restarts: int = Field(10, ge=0)
    """How often in a run each engine, the teacher, the rewarder and the annotator are started again in their place when
    they die; their work is done again. What the learner has to do with is for run.max_restarts."""
    step_timeout_s: float = Field(3600.0, gt=0)
    """Deadline of one stage of one step."""
    generator: Resources = Resources()
    """Of each worker of an engine (generator.tensor_parallel), all of which are on one node."""
    teacher: Resources = Resources()
    learner: Resources = Resources()
    """Per rank."""
    rewarder: Resources = Resources()
    annotator: Resources = Resources(num_cpus=0.5)
    annotator_engine: Resources = Resources()
    """The engine of an annotator of the kinds static and frozen."""
