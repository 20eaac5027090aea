"""The process environment of every role, decided in one place.

Several libraries read their environment once, at import: call `apply` before torch, vLLM, DeepSpeed or Ray is
imported. Ray workers get the same variables through the runtime environment. What the user has set already wins.
"""

import os
import secrets
from pathlib import Path

_ALWAYS = {
    "TOKENIZERS_PARALLELISM": "false",  # forked tokenizer threads deadlock
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives inside its actor: one process to watch, one order
    "PYTHONHASHSEED": "0",
}
_CPU = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",  # results do not depend on the number of cores
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded; does not import torch."""
    return Path("/proc/driver/nvidia/version").exists()


def variables(kv_cache_gib: int = 0) -> dict[str, str]:
    """Environment of a role on this machine.

    Args:
        kv_cache_gib: of an engine on CPUs; 0 leaves it open.
    """
    chosen = dict(_ALWAYS)
    if not has_gpu():
        chosen |= _CPU | ({"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)} if kv_cache_gib else {})
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


def apply(kv_cache_gib: int = 0) -> None:
    """Set the environment of this process."""
    os.environ.update(variables(kv_cache_gib))


def protect_private_ray() -> None:
    """Make a Ray that this process starts ask for a token that only its descendants know.

    Always explicit: left alone, Ray switches token authentication on whenever a token file lies in the home folder. The
    token is inherited through the process environment and never written to a configuration or a runtime environment.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
