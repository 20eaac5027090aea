"""The process environment of every role, decided in one place.

Several libraries read their environment once, at import: call `apply` before torch, vLLM, DeepSpeed or Ray is imported
in a process that starts Ray. Actors get theirs through Ray's runtime environment (`of_role`), by what they take of the
cluster and not by the machine that the driver runs on. What the user has set in the driver's environment wins.
"""

import json
import os
import secrets
from pathlib import Path

_NO_REPORTS_HOME = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets would tell its makers the name of each data set that it opens
    "WANDB_ERROR_REPORTING": "false",  # W&B is off unless asked for; then its crashes would go to Sentry too
}
"""Nothing is told to the makers of libraries; DeepSpeed, transformers, plotly and TensorBoard have nothing to switch
off. Each by its own name: DO_NOT_TRACK=1 would outvote a user who switches one of them on."""
_ALWAYS = {
    **_NO_REPORTS_HOME,
    "TOKENIZERS_PARALLELISM": "false",  # forked tokenizer threads deadlock
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives the run must not start another Ray
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a guest is shown the GPUs of its hosts although it asks for none
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives inside its actor: one process to watch, one order
    "PYTHONHASHSEED": "0",
}
_CPU = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",  # results do not depend on the number of cores; see `of_role`
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_ONE_MACHINE = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}
_RAY_ON_LOOPBACK = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
"""Ray's word, on Linux too, for a node that is not to be joined from elsewhere. An address that it is given does not
do: it replaces a loopback one by that of the node, and listens on every interface."""
_OURS = "TRACE_RL_ENVIRONMENT"
"""What `apply` has added, as JSON: processes that this one starts (a sweep's, a benchmark's) inherit it, and must not
take it for the user's."""
_INHERITED = json.loads(os.environ.get(_OURS, "{}"))
_SET_BY_USER = {
    name: os.environ[name]
    for name in (*_ALWAYS, *_CPU, *_ONE_MACHINE)
    if name in os.environ and os.environ[name] != _INHERITED.get(name)
}
"""Read before `apply` adds anything: that belongs to this machine, and roles may run on others."""


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded and its GPUs are not hidden from this process; does not import torch."""
    return Path("/proc/driver/nvidia/version").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def variables(kv_cache_gib: int = 0) -> dict[str, str]:
    """Environment of a process of this machine that works alone.

    Args:
        kv_cache_gib: of an engine on CPUs; 0 leaves it open.
    """
    chosen = dict(_ALWAYS)
    if not has_gpu():
        chosen |= _CPU | _ONE_MACHINE | ({"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)} if kv_cache_gib else {})
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


def of_role(gpus: str | None, is_one_machine: bool, num_cpus: float = 1.0) -> dict[str, str]:
    """Environment of an actor.

    Args:
        gpus: ids that a guest is shown, joined by commas; '' for a role on CPUs; None where Ray assigns some.
        is_one_machine: whether all actors of the run are on one machine, and may talk over its loopback interface.
        num_cpus: what the configuration gives the role; on CPUs it computes with as many threads. With GPUs Ray sees to
            that.
    """
    on_cpu = _CPU | {"OMP_NUM_THREADS": str(max(1, int(num_cpus)))} if gpus == "" else {}
    chosen = _ALWAYS | on_cpu | (_ONE_MACHINE if is_one_machine else {})
    chosen |= {name: value for name, value in _SET_BY_USER.items() if name in chosen or name in _ONE_MACHINE}
    return chosen if gpus is None else chosen | {"CUDA_VISIBLE_DEVICES": gpus}


def apply(kv_cache_gib: int = 0) -> None:
    """Set the environment of this process."""
    chosen = variables(kv_cache_gib)
    os.environ.update(chosen)
    os.environ[_OURS] = json.dumps({name: value for name, value in chosen.items() if name not in _SET_BY_USER})


def protect_private_ray() -> None:
    """Keep a Ray that this process starts to itself; call it before Ray is imported.

    Its servers listen on the loopback interface alone, and ask for a token that only its descendants know. Always
    explicit: left alone, Ray switches token authentication on whenever a token file lies in the home folder. The token
    is inherited through the process environment and never written to a configuration or a runtime environment.
    """
    os.environ.setdefault(*_RAY_ON_LOOPBACK)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
