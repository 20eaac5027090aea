"""Receiving side of the weight transfer: backends for vLLM's native RL weight transfer API, run in vLLM's workers.

Decides how received tensors get into a vLLM model and keeps the digest of what arrived. It must not know versions or
who asks for a sync. vLLM imports this module in each of its worker processes because `WeightReceiver` is named as
`worker_extension_cls`; that import registers the backends.

Invariant: after `finish_weight_update` every layer computes with the weights that were received, also where vLLM keeps
packed copies (see `repack_tied_heads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from trace_rl.errors import WeightSyncError
from trace_rl.workers.weight_sender import (
    GlooGroup,
    TransferBackend,
    TransferGroup,
    WeightDigest,
    WeightManifest,
    plan_buckets,
    transport_gist,
)

WORKER_EXTENSION = f"{__name__}.WeightReceiver"


def init_info(backend: TransferBackend, group: TransferGroup, rank_offset: int) -> dict[str, Any]:
    """Argument of vLLM's `init_weight_transfer_engine`; `rank_offset` is the rank of the engine's first worker."""
    info: dict[str, Any] = {
        "master_address": group.address,
        "master_port": group.port,
        "rank_offset": rank_offset,
        "world_size": group.world_size,
        "packed_buffer_size_bytes": group.bucket_mib * 2**20,
    }
    return info | ({"timeout_s": group.timeout_s} if backend == "gloo" else {"packed": True})


def update_info(manifest: WeightManifest) -> dict[str, Any]:
    """Argument of vLLM's `update_weights`."""
    return {
        "names": list(manifest.names),
        "dtype_names": list(manifest.dtypes),
        "shapes": [list(shape) for shape in manifest.shapes],
    }


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    packed_buffer_size_bytes: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives weights through the host's memory."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.received = WeightDigest()
        self._group: GlooGroup | None = None
        self._bucket_bytes = 0

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self.shutdown()
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._bucket_bytes = init_info.packed_buffer_size_bytes
        self._group = GlooGroup(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        self.received = WeightDigest()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        try:
            self._receive(
                WeightManifest(
                    tuple(update_info.names), tuple(map(tuple, update_info.shapes)), tuple(update_info.dtype_names)
                )
            )
        except BaseException:
            # Layers that wait for the rest of their weights would mix them with those of the next update.
            finalize_layerwise_reload(self.model, self.model_config)
            self.shutdown()
            raise

    def _receive(self, manifest: WeightManifest) -> None:
        if self._group is None:
            raise WeightSyncError("the engine has not joined a transfer group; join one before an update")
        for bucket in plan_buckets(manifest, self._bucket_bytes):
            buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)  # not reused: layers keep views until complete
            try:
                self._group.broadcast(buffer)
            except RuntimeError as error:
                raise WeightSyncError(
                    f"lost the weight sender while waiting for {manifest.names[bucket.slots[0].index]} and what "
                    f"follows ({transport_gist(error)}); look at the learner's errors"
                ) from error
            for slot in bucket.slots:
                self._load(manifest.names[slot.index], bucket.view(slot, buffer, manifest))

    def _load(self, name: str, weight: Tensor) -> None:
        self.received.update(name, weight)
        self.model.load_weights([(name, weight.to(self.device))])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_heads(self.model, self.model_config.hf_config)

    def shutdown(self) -> None:
        self._group = None


class DigestingNcclEngine(NCCLWeightTransferEngine):
    """vLLM's nccl backend, with the digest of what arrived."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.received = WeightDigest()

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        self.shutdown()
        super().init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self.received = WeightDigest()
        super().start_weight_update()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        model: Any = self._default_model
        self.model = _Digesting(model.load_weights, self.received)
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model


class _Digesting:
    """Stands in for the model while weights are received and digests each before it is loaded."""

    def __init__(self, load_weights: Callable[[Any], Any], digest: WeightDigest) -> None:
        self._load_weights = load_weights
        self._digest = digest

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        listed = list(weights)
        for name, tensor in listed:
            self._digest.update(name, tensor)
        return self._load_weights(listed)


def repack_tied_heads(model: nn.Module, hf_config: Any) -> None:
    """Make tied output heads compute with the embedding that was just received.

    On a CPU, vLLM's linear layers compute with packed copies. A reload packs the layers that received weights; a tied
    head receives none and keeps the copy of the old embedding, silently. Elsewhere the head reads the shared weight.
    """
    if not (current_platform.is_cpu() and getattr(hf_config.get_text_config(), "tie_word_embeddings", False)):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    embeddings = [module for module in model.modules() if type(module) is VocabParallelEmbedding]
    for head in (module for module in model.modules() if isinstance(module, ParallelLMHead)):
        sources = [embedding for embedding in embeddings if embedding.weight.shape == head.weight.shape]
        if len(sources) != 1:
            raise WeightSyncError(
                f"found {len(sources)} embeddings of shape {tuple(head.weight.shape)} that a tied head could belong "
                "to, expected one; this model architecture cannot be synced on a CPU"
            )
        head.weight = sources[0].weight
        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


class WeightReceiver:
    """Methods added to vLLM's workers, to be called through `collective_rpc`."""

    def received_digest(self) -> str:
        """Digest of the weights received by the last update."""
        return str(self.weight_transfer_engine.received.hexdigest())  # type: ignore[attr-defined]


WeightTransferEngineFactory.register_engine("trace_gloo", __name__, GlooWeightTransferEngine.__name__)
WeightTransferEngineFactory.register_engine("trace_nccl", __name__, DigestingNcclEngine.__name__)
