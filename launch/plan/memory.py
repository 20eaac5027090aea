"""A forecast of the memory that each role takes, from shapes and settings alone.

What is counted from shapes (weights, optimizer states, buffers of fixed size, key-value caches) is exact; what depends
on kernels or on what is sampled (activations, gradients, what engines need beside their cache) is an estimate, and is
marked as one. Bounds are upper bounds: sequences of full length, full micro-batches. Must not know nodes or Ray.

The states of the learner are those of DeepSpeed 0.19 (ZeRO: arXiv:1910.02054, section 5), measured there by
tests/test_plan.py. A process takes about 1 GiB more for its libraries, and a GPU about 0.5 GiB for the CUDA context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trace_rl.config.roles import GeneratorSettings
from trace_rl.config.run import RunConfig
from trace_rl.launch.plan.batch import SyncPlan
from trace_rl.launch.plan.shapes import ModelShape
from trace_rl.token_layout import Padded

REDUCE_BUCKET_VALUES = 500_000_000
"""Values of DeepSpeed's buffer in which gradients are reduced, whatever the model's size."""
_MAX_LIVE_VALUES = 1_000_000_000
"""Parameters that ZeRO-3 keeps whole at a time at most (stage3_max_live_parameters)."""
_ENGINE_RESERVE = 2 * 2**30
"""What vLLM takes beside weights and cache on a GPU: activations, logits, graphs; it measures that when it starts."""
_ROWS_PER_PRODUCT = 512

ENGINE, LEARNER, TEACHER = "generator engine", "learner rank", "teacher"
Place = Literal["device", "host"]


@dataclass(frozen=True)
class Item:
    """One part of what a role holds."""

    what: str
    nbytes: int
    is_exact: bool = True
    place: Place = "device"
    """`device`: the GPU where the role has one, else the memory of its process; `host`: CPU memory in any case."""


@dataclass(frozen=True)
class RoleMemory:
    """What one process of a role holds at its peak; of an engine, one of its workers."""

    name: str
    roles: tuple[str, ...]
    """As placement names them; one process each, but for engines with several workers."""
    items: tuple[Item, ...]
    at_start: int = 0
    """Bytes of the device while it starts, where that may be more."""

    def nbytes(self, place: Place) -> int:
        """Of all items in that place."""
        return sum(item.nbytes for item in self.items if item.place == place)

    @property
    def peak(self) -> int:
        """Bytes of the device."""
        return max(self.nbytes("device"), self.at_start)


@dataclass(frozen=True)
class CacheMemory:
    """The key-value cache of one engine's worker."""

    bytes_per_token: int
    sequence_tokens: int
    """Of the longest sequence."""
    concurrent: int
    """Sequences that the engine may run at once."""
    pool: int | None
    """Bytes of the cache; None where the memory of the GPU is not known."""

    @property
    def sequences(self) -> float | None:
        """Sequences of full length that the cache holds at once."""
        return None if self.pool is None else self.pool / (self.bytes_per_token * self.sequence_tokens)


@dataclass(frozen=True)
class Forecast:
    """The memory of all roles that hold a model."""

    roles: tuple[RoleMemory, ...]
    caches: Mapping[str, CacheMemory]
    """Of engines, by the name of their RoleMemory."""
    gpu_bytes: int | None
    """Of the GPU that all of them are meant for; None where it is not known."""

    def of(self, role: str) -> RoleMemory | None:
        """The memory of a role by its name in the placement; None for one without a model."""
        return next((memory for memory in self.roles if role in memory.roles), None)


