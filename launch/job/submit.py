"""A run as a job of a cluster that is there already: validated here, run there.

What a job is given (entry point, runtime environment, metadata) can be read by everyone who reaches the dashboard or
the Jobs API. So nothing secret goes in: names that look like secrets are refused, and so is a configuration that holds
the value of one. Secrets belong into the environment of the nodes, from which every role inherits them.

This module must not know how a job is followed or explained (`trace_rl.launch.job.jobs`) or what is shipped
(`trace_rl.launch.job.staging`).
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trace_rl.config.run import RunConfig
from trace_rl.errors import ConfigError
from trace_rl.launch.job import jobs
from trace_rl.launch.job.staging import CONFIG_NAME, Stage, stage
from trace_rl.overlays import dump_config
from trace_rl.secrecy import is_secret_name, refuse_secrets

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENTRYPOINT = f"python -m trace_rl.launch.train {CONFIG_NAME}"
INTERRUPTED = 130
_PINNED = re.compile(r"[\w.\-\[\],]+==\S+")


@dataclass(frozen=True)
class Shipped:
    """A job that was started."""

    client: JobSubmissionClient
    job: str
    stage: Stage
    """What went with it; its folder is gone."""


@dataclass(frozen=True)
class Request:
    """What the user asked for beside the configuration."""

    address: str
    variables: tuple[str, ...] = ()
    """Names of variables that the job gets with their values of here."""
    pins: Path | None = None
    """A lock whose packages are installed for the job; without it the image has them."""
    is_detached: bool = False
    job: str = ""
    """The job's id; by default one is made from the run's name."""


def submit(config: RunConfig, request: Request) -> int:
    """Ship code and configuration, start the job and, unless detached, follow it to its end.

    Returns:
        The exit code of the job; 0 where it was only started.

    Raises:
        ConfigError: something of this machine or a secret would go with the job; the server asks for another token.
        WorkerError: the cluster cannot be reached.
    """
    shipped, console = ship(config, request), Console(stderr=True)
    job, staged = shipped.job, shipped.stage
    beside = f", with {', '.join(staged.plugins)} of this folder" if staged.plugins else ""
    folder_of_run = config.run.folder.format(name=config.run.name)
    _say(console, f"job {job} at {request.address}: code {staged.digest}{beside}, run folder {folder_of_run}")
    if request.is_detached:
        print(job)
        _say(console, how_to(job, request.address))
        return 0
    return watch(shipped.client, job, request.address)


def ship(config: RunConfig, request: Request) -> Shipped:
    """Ship code and configuration and start the job; raises as `submit` does."""
    environment = chosen_variables(request.variables)
    pinned = pinned_packages(request.pins) if request.pins else []
    refuse_secrets(dump_config(config), os.environ)
    with tempfile.TemporaryDirectory(prefix="trace-rl-stage-") as folder:
        staged = stage(config, Path.cwd(), Path(folder))
        client = jobs.connect(request.address)
        job = jobs.start(
            client,
            entrypoint=ENTRYPOINT,
            submission_id=request.job or job_name(config.run.name),
            runtime_env=runtime_env(staged.folder, environment, pinned),
            metadata={
                "run": config.run.name,
                "run_folder": config.run.folder.format(name=config.run.name),
                "code": staged.digest,
            },
        )
    return Shipped(client, job, staged)


def watch(client: JobSubmissionClient, job: str, address: str) -> int:
    """Print what the job prints; return its exit code, or `INTERRUPTED` where the user has had enough of it."""
    console = Console(stderr=True)
    try:
        ended = jobs.follow(client, job, _print_now)
    except KeyboardInterrupt:
        _say(console, f"\nno longer following; job {job} goes on\n{how_to(job, address)}")
        return INTERRUPTED
    if ended.status != "SUCCEEDED":
        _say(console, f"job {job} {jobs.why(ended)}", style="red")
    return jobs.exit_code(ended)


def how_to(job: str, address: str) -> str:
    """The commands that a running job is followed and stopped by."""
    return (
        f"  follow it: trace-rl jobs logs {job} --follow --address {address}\n"
        f"  stop it:   trace-rl jobs stop {job} --address {address}"
    )


def runtime_env(folder: Path, variables: Mapping[str, str], pinned: Sequence[str]) -> dict[str, Any]:
    """Ray's runtime environment of the job; every role inherits it."""
    environment: dict[str, Any] = {"working_dir": str(folder)}
    if variables:
        environment["env_vars"] = dict(variables)
    if pinned:  # a lock is complete, and may overrule what some package asks for
        options = ["--no-deps", "--disable-pip-version-check", "--no-cache-dir"]
        environment["pip"] = {"packages": list(pinned), "pip_check": False, "pip_install_options": options}
    return environment


def chosen_variables(names: Sequence[str]) -> dict[str, str]:
    """Values of environment variables that are to be shown to everyone who may see the job.

    Raises:
        ConfigError: a name is not set here, or looks like that of a secret.
    """
    for name in names:
        if is_secret_name(name):
            raise ConfigError(
                f"--env {name} looks like a secret, and everyone who reaches the cluster's Jobs API can read a job's "
                "variables; set it in the environment of the nodes instead, before `ray start` or by a Kubernetes "
                "Secret: every role inherits it from there"
            )
        if name not in os.environ:
            raise ConfigError(f"--env {name} names a variable that is not set here; export it, or leave it out")
    return {name: os.environ[name] for name in names}


def pinned_packages(lock: Path) -> list[str]:
    """The lines of a lock.

    Raises:
        ConfigError: it cannot be read, or a line is no exact version.
    """
    try:
        lines = lock.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--pip {lock} cannot be read ({error}); give a lock such as requirements/cuda.lock"
        ) from None
    wanted = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    for line in wanted:
        if not _PINNED.fullmatch(line):
            raise ConfigError(
                f"--pip {lock} holds {line!r}; expected lines like name==1.2.3, so that every node gets the same"
            )
    return wanted


def job_name(run: str) -> str:
    """An id that no other job has, readable as that of the run."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", run).strip("-.") or "run"
    return f"{readable}-{secrets.token_hex(4)}"


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)
