"""Receiving side of the weight transfer: backends for vLLM's native RL weight transfer API, run in vLLM's workers.

Decides how received tensors get into a vLLM model and keeps the digest of what arrived. It must not know versions or
who asks for a sync. vLLM imports this module in each of its worker processes because `WeightReceiver` is named as
`worker_extension_cls`; that import registers the backends.

Invariant: after `finish_weight_update` every layer computes with the weights that were received, also where vLLM keeps
packed copies (see `repack_tied_heads`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

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
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from trace_rl.errors import WeightSyncError
from trace_rl.workers.weight_digest import WeightDigest
from trace_rl.workers.weight_file import StoredManifest, read_version
from trace_rl.workers.weight_ipc import BucketReader, shared_memory
from trace_rl.workers.weight_wire import (
    GlooGroup,
    ReusedMemory,
    TransferBackend,
    TransferGroup,
    WeightManifest,
    plan_buckets,
    receive_frames,
)

WORKER_EXTENSION = f"{__name__}.WeightReceiver"

_LOADED_BYTES = 256 << 20
"""Weights are handed to the model in calls of this size: each walks over the whole model, and some models keep all of
what they are given until it is complete."""

Piece = list[tuple[str, Tensor]]
"""Weights that arrive together, by name."""


def init_info(backend: TransferBackend, group: TransferGroup, rank_offset: int) -> dict[str, Any]:
    """Argument of vLLM's `init_weight_transfer_engine`; `rank_offset` is the rank of the engine's first worker."""
    if backend != "nccl":
        return {"group": group, "rank_offset": rank_offset}
    return {
        "master_address": group.address,
        "master_port": group.port,
        "rank_offset": rank_offset,
        "world_size": group.world_size,
        "packed_buffer_size_bytes": group.bucket_bytes,
        "packed": True,
    }


def update_info(manifest: WeightManifest) -> dict[str, Any]:
    """Argument of vLLM's `update_weights`."""
    info: dict[str, Any] = {
        "names": list(manifest.names),
        "dtype_names": list(manifest.dtypes),
        "shapes": [list(shape) for shape in manifest.shapes],
    }
    return info | ({"folder": manifest.folder} if isinstance(manifest, StoredManifest) else {})


@dataclass
class GroupInitInfo(WeightTransferInitInfo):
    group: TransferGroup
    rank_offset: int


@dataclass
class ManifestUpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    folder: str = ""
    """Of weights that lie in files."""

    def manifest(self) -> StoredManifest:
        return StoredManifest(tuple(self.names), tuple(map(tuple, self.shapes)), tuple(self.dtype_names), self.folder)


def ahead(pieces: Iterator[Piece]) -> Generator[Piece, None, None]:
    """The same pieces; while one is loaded, another thread gets the next and its digest."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = pool.submit(next, pieces, None)
            yield piece


class LoadingEngine(WeightTransferEngine[GroupInitInfo, ManifestUpdateInfo]):
    """Loads weights as they arrive, piece by piece; how they arrive is decided by those who inherit from it."""

    init_info_cls = GroupInitInfo
    update_info_cls = ManifestUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.received = WeightDigest()

    @abstractmethod
    def arriving(self, manifest: StoredManifest) -> Iterator[Piece]:
        """Weights in the manifest's order, on any device, taken into `received`; the tensors are not written again."""

    @abstractmethod
    def join(self, group: TransferGroup, rank: int) -> None:
        """Join the senders' group as `rank`."""

    def init_transfer_engine(self, init_info: GroupInitInfo) -> None:
        self.shutdown()
        parallel = self.parallel_config
        self.join(
            init_info.group,
            init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank,
        )

    def start_weight_update(self) -> None:
        self.received = WeightDigest()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ManifestUpdateInfo) -> None:
        try:
            manifest = update_info.manifest()
            with disable_mtp_completeness_check(), closing(ahead(self.arriving(manifest))) as pieces:
                arriving = ((name, weight.to(self.device)) for piece in pieces for name, weight in piece)
                for bucket in plan_buckets(manifest, _LOADED_BYTES):
                    weights = islice(arriving, len(bucket.slots))
                    self.model.load_weights(weights)
                    deque(weights, maxlen=0)  # what the model has no use for
                next(arriving, None)  # runs it to its end, where what has arrived is checked
        except BaseException:
            # Layers that wait for the rest of their weights would mix them with those of the next update.
            finalize_layerwise_reload(self.model, self.model_config)
            self.shutdown()
            raise

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_heads(self.model, self.model_config.hf_config)


class GlooWeightTransferEngine(LoadingEngine):
    """Receives weights through the host's memory; others travel while some are loaded."""

    _group: GlooGroup | None = None
    _bucket_bytes = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._memory = ReusedMemory()

    def join(self, group: TransferGroup, rank: int) -> None:
        self._bucket_bytes = group.bucket_bytes
        self._group = GlooGroup(group.address, group.port, rank, group.world_size, group.timeout_s)

    def arriving(self, manifest: StoredManifest) -> Iterator[Piece]:
        if self._group is None:
            raise WeightSyncError("the engine has not joined a transfer group; join one before an update")
        return receive_frames(self._group, manifest, self._bucket_bytes, self._memory, self.received)

    def shutdown(self) -> None:
        self._group = None


class SharingEngine(LoadingEngine):
    """Reads weights in the memory of the learner rank that shares this worker's GPU."""

    _reader: BucketReader | None = None

    def join(self, group: TransferGroup, rank: int) -> None:
        self._reader = BucketReader(group, rank, shared_memory(self.device))

    def arriving(self, manifest: StoredManifest) -> Iterator[Piece]:
        if self._reader is None:
            raise WeightSyncError("the engine has not joined a transfer group; join one before an update")
        for bucket, buffer in self._reader.buckets(manifest):
            weights = bucket.weights(buffer, manifest)
            for name, weight in weights:
                self.received.update(name, weight)
            yield weights

    def shutdown(self) -> None:
        self._reader = None


class FileEngine(LoadingEngine):
    """Reads weights from a folder."""

    def join(self, group: TransferGroup, rank: int) -> None:
        """Nothing: files are not waited for."""

    def arriving(self, manifest: StoredManifest) -> Iterator[Piece]:
        return read_version(manifest, self.received)

    def shutdown(self) -> None:
        """Nothing is held."""


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
WeightTransferEngineFactory.register_engine("trace_ipc", __name__, SharingEngine.__name__)
WeightTransferEngineFactory.register_engine("trace_file", __name__, FileEngine.__name__)
