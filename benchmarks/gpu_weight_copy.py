"""Weights from one process to another by shared memory, as a run does it on one GPU, beside a plain copy of the bytes.

The sender lends buckets and a second process copies what is in them (`trace_rl.workers.weight_ipc`); on GPUs by CUDA's
handles, else by the memory of the machine. Every weight is written into a bucket and copied out of it, so that two
plain copies are the least. With digests, as in a run, both sides also sum what they hold, and the sums must agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import roofs
import torch
from gpu_cases import Case, Context, Row, Wrong, need
from gpu_models import preset_of
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

MODEL = "Qwen3 1.7B"
BUCKET_MIB = 256
"""The default of sync.bucket_mib."""
KINDS = {"no digests": False, "digests": True}


def cases(context: Context) -> list[Case]:
    return [Case(f"the weights of {MODEL}", lambda: _copies(context))]


def _copies(context: Context) -> list[Row]:
    need("xxhash")  # which `weight_digest` imports
    from gpu_weight_reader import ANSWER_S, digest_of, reading

    from trace_rl.workers.weight_ipc import BucketLender, shared_memory
    from trace_rl.workers.weight_wire import TransferGroup, WeightManifest, free_address

    weights = _weights(context)
    manifest = WeightManifest.of((name, tuple(each.shape), each.dtype) for name, each in weights.items())
    plain_s = _plain_copy_s(context, manifest.nbytes)
    group = TransferGroup(*free_address(is_single_node=True), 2, BUCKET_MIB, ANSWER_S)
    repeats = 1 + context.of_scale(5, 3, 1)  # the first one is not counted
    rounds = [is_summed for is_summed in KINDS.values() for _ in range(repeats)]
    with reading(group, manifest, str(context.device), rounds) as answer:
        lender = BucketLender(group, 0, shared_memory(context.device))

        def sync(is_summed: bool) -> tuple[str, str]:
            digest = digest_of(is_summed)
            lender.send(manifest, iter(weights.items()), digest)
            return digest.hexdigest(), answer()

        seconds = [_timed(sync, is_summed) for is_summed in rounds]
    rows = [_row("plain copy", manifest.nbytes, plain_s, plain_s)]
    for number, name in enumerate(KINDS):
        counted = seconds[number * repeats + 1 : (number + 1) * repeats]
        rows.append(_row(f"two processes, {name}", manifest.nbytes, median(counted), plain_s))
    return rows


def _timed(sync: Callable[[bool], tuple[str, str]], is_summed: bool) -> float:
    """Seconds of one transfer, after which both sides must say the same."""
    started = time.perf_counter()
    sent, read = sync(is_summed)
    taken = time.perf_counter() - started
    if read != sent:
        raise Wrong(f"the second process has read weights of digest {read}, but {sent} was sent")
    return taken


def _row(name: str, nbytes: int, seconds: float, plain_s: float) -> Row:
    figures = {"mib": nbytes / 2**20, "seconds": seconds, "bytes_per_s": nbytes / seconds}
    return {"copy": name, **figures, "of_plain_ratio": seconds / plain_s}


def _weights(context: Context) -> dict[str, Tensor]:
    """Random numbers under the names and shapes of a model, without the model."""
    preset = preset_of(context, MODEL)
    assert preset.config is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**preset.config, tie_word_embeddings=True))
    generator = torch.Generator(context.device).manual_seed(context.seed)
    return {
        name: torch.empty(each.shape, dtype=torch.bfloat16, device=context.device).normal_(generator=generator)
        for name, each in model.named_parameters()
    }


def _plain_copy_s(context: Context, nbytes: int) -> float:
    source = torch.empty(nbytes, dtype=torch.uint8, device=context.device).random_()
    target = torch.empty_like(source)
    return roofs.seconds_of(lambda: target.copy_(source), context.device)