def kv_bytes_per_token(shape: ModelShape, workers: int) -> int:
    """layers x heads of keys x head size x 2 (keys and values) x bytes; an upper bound where layers look back less far.

    Heads are divided among the workers of an engine, each of which has at least one.
    """
    heads = max(1, -(-shape.num_kv_heads // workers))
    return shape.num_layers * heads * shape.head_dim * 2 * shape.bytes_per_value


def checkpoint_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Of one checkpoint on the disk, without small files: the policy, float32 weights and moments, the teacher's copy.

    Of P weights in b bytes, T trained ones: b P, and 12 T; with adapters the weights that are not trained and the
    adapters, 2 b P + b T + 12 T; of a teacher that depends on earlier steps another b P, or 4 P of an average.
    """
    nbytes = shape.weights.nbytes + 12 * shape.num_trained
    if shape.adapters.nbytes:
        nbytes += shape.weights.nbytes + shape.adapters.nbytes
    weights = config.teacher.weights
    if config.needs_teacher and weights.depends_on == "history":
        nbytes += 4 * shape.num_parameters if weights.is_average else shape.weights.nbytes
    return nbytes


def engine_memory(
    name: str,
    roles: tuple[str, ...],
    shape: ModelShape,
    settings: GeneratorSettings,
    max_model_len: int,
    has_gpu: bool,
    gpu_bytes: int | None,
) -> tuple[RoleMemory, CacheMemory]:
    """A worker of an engine: its share of the weights, and a cache in what is left of its share of the GPU."""
    weights = -(-shape.weights.nbytes // settings.tensor_parallel)
    items = [Item("weights", weights)]
    pool: int | None = settings.kv_cache_gib * 2**30
    if has_gpu:
        pool = None
        items.append(Item("activations, logits, graphs", _ENGINE_RESERVE, is_exact=False))
        if gpu_bytes is not None:
            pool = max(0, int(settings.gpu_memory_frac * gpu_bytes) - weights - _ENGINE_RESERVE)
    if pool is not None:
        items.append(Item("key-value cache", pool, is_exact=not has_gpu))
    cache = CacheMemory(
        kv_bytes_per_token(shape, settings.tensor_parallel), max_model_len, settings.max_concurrent_sequences, pool
    )
    return RoleMemory(name, roles, tuple(items)), cache


def learner_memory(
    config: RunConfig, shape: ModelShape, roles: tuple[str, ...], sync: SyncPlan, has_gpu: bool
) -> RoleMemory:
    """A rank of the learner, while it trains on a full micro-batch."""
    states = _states(config, shape, has_gpu)
    computing = _computing(config, shape)
    moving = [Item("buckets of a sync", sync.held, is_exact=False, place=_sync_place(sync))]
    whole = shape.weights.nbytes
    # every rank loads the model whole, and then keeps its part
    at_start = whole + sum(item.nbytes for item in states[:2]) if config.learner.zero_stage == 3 else 0
    waiting: list[Item] = []
    if config.placement.mode == "colocated":
        parked = sum(item.nbytes for item in states[:3] if item.place == "device")
        waiting = [Item("states, while engines sample", parked, is_exact=False, place="host")]
    return RoleMemory(LEARNER, roles, (*states, *computing, *moving, *waiting), at_start)


def _states(config: RunConfig, shape: ModelShape, has_gpu: bool) -> list[Item]:
    """Weights, float32 weights, Adam's moments, gradients and DeepSpeed's buffers of one rank.

    Of P weights in b bytes, T trained ones and N ranks: b P (stage 3: b P / N); 4 T / N of float32 weights and 8 T / N
    of moments (stage 0: none, and 8 T); gradients in float32, 4 T, from stage 2 on 4 T / N.
    """
    learner, trained, value = config.learner, shape.num_trained, shape.bytes_per_value
    stage, ranks = learner.zero_stage, learner.world_size
    part = -(-trained // ranks)
    aside: Place = "device" if learner.offload == "none" else "host"
    weights = -(-shape.weights.nbytes // ranks) if stage == 3 else shape.weights.nbytes
    weights += shape.adapters.nbytes
    items = [
        Item("weights", weights, place="host" if learner.offload == "all" else "device"),
        Item("float32 weights", 4 * part if stage else 0, place=aside),
        Item("Adam's moments", 8 * (part if stage else trained), place=aside),
        Item(
            "gradients",
            4 * (part if stage >= 2 else trained),
            is_exact=False,
            place=aside if stage >= 2 else "device",
        ),
    ]
    if stage:
        staged = value if stage == 2 else 4
        # whole on a GPU; on a CPU only what is written to takes memory
        values = REDUCE_BUCKET_VALUES if has_gpu else min(REDUCE_BUCKET_VALUES, trained)
        items.append(Item("DeepSpeed's reduction buffer", values * staged))
    if stage == 3:
        live = min(shape.num_parameters, _MAX_LIVE_VALUES) * value
        items.append(Item("weights gathered for use", live, is_exact=False))
    return items


def _computing(config: RunConfig, shape: ModelShape) -> list[Item]:
    """What a forward and backward pass over one micro-batch holds beside the states."""
    learner = config.learner
    tokens = learner.max_tokens_per_micro_batch // learner.sequence_parallel
    head = shape.vocab * shape.hidden
    items = [
        Item("activations", activation_bytes(config, shape), is_exact=False),
        Item("two tiles of logits", min(2 * learner.tile_bytes, 8 * tokens * shape.vocab)),
        Item("gradient of the output head", 4 * head),
    ]
    if "states" in config.algorithm.reads:
        models = len(config.teacher.weights.shares())
        items.append(Item("the teacher's head", models * head * shape.bytes_per_value))
        states = tokens * models * shape.hidden * shape.bytes_per_value
        items.append(Item("the teacher's states, all tokens routed", states, is_exact=False))
    if config.logging.diagnostics_every and learner.zero_stage < 3:
        items.append(Item("gradients of a measured step", 12 * shape.num_trained))
    return items


def activation_bytes(config: RunConfig, shape: ModelShape) -> int:
    """What autograd keeps of a full micro-batch of T tokens on one rank, and the gradients of one layer.

    A token leaves A = (8 + 4 b) h + (4 + 3 b) (q + k) + 4 b i bytes in a layer of width h, MLP width i and widths q of
    queries and k of keys, with values of b bytes: inputs of linear layers, norms in float32 beside their outputs,
    queries, keys and values, and gate, activation and product of the MLP. Counted as in arXiv:2205.05198, section 4,
    for layers with RMSNorm, norms of queries and keys, rotary positions and a gated MLP, and for an attention that
    keeps no scores (arXiv:2205.14135). Without flash attention a layer keeps a mask too, of b T times the length of a
    row; where prompts are shared it keeps more, see below. L layers keep L A T, and with checkpointing L h b T + A T.
    """
    learner, value = config.learner, shape.bytes_per_value
    tokens = learner.max_tokens_per_micro_batch // learner.sequence_parallel
    layer = tokens * _token_bytes(shape)
    if not shape.is_flash and learner.sequence_parallel == 1:
        if shape.layout.shares_prompts:
            layer += round(tokens * _shared_token_bytes(config, shape))
        else:
            is_padded = isinstance(shape.layout, Padded)
            layer += tokens * (config.max_sequence_tokens if is_padded else tokens) * value
    kept = shape.num_layers * (tokens * shape.hidden * value if learner.gradient_checkpointing else layer)
    return kept + layer + (layer if learner.gradient_checkpointing else 0)


def _token_bytes(shape: ModelShape) -> int:
    """A of `activation_bytes`."""
    value = shape.bytes_per_value
    attention = (4 + 3 * value) * (shape.query_width + shape.key_width)
    return (8 + 4 * value) * shape.hidden + attention + 4 * value * shape.intermediate


def _shared_token_bytes(config: RunConfig, shape: ModelShape) -> float:
    """b (q + (2 q n + m) S / U): queries, keys and values of n sequences of S tokens, and a mask of m rows, by token.

    A group of n prompts of p tokens and responses of r has U = p - 1 + n m tokens, m = r + 1. Its sequences are laid
    out one below the other for the attention, with keys and values for every head.
    """
    sampling, count = config.sampling, config.sampling.samples_per_prompt
    rows = sampling.max_response_tokens + 1
    length = config.max_sequence_tokens / (sampling.max_prompt_tokens - 1 + count * rows)
    width = shape.query_width
    return shape.bytes_per_value * (width + (2 * width * count + rows) * length)


def _sync_place(sync: SyncPlan) -> Place:
    return "device" if sync.transport in ("nccl", "ipc") else "host"


def teacher_memory(config: RunConfig, shape: ModelShape, roles: tuple[str, ...]) -> RoleMemory:
    """The teacher's models, one batch through them, and the states that a step ships."""
    weights, sampling = config.teacher.weights, config.sampling
    models, value = len(weights.shares()), shape.bytes_per_value
    layer = config.teacher.max_tokens_per_batch * ((4 + 2 * value) * shape.hidden + 3 * value * shape.intermediate)
    items = [
        Item("weights" if models == 1 else f"weights of {models} models", models * shape.weights.nbytes),
        Item("activations", layer, is_exact=False),
    ]
    shares_prompts = not shape.is_flash and config.model.attention != "eager"
    if shares_prompts and sampling.samples_per_prompt > 1:
        sides = round(config.teacher.max_tokens_per_batch * _shared_token_bytes(config, shape))
        items.append(Item("attention of a layer over shared prompts", sides, is_exact=False))
    if config.algorithm.reads & {"logprobs", "entropy"}:
        items.append(Item("logits", (models + 2) * 4 * _ROWS_PER_PRODUCT * shape.vocab, is_exact=False))
    if weights.is_average:
        items.append(Item("float32 average", 4 * shape.num_parameters, place="host"))
    if "states" in config.algorithm.reads:
        rows = sampling.prompts_per_step * sampling.samples_per_prompt * sampling.max_response_tokens
        shipped = 2 if config.teacher.states == "bfloat16" else value
        nbytes = rows * models * shape.hidden * shipped
        items.append(Item("states of a step, all tokens routed", nbytes, is_exact=False, place="host"))
    return RoleMemory(TEACHER, roles, tuple(items))
