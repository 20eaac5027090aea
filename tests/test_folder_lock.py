"""The lock on a folder: one holder, told by name; a killed one lets go; what cannot be told is not guessed."""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_run import MadeRun
from rich.console import Console

from trace_rl.errors import ConfigError
from trace_rl.launch import train
from trace_rl.launch.folder_lock import held, look

HOLDER = """
import sys, time
from pathlib import Path
from trace_rl.launch.folder_lock import held
with held(Path(sys.argv[1]), "it", ""):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(file: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_killed_process_lets_go_and_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with holder(file) as process:
        state, found = look(file)
        assert state == "held" and found is not None
        assert (found.process, found.host, found.working_folder) == (process.pid, socket.gethostname(), os.getcwd())
        assert abs(found.since_s - time.time()) < 60
        with (
            pytest.raises(ConfigError, match=f"^it is held already by {found}; wait$"),
            held(file, "it is held", "wait"),
        ):
            pass
        process.kill()
        process.wait(10)
        assert look(file) == ("free", found)
        with held(file, "it is held", "wait"):
            assert look(file)[0] == "held"
    assert look(file)[0] == "free"


def test_a_second_driver_on_a_folder_is_refused_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MadeRun(tmp_path, run={"resume": "auto"})
    monkeypatch.setattr(train.preflight, "check", lambda config: None)
    with holder(run.folder.lock) as process:
        before = sorted(run.path.iterdir())
        with pytest.raises(
            ConfigError, match=rf"demo is being written already by process {process.pid} on host \S+ since"
        ):
            train.run(run.config, Console(file=io.StringIO()))
        assert sorted(run.path.iterdir()) == before


def test_looking_does_not_keep_a_driver_out(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with held(file, "it is held", "wait"):
        pass
    script = "import sys, pathlib\nfrom trace_rl.launch.folder_lock import look\nprint('go', flush=True)\n"
    script += "while True: look(pathlib.Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            for _ in range(20):
                with held(file, "it is held", "wait"):
                    pass
        finally:
            process.kill()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": "x"}', '{"process": 1e400}', "[" * 4000])
def test_a_torn_file_names_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    assert look(tmp_path / "lock") == ("free", None)


def test_what_is_no_file_tells_nothing(tmp_path: Path) -> None:
    assert look(tmp_path / "lock") == ("unknown", None)
    os.mkfifo(tmp_path / "lock")
    assert look(tmp_path / "lock") == ("unknown", None)
    assert look(tmp_path) == ("unknown", None)


def test_a_file_system_without_locks_is_told_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with held(tmp_path / "lock", "it is held", "wait"):
        state, found = look(tmp_path / "lock")
        assert state == "unknown" and found is not None and found.process == os.getpid()
    assert "cannot be locked ([Errno 38] Function not implemented)" in caplog.text
