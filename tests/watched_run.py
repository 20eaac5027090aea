"""A `trace-rl` command that is watched from outside: its processes, their arguments, and all that it leaves on disk.

Every process of the command carries a mark in its environment, which none of its descendants can lose, so that it can
be killed as a whole and nothing else is touched. Its temporary files lie in a folder of its own, where Ray's logs can
be read while it runs and after a kill. Reads /proc, so Linux only.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

_MARK = "TRACE_RL_WATCHED"
_SAMPLE_S = 0.5


class WatchedRun:
    """`with WatchedRun(arguments, cwd, variables) as run:` kills what is left of the command at its end.

    Args:
        arguments: of `trace-rl`.
        variables: put into the command's environment.
    """

    def __init__(self, arguments: Sequence[object], cwd: Path, variables: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", "trace_rl.launch.cli", *map(str, arguments)]
        self._cwd = cwd
        self._variables = variables
        self._mark = uuid.uuid4().hex
        self._is_over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.seen: set[str] = set()
        """Command lines of its processes, sampled while it ran."""
        self.temporary = Path()
        """Where Ray keeps its session."""

    def __enter__(self) -> WatchedRun:
        self.temporary = Path(tempfile.mkdtemp(prefix="tw", dir="/tmp"))  # socket paths below it must stay short
        user = getpass.getuser()
        environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{user}",  # or it compiles each time
            _MARK: self._mark,
            **self._variables,
        }
        self._printed = self._cwd / f"printed-{self._mark}"
        with self._printed.open("wb") as file:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._cwd,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)

    @property
    def printed(self) -> str:
        """Standard output and error so far."""
        return self._printed.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> dict[int, str]:
        """Those that are alive: id -> command line."""
        mark = f"{_MARK}={self._mark}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = line.decode("utf-8", "replace").strip()
            except OSError:  # it ended meanwhile, or is another user's
                continue
        return found

    def wait_until(self, is_so: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait for something that happens while the command runs.

        Args:
            what: completes "the run was not ...".
        """
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert self._process.poll() is None, f"the run ended before it was {what}:\n{self.printed}"
            assert time.monotonic() < deadline, f"the run was not {what} within {timeout_s:g} s:\n{self.printed}"
            time.sleep(0.01)

    def wait(self, timeout_s: float) -> int:
        """The exit status of the command, once all of its processes are gone."""
        status = self._process.wait(timeout_s)
        deadline = time.monotonic() + 10
        while left := self.processes():
            assert time.monotonic() < deadline, f"the run ended, but left behind {left}"
            time.sleep(0.1)
        return status

    def wait_and_keep_logs(self, folder: Path, timeout_s: float) -> int:
        """`wait`, with Ray's logs linked into a folder, since a run that ends by itself removes its session of Ray."""
        folder.mkdir()
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < deadline:
            for path in self._logs():
                kept = folder / path.name
                if path.is_file() and not path.is_symlink() and not kept.exists():
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        os.link(path, kept)
            time.sleep(0.05)
        return self.wait(max(0.0, deadline - time.monotonic()))

    def _logs(self) -> Iterator[Path]:
        """Files in the logs of Ray's sessions, links of folders not followed; what is removed meanwhile is no error."""
        for above, _, names in os.walk(self.temporary):
            if any(part.startswith("session_") for part in Path(above).parts) and "logs" in Path(above).parts:
                yield from (Path(above, name) for name in names)

    def kill(self) -> None:
        """SIGKILL to every process of the command."""
        deadline = time.monotonic() + 30
        while left := self.processes():
            assert time.monotonic() < deadline, f"these processes do not die: {left}"
            for process in left:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        self._process.wait(30)
        self._is_over.set()
        self._sampler.join(10)

    def only(self, name: str) -> int | None:
        """Id of the one process whose command line starts so, if there is one."""
        found = [process for process, line in self.processes().items() if line.startswith(name)]
        return found[0] if len(found) == 1 else None

    def kill_one(self, name: str) -> None:
        """SIGKILL to it."""
        process = self.only(name)
        assert process is not None, f"not one process is called {name}: {self.processes()}"
        os.kill(process, signal.SIGKILL)

    def ray_jobs(self) -> str:
        """What Ray tells of the jobs of the command's private Ray, which must be running."""
        from ray._raylet import GcsClient

        addresses = {
            found[1] for line in self.processes().values() if (found := re.search(r"--gcs-address=(\S+)", line))
        }
        (address,) = addresses
        return "\n".join(str(job) for job in GcsClient(address=address).get_all_job_info().values())

    def _sample(self) -> None:
        while not self._is_over.wait(_SAMPLE_S):
            self.seen.update(self.processes().values())


def forms_of(secret: str) -> list[bytes]:
    """What gives a secret away: either half of it, or the part of its base64 that does not depend on its neighbours."""
    half = len(secret) // 2
    forms = [secret[:half].encode(), secret[half:].encode()]
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + secret.encode())
        forms.append(encoded[4 : len(encoded) - 4])
    return forms


def files_with(folder: Path, forms: Sequence[bytes]) -> tuple[list[Path], list[Path]]:
    """(all regular files below a folder, those that hold one of the forms)."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return files, [path for path in files if _holds(path, forms)]


def _holds(path: Path, forms: Sequence[bytes]) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # a process that runs has removed it
        return False
    return any(form in content for form in forms)
