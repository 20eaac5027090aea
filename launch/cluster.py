"""Ray for a run: a private one on this machine, or a running cluster that is named explicitly.

A private Ray has its own folder and asks for a token that only this run knows (`environment.protect_private_ray`). The
token is what protects it: Ray listens on the node's own address whatever it is told. At the end it is shut down, and
its workers' logs are kept in the run folder. A cluster that was joined is only left.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trace_rl.config.placement import Resources
from trace_rl.config.run import RunConfig
from trace_rl.errors import WorkerError
from trace_rl.workers import environment

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 512 * 2**20


def actor_of(role: type, resources: Resources, **options: Any) -> Any:
    """A role's class as an actor class with its share of the cluster; `.remote(...)` starts it."""
    import ray

    return ray.remote(role).options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, **options)


@contextmanager
def ray_session(config: RunConfig, log_folder: Path) -> Iterator[None]:
    """Start or join Ray for the time of the block.

    Raises:
        WorkerError: the cluster cannot be reached.
    """
    variables = environment.variables(config.generator.kv_cache_gib)
    if config.placement.ray_address == "local":
        with _private_ray(config, variables, log_folder):
            yield
        return
    import ray

    try:
        ray.init(
            address=config.placement.ray_address,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkerError(
            f"no Ray cluster could be joined at placement.ray_address={config.placement.ray_address!r} ({error}); "
            "check the address and, with token authentication, RAY_AUTH_MODE and RAY_AUTH_TOKEN"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _private_ray(config: RunConfig, variables: dict[str, str], log_folder: Path) -> Iterator[None]:
    import ray

    folder = Path(tempfile.mkdtemp(prefix="trace-rl-"))  # not in the run folder: socket paths must stay short
    try:
        ray.init(
            address="local",
            num_cpus=config.placement.ray_cpus or config.cpus_for_roles,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": variables},
            _temp_dir=str(folder),
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise WorkerError(f"a private Ray could not be started on this machine: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
        _keep_worker_logs(folder, log_folder)
        shutil.rmtree(folder, ignore_errors=True)


def _keep_worker_logs(ray_folder: Path, log_folder: Path) -> None:
    """Copy what the workers printed; Ray's own logs are not worth keeping."""
    for log in ray_folder.glob("session_*/logs/worker-*"):
        if log.is_file() and log.stat().st_size and not log.is_symlink():
            log_folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, log_folder / log.name)
