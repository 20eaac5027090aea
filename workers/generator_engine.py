"""One vLLM engine, inside its actor: samples rollouts, scores sequences and takes weights.

Decides how a vLLM output becomes a `Rollout`. It must not know rewards, routes, other engines, or how weights are
transferred beyond the calls of vLLM's weight transfer API.

Invariants: an engine samples only with weights that were proven (`accept`), and every rollout of one call carries that
one version; token ids and log-probs are the sampler's own, under the sampling distribution (after temperature, top-k
and top-p); the prefix cache never outlives the weights that filled it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from jaxtyping import Float

from trace_rl.batch import Rollout, RolloutRequest
from trace_rl.config.learner import Lora
from trace_rl.config.roles import GeneratorSettings, Model
from trace_rl.errors import TraceError, WeightSyncError, WorkerError
from trace_rl.protocols import Decoding
from trace_rl.workers import environment
from trace_rl.workers.adapters import Adapter, linear_names
from trace_rl.workers.weight_sender import TransferBackend, TransferGroup, WeightManifest, transport_gist

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_ADAPTER_ID = 1
_NO_ADAPTERS = Lora()
_CPU_BATCH_TOKENS = 4096
_CPU_BLOCK_TOKENS = 32


@dataclass(frozen=True)
class WeightReceipt:
    """What an engine holds after an update, by its own account."""

    version: int
    digest: str


class GeneratorEngine:
    """One vLLM engine inside its actor: `ray.remote(GeneratorEngine).options(...).remote(...)`.

    Args:
        index: position among the engines; names this one in errors.
        model: `path` is a folder or hub name that vLLM can load.
        max_model_len: longest prompt plus completion, in tokens.
        backend: transport of the weights.
        seed: engine seed; samples depend on the requests' own seeds only.
        loaded_version: version to report for the weights on disk, for use without a learner. Without it nothing is
            generated until a weight sync has proven the weights.
        lora: the adapters that a weight sync brings; of rank 0: it brings all weights.
    """

    def __init__(
        self,
        index: int,
        model: Model,
        settings: GeneratorSettings,
        max_model_len: int,
        backend: TransferBackend,
        seed: int = 0,
        loaded_version: int | None = None,
        lora: Lora = _NO_ADAPTERS,
    ) -> None:
        environment.apply(settings.kv_cache_gib)
        is_cpu = not environment.has_gpu()
        if is_cpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)  # inherited values are another engine's
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        from trace_rl.workers.weight_receiver import WORKER_EXTENSION

        self._name = f"generator engine {index}"
        self._backend: TransferBackend = backend
        self._llm = LLM(
            model=model.path,
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            max_model_len=max_model_len,
            max_num_seqs=settings.max_concurrent_sequences,
            gpu_memory_utilization=settings.gpu_memory_frac,
            enforce_eager=settings.enforce_eager or is_cpu,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            seed=seed,
            weight_transfer_config=WeightTransferConfig(backend=f"trace_{backend}"),
            worker_extension_cls=WORKER_EXTENSION,
            **(_cpu_settings(max_model_len) if is_cpu else {}),
            **(_adapter_settings(lora, model) if lora.rank else {}),
        )
        self._adapter: LoRARequest | None = None
        self._adapter_folder = tempfile.TemporaryDirectory(prefix="adapter-")
        self._tokenizer = self._llm.get_tokenizer()
        self._proven_version: int | None = None
        if loaded_version is not None:
            self._llm.update_weight_version(str(loaded_version))
            self._proven_version = loaded_version

    def ready(self) -> str:
        """The engine's name, once it can be used."""
        return self._name

    def generate(
        self, requests: Sequence[RolloutRequest], decoding: Decoding, max_tokens: int
    ) -> Iterator[list[Rollout]]:
        """Sample one completion per request; yields those that finished in the same engine step.

        Log-probs are of the distribution that was sampled from: log_softmax of logits / temperature, of which top-k and
        then top-p have set the rest to -inf, so the mass of the tokens that are left is 1. With top_p=1 and top_k=0
        they are the model's own at that temperature; otherwise they lie above them.

        Raises:
            WeightSyncError: the weights of this engine are not proven.
            WorkerError: vLLM gave a request up.
        """
        if self._proven_version is None:
            raise WeightSyncError(
                f"{self._name} was asked for rollouts while its weights are unproven; sync the weights first"
            )
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        pending: dict[str, RolloutRequest] = {}
        try:
            for number, request in enumerate(requests):
                params = SamplingParams(
                    temperature=decoding.temperature,
                    top_p=decoding.top_p,
                    top_k=decoding.top_k,
                    max_tokens=max_tokens,
                    seed=request.seed,
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
                pending[str(number)] = request
                engine.add_request(str(number), prompt, params, lora_request=self._adapter)
            while engine.has_unfinished_requests():
                finished = [output for output in engine.step() if output.finished]
                if finished:
                    yield [self._rollout(pending.pop(output.request_id), output.outputs[0]) for output in finished]
        finally:
            engine.abort_request(list(pending))

    def _rollout(self, request: RolloutRequest, completion: Any) -> Rollout:
        if completion.finish_reason not in ("stop", "length"):
            raise WorkerError(
                f"{self._name} ended sample {request.sample} of prompt {request.prompt.prompt_id} with "
                f"{completion.finish_reason!r}, expected 'stop' or 'length'; see its log"
            )
        token_ids = tuple(completion.token_ids)
        versions = {int(span.version) for span in completion.weight_versions}
        if versions != {self._proven_version}:
            raise WeightSyncError(
                f"{self._name} wrote sample {request.sample} of prompt {request.prompt.prompt_id} with weight versions "
                f"{sorted(versions)}, but version {self._proven_version} is the proven one"
            )
        return Rollout(
            prompt=request.prompt,
            sample=request.sample,
            prompt_token_ids=request.prompt_token_ids,
            token_ids=token_ids,
            rollout_logprobs=_sampled_logprobs(completion.logprobs, token_ids),
            finish_reason=completion.finish_reason,
            policy_version=versions.pop(),
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True),
        )

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[Float[np.ndarray, " time"]]:
        """Log-probs of token sequences at temperature 1, computed anew (no cached prefix is read).

        Returns:
            One array [len(sequence) - 1] per sequence: element t is log p(sequence[t + 1] | sequence[: t + 1]).
        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True, seed=0
        )
        prompts = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=self._adapter)
        return [
            np.array(
                [entry[token].logprob for token, entry in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)],
                dtype=np.float32,
            )
            for sequence, output in zip(sequences, outputs, strict=True)
        ]

    def join_transfer(self, group: TransferGroup, rank: int) -> None:
        """Join the weight sender's group; leaves the one joined before. Raises WeightSyncError at the deadline."""
        from trace_rl.workers.weight_receiver import init_info

        try:
            self._llm.init_weight_transfer_engine({"init_info": init_info(self._backend, group, rank)})
        except (RuntimeError, OSError) as error:
            raise WeightSyncError(
                f"{self._name} could not join the weight sender at {group.address}:{group.port} within "
                f"{group.timeout_s:g} s ({transport_gist(error)}); look at the learner's errors"
            ) from error

    def receive_weights(self, manifest: WeightManifest, version: int) -> WeightReceipt:
        """Take the sender's next weights as `version`; they stay unproven until `accept`.

        Raises:
            WeightSyncError: the sender was lost or late, or vLLM could not load what came; names this engine.
        """
        from trace_rl.workers.weight_receiver import update_info

        self._proven_version = None
        try:
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": update_info(manifest)})
            self._llm.finish_weight_update(str(version))
        except TraceError as error:
            raise WeightSyncError(f"{self._name} at version {version}: {error}") from error
        except Exception as error:
            raise WeightSyncError(f"{self._name} could not load the weights of version {version}: {error!r}") from error
        self._forget_prefixes(version)
        return self.weight_receipt()

    def load_adapter(self, adapter: Adapter, version: int) -> WeightReceipt:
        """Take low-rank adapters in place of those before, as `version`; they stay unproven until `accept`.

        Raises:
            WeightSyncError: vLLM could not load them; names this engine.
        """
        from vllm.lora.request import LoRARequest

        self._proven_version = None
        folder = Path(self._adapter_folder.name)
        adapter.write(folder)
        name = f"policy-{version}"
        try:
            # in place: vLLM would otherwise keep the adapter that it holds under this id
            is_loaded = self._llm.llm_engine.add_lora(LoRARequest(name, _ADAPTER_ID, str(folder), load_inplace=True))
        except Exception as error:
            raise WeightSyncError(
                f"{self._name} could not load the adapters of version {version}: {error!r}; if vLLM has none for this "
                "model, set learner.lora.sync=merged"
            ) from error
        if not is_loaded:
            raise WeightSyncError(f"{self._name} did not load the adapters of version {version}; see its log")
        self._adapter = LoRARequest(name, _ADAPTER_ID, str(folder))
        self._llm.update_weight_version(str(version))
        self._forget_prefixes(version)
        return WeightReceipt(int(self._llm.get_weight_version()), adapter.digest())

    def _forget_prefixes(self, version: int) -> None:
        if not self._llm.reset_prefix_cache():
            raise WeightSyncError(
                f"{self._name} kept its prefix cache after version {version} arrived, because requests still run; let "
                "them finish before a sync"
            )

    def weight_receipt(self) -> WeightReceipt:
        """Version and digest of the weights that were received last."""
        digests = set(self._llm.collective_rpc("received_digest"))
        return WeightReceipt(int(self._llm.get_weight_version()), "+".join(sorted(digests)))

    def accept(self, version: int) -> None:
        """Declare the weights proven, so that rollouts may be sampled."""
        self._proven_version = version


