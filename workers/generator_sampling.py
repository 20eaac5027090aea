"""What vLLM is asked for rollouts and for scores, and how its tables of log-probs and of versions are read.

This module must not know weights, or when requests run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from trace_rl.batch import RolloutRequest
from trace_rl.errors import WorkerError
from trace_rl.protocols import Decoding

if TYPE_CHECKING:
    from vllm import SamplingParams


def rollout_params(request: RolloutRequest, decoding: Decoding, max_tokens: int) -> SamplingParams:
    """One seeded sample, with the log-probs of the sampled tokens only."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
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


def scoring_params() -> SamplingParams:
    """Log-probs of the prompt, computed anew; vLLM samples one token besides."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=1.0,
        max_tokens=1,
        seed=0,
        prompt_logprobs=0,
        detokenize=False,
        skip_reading_prefix_cache=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def prompt_logprobs(output: Any, sequence: tuple[int, ...]) -> Float[np.ndarray, " time"]:
    """Log-probs of a prompt's tokens, but for the first, out of vLLM's table."""
    pairs = zip(sequence[1:], output.prompt_logprobs[1:], strict=True)
    return np.array([entry[token].logprob for token, entry in pairs], dtype=np.float32)


def sampled_logprobs(logprobs: Any, token_ids: Sequence[int]) -> Float[np.ndarray, " time"]:
    """Log-probs of the sampled tokens out of vLLM's flat table, which lists them first at each position."""
    starts = logprobs.start_indices
    if [logprobs.token_ids[start] for start in starts] != list(token_ids):
        raise WorkerError(
            "vLLM's log-prob table does not list the sampled tokens first; the vLLM version is unsupported"
        )
    return np.array([logprobs.logprobs[start] for start in starts], dtype=np.float32)


def token_versions(spans: Sequence[Any] | None, num_tokens: int) -> Int[np.ndarray, " time"]:
    """Version of the weights that sampled each token, out of vLLM's spans [start, end) of one version each.

    Raises:
        WorkerError: the spans do not cover every token once, in order.
    """
    ends = [0, *(span.end for span in spans or ())]
    if [span.start for span in spans or ()] != ends[:-1] or ends[-1] != num_tokens:
        found = [(span.version, span.start, span.end) for span in spans or ()]
        raise WorkerError(
            f"vLLM gave weight versions (version, start, end) {found} for a completion of {num_tokens} tokens, "
            "expected spans that cover them in order; the vLLM version is unsupported"
        )
    versions = [int(span.version) for span in spans or ()]
    return np.repeat(np.array(versions, dtype=np.int64), np.diff(ends))
