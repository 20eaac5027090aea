"""A Ray head node of its own on loopback, with token authentication, started as users start one: `ray start --head`.

Its processes carry a mark, as those of a watched run do, and are ended by it. Everything it writes lies in its own
temporary folder.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from watched_run import WatchedRun

BIN = Path(sys.executable).parent


class RayHead(WatchedRun):
    """`with RayHead(folder, num_cpus=2) as head:` waits until jobs are taken, and ends every process at the end.

    Args:
        variables: put into the environment of the node, which its jobs and their actors inherit.
    """

    def __init__(self, cwd: Path, num_cpus: int, variables: Mapping[str, str] | None = None) -> None:
        self.token = secrets.token_hex(32)
        gcs, self._port, client, agent = _free_ports(4)
        self.address = f"http://127.0.0.1:{self._port}"
        self.gcs_address = f"127.0.0.1:{gcs}"
        super().__init__([], cwd, {**self.client_variables(), **(variables or {}), "RAY_USAGE_STATS_ENABLED": "0"})
        self._command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        self._command += [f"--port={gcs}", f"--dashboard-port={self._port}", "--dashboard-host=127.0.0.1"]
        self._command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        self._command += [f"--num-cpus={num_cpus}", f"--object-store-memory={256 * 2**20}"]
        self._command += ["--min-worker-port=20000", "--max-worker-port=20999", "--disable-usage-stats"]

    def __enter__(self) -> RayHead:
        super().__enter__()
        try:
            self.wait_until(self._takes_jobs, "taking jobs", 60)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def client_variables(self) -> dict[str, str]:
        """What a user of the cluster has in the environment."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PATH": f"{BIN}:{os.environ['PATH']}"}

    def run(
        self, command: list[str], cwd: Path, timeout_s: float, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of a user of this cluster to its end; standard error goes into the output."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **self.client_variables(), **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    def _takes_jobs(self) -> bool:
        time.sleep(0.2)
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, outside of the range of Ray's workers."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
