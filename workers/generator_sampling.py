"""What vLLM is asked for rollouts and for scores, and how log-probs are read out of its tables.

This module must not know weights, or when requests run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

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
