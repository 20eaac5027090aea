"""Jobs of a running Ray cluster, through its Jobs API: connect, follow to the end, and say in one sentence what failed.

Every request has a deadline. A log stream that breaks off is taken up again where it ended, for a bounded time; the job
itself never notices whether somebody follows it.

The token is read by Ray from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or its default file, and sent as a header; it never
becomes part of a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_rl.errors import ConfigError, WorkerError, first_line

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

_CONNECT_S, _ANSWER_S = 10.0, 60.0
_QUIET_S = 15.0
"""After so long without output the job is asked whether it is still there."""
_RETRY_S = 1.0
_MESSAGE_LINES = 20
_CHATTY = ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging")


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard answers at `address`.

    Raises:
        ConfigError: the address is not one of a dashboard, or the server does not accept the token.
        WorkerError: nothing answers there.
    """
    if not address:
        raise ConfigError(
            "no cluster is named; give --address http://HEAD:8265, the dashboard of the cluster's head node, or set "
            "RAY_API_SERVER_ADDRESS"
        )
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address is {address!r}; expected the dashboard of the cluster's head node, for example "
            "http://HEAD:8265 (port 6379 is Ray's own, and takes no jobs)"
        )
    if "@" in address:
        raise ConfigError(
            "--address holds a user or a password, which would be printed with it; give the bare http://HEAD:8265, and "
            "the token in RAY_AUTH_TOKEN"
        )
    address = address.rstrip("/")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets its variables win over an address that is given
    os.environ.setdefault("RAY_AUTH_MODE", "token" if _has_token() else "disabled")  # before Ray is imported
    with _explained(address):
        client = _client_class()(address)
    for name in _CHATTY:
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    return client


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None], patience_s: float = 60.0) -> JobDetails:
    """Pass on what the job prints until it has ended.

    Args:
        patience_s: how long the server may be out of reach.

    Raises:
        WorkerError: the server has been out of reach for longer; the job goes on.
    """
    with _explained(client.get_address(), job):
        return asyncio.run(_follow(client, job, write, patience_s))


def details(client: JobSubmissionClient, job: str) -> JobDetails:
    """What the cluster knows of a job.

    Raises:
        ConfigError: there is no such job.
    """
    with _explained(client.get_address(), job):
        return client.get_job_info(job)


def logs(client: JobSubmissionClient, job: str) -> str:
    """All that a job has printed so far."""
    with _explained(client.get_address(), job):
        return client.get_job_logs(job)


def stop(client: JobSubmissionClient, job: str) -> bool:
    """Ask a job to end; False where it was not running."""
    with _explained(client.get_address(), job):
        return client.stop_job(job)


def start(client: JobSubmissionClient, **submission: Any) -> str:
    """Submit a job and return its id."""
    with _explained(client.get_address()):
        return client.submit_job(**submission)


def all_jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """Submitted jobs, oldest first."""
    with _explained(client.get_address()):
        found = [each for each in client.list_jobs() if each.submission_id]
    return sorted(found, key=lambda each: each.start_time or 0)


def describe(known: JobDetails) -> str:
    """One line: id, state, and what `trace-rl submit` has written beside it."""
    noted = known.metadata or {}
    notes = [f"{name} {noted[name]}" for name in ("run", "code", "run_folder") if name in noted]
    return "  ".join([known.submission_id or "", str(known.status.value), *notes])


def exit_code(ended: JobDetails) -> int:
    """0 where the job succeeded; otherwise its process's own exit code, or 1 where it has none."""
    return 0 if ended.status == "SUCCEEDED" else (ended.driver_exit_code or 1)


def why(ended: JobDetails) -> str:
    """How a job ended that did not succeed."""
    state = ended.status.value.lower()
    if ended.driver_exit_code is not None:  # it ran: the cause is the last thing that it printed
        return f"{state} with exit code {ended.driver_exit_code}"
    lines = (ended.message or "").strip().splitlines()[-_MESSAGE_LINES:]
    return "\n".join([f"{state} before anything of it ran:", *lines]) if state == "failed" else state


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()


def _client_class() -> type[JobSubmissionClient]:
    """Ray's client with a deadline for each request: its own waits for ever."""
    from ray.job_submission import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": (_CONNECT_S, _ANSWER_S), **kwargs})

    return BoundedClient


async def _follow(client: JobSubmissionClient, job: str, write: Callable[[str], None], patience_s: float) -> JobDetails:
    import aiohttp

    printed = 0
    deadline = time.monotonic() + patience_s
    while True:
        try:
            to_skip = printed  # a stream that is taken up again starts from the beginning
            async for text in _chunks(client, job):
                new, to_skip = text[to_skip:], max(0, to_skip - len(text))
                printed += len(new)
                if new:
                    write(new)
                if new or not text:  # what is only told again is no progress
                    deadline = time.monotonic() + patience_s
            known = await asyncio.to_thread(client.get_job_info, job)
            if known.status.is_terminal():
                return known
            deadline = time.monotonic() + patience_s
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{client.get_address()} has been out of reach for {patience_s:g} s ({first_line(error)}); job "
                    f"{job} goes on without being followed: trace-rl jobs logs {job} --follow"
                ) from error
        await asyncio.sleep(_RETRY_S)


async def _chunks(client: JobSubmissionClient, job: str) -> AsyncIterator[str]:
    """Chunks of the job's output; ends with the stream, or with the job where the stream has fallen silent.

    A connection that was cut without a word never ends by itself, so that silence is a reason to ask; an empty chunk
    says that the server has answered.
    """
    stream = client.tail_job_logs(job)
    pending: asyncio.Task[str] | None = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(stream))
            done, _ = await asyncio.wait({pending}, timeout=_QUIET_S)
            if done:
                finished, pending = pending, None
                try:
                    text = finished.result()
                except StopAsyncIteration:
                    return
                yield text
            elif (await asyncio.to_thread(client.get_job_info, job)).status.is_terminal():
                return
            else:
                yield ""
    finally:
        if pending is not None:
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending
        await stream.aclose()


@contextmanager
def _explained(address: str, job: str = "") -> Iterator[None]:
    """Turn what Ray's client and the network say into one sentence."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ConfigError(_token_sentence(address, str(error))) from error
    except OSError as error:  # also the base of what `requests` raises
        raise WorkerError(
            f"no Ray dashboard answers at {address} ({type(error).__name__}: {first_line(error)}); check the address "
            "and port, that the cluster runs, and that this machine reaches it (a tunnel, or kubectl port-forward)"
        ) from error
    except (RuntimeError, ValueError) as error:
        if job and "404" in first_line(error):
            raise ConfigError(f"{address} knows no job {job!r}; `trace-rl jobs status` lists its jobs") from error
        raise WorkerError(f"{address} refused the request: {first_line(error)}") from error


def _token_sentence(address: str, answer: str) -> str:
    advice = "the token that its nodes were started with"
    if "failed" in answer.partition(":")[0]:
        return f"{address} does not accept the token that was sent (HTTP 403); set RAY_AUTH_TOKEN to {advice}"
    found = f"{address} asks for a token and none was sent (HTTP 401)"
    return f"{found}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to {advice}"
