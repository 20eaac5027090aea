"""Ray for a run: a private one on this machine, or a running cluster that is named explicitly.

A private Ray listens on the loopback interface and asks for a token that only this run knows
(`environment.protect_private_ray`); its folder can be entered by this user alone. At the end it is shut down, and its
workers' logs are kept in the run folder. A cluster that was joined is only left: Ray ends the actors of the run and
gives its placement group back. Actors get their environment one by one (`trace_rl.launch.seats`).
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from trace_rl.config.placement import Placement
from trace_rl.errors import WorkerError, first_line
from trace_rl.launch.ending import end_ray
from trace_rl.workers import worker_logs
from trace_rl.workers.log_redaction import redact_file

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 512 * 2**20
_CONNECT_S = 10.0
_ONE_TRY = ("RAY_gcs_server_port_wait_time_s", "1")
"""Left alone, a driver tries twenty times to reach the head node, for half a minute each."""


class Asks(Protocol):
    """The part of a configuration that says which Ray is wanted."""

    @property
    def placement(self) -> Placement: ...

    @property
    def cpus_for_roles(self) -> int: ...


@contextmanager
def ray_session(config: Asks, log_folder: Path) -> Iterator[None]:
    """Start or join Ray for the time of the block.

    Raises:
        WorkerError: the cluster cannot be reached.
    """
    if config.placement.ray_address == "local":
        with _private_ray(config, log_folder):
            yield
        return
    _join(config.placement.ray_address)
    try:
        yield
    finally:
        end_ray()


def _join(address: str) -> None:
    """Connect this process to a running cluster; takes two minutes at most."""
    import ray

    os.environ.setdefault(*_ONE_TRY)
    try:
        _check_listening(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises all kinds, some of them bare
        raise WorkerError(
            f"no Ray cluster could be joined at placement.ray_address={address!r} ({first_line(error)}); check the "
            "address, that this machine is one of the cluster's nodes and, with token authentication, RAY_AUTH_MODE "
            "and RAY_AUTH_TOKEN"
        ) from error


def _check_listening(address: str) -> None:
    """Raise OSError where nothing listens at host:port, which Ray would find out in half a minute only."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            pass


@contextmanager
def _private_ray(config: Asks, log_folder: Path) -> Iterator[None]:
    import ray

    closed = Path(tempfile.mkdtemp(prefix="trace-rl-"))  # not in the run folder: socket paths must stay short
    folder = closed / "ray"  # Ray opens this one, with its sockets and logs, to every user of the machine
    try:
        ray.init(
            address="local",
            num_cpus=config.placement.ray_cpus or config.cpus_for_roles,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray has no class of its own for a node that is late
        shutil.rmtree(closed, ignore_errors=True)
        raise WorkerError(f"a private Ray could not be started on this machine: {error}") from error
    worker_logs.keep_in(log_folder)
    try:
        yield
    finally:
        end_ray()
        _keep_worker_logs(folder, log_folder)
        shutil.rmtree(closed, ignore_errors=True)


def _keep_worker_logs(ray_folder: Path, log_folder: Path) -> None:
    """Copy what the workers printed, without secrets; Ray's own logs are not worth keeping."""
    for log in ray_folder.glob("session_*/logs/worker-*"):
        if log.is_file() and log.stat().st_size and not log.is_symlink():
            log_folder.mkdir(parents=True, exist_ok=True)
            redact_file(log, log_folder / log.name)