def _adapter_settings(lora: Lora, model: Model) -> dict[str, Any]:
    """Room for one adapter, of the least rank that vLLM has kernels for, beside all layers but the output head.

    An adapter beside the head, even an empty one, breaks vLLM's log-probs of prompts: it is laid out for one row a
    request.
    """
    from vllm.config.lora import MaxLoRARanks

    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min((rank for rank in get_args(MaxLoRARanks) if rank >= lora.rank), default=lora.rank),
        "lora_target_modules": linear_names(model),
    }


def _cpu_settings(max_model_len: int) -> dict[str, Any]:
    """Scheduler settings for CPUs.

    A prompt is prefilled in one piece: vLLM 0.32 rewinds a seeded request's generator when it prefills only a part of
    the prompt, which CPU generators cannot do: the engine dies once the prompts of a batch exceed its token budget.
    Blocks are smaller than the default of 128 tokens because only whole blocks of a prompt are shared by its group.
    """
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_CPU_BATCH_TOKENS, max_model_len),
        "block_size": _CPU_BLOCK_TOKENS,
    }


def _sampled_logprobs(logprobs: Any, token_ids: Sequence[int]) -> Float[np.ndarray, " time"]:
    """Log-probs of the sampled tokens out of vLLM's flat table, which lists them first at each position."""
    starts = logprobs.start_indices
    if [logprobs.token_ids[start] for start in starts] != list(token_ids):
        raise WorkerError(
            "vLLM's log-prob table does not list the sampled tokens first; the vLLM version is unsupported"
        )
    return np.array([logprobs.logprobs[start] for start in starts], dtype=np.float32)
