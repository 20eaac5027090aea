"""How vLLM is set up for a run: what an engine is built with, whatever it will be asked.

This module must not know requests or weights.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, get_args

from trace_rl.config.learner import Lora
from trace_rl.config.roles import GeneratorSettings, Model
from trace_rl.config.scheduling import Scheduling
from trace_rl.workers import environment
from trace_rl.workers.adapters import linear_names
from trace_rl.workers.weight_wire import TransferBackend

if TYPE_CHECKING:
    from vllm import LLM

_CPU_BATCH_TOKENS = 4096
_CPU_BLOCK_TOKENS = 32
_STRUCTURED_OUTPUTS = {
    "backend": "xgrammar",  # the default falls back to others, request by request, though an engine keeps the first
    "disable_any_whitespace": True,  # weak models like to fill their budget with blanks
}


def build_llm(
    model: Model,
    settings: GeneratorSettings,
    max_model_len: int,
    backend: TransferBackend,
    seed: int,
    lora: Lora,
    scheduling: Scheduling,
    sleeps: bool,
) -> LLM:
    """An engine that can take weights, serve chats beside rollouts, and score; belongs to the calling thread.

    Args:
        max_model_len: longest prompt plus completion, in tokens.
        lora: of rank 0: no room for adapters is made.
        scheduling: says whether new weights come while requests are being written.
        sleeps: whether the memory of GPUs can be given up for a while; CPUs have none of that.
    """
    is_cpu = not environment.has_gpu()
    if is_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)  # inherited values are another engine's
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    from trace_rl.workers.weight_receiver import WORKER_EXTENSION

    return LLM(
        model=model.path,
        dtype=model.dtype,
        trust_remote_code=model.trust_remote_code,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_concurrent_sequences,
        gpu_memory_utilization=settings.gpu_memory_frac,
        enforce_eager=settings.enforce_eager or is_cpu,
        tensor_parallel_size=settings.tensor_parallel,
        # in processes of this actor: left alone, vLLM takes further bundles of the placement group for its workers
        distributed_executor_backend="mp" if settings.tensor_parallel > 1 else "uni",
        enable_sleep_mode=sleeps and not is_cpu,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        seed=seed,
        scheduling_policy="priority",
        # it would leave a step on its way while new weights are loaded
        async_scheduling=False if scheduling.runs_through_syncs else None,
        structured_outputs_config=_STRUCTURED_OUTPUTS,
        weight_transfer_config=WeightTransferConfig(backend=f"trace_{backend}"),
        worker_extension_cls=WORKER_EXTENSION,
        **(_cpu_settings(max_model_len) if is_cpu else {}),
        **(_adapter_settings(lora, model) if lora.rank else {}),
    )


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
