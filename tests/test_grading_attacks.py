"""Hostile responses and references through the real pool: a verdict each, in time, and nothing else happens."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from hostile_completions import Hostile, corpus

from trace_rl.workers.confinement import VIOLATION_STATUS
from trace_rl.workers.grading import MAX_KEPT_BYTES, MAX_TEXT_BYTES, GradingPool, Verdict

TIMEOUT_S = 1.0
MARGIN_S = 20.0
"""For machines that are busy with other things, and for the start of a process in place of a killed one."""
LIBRARY_BYTES = 2**28
PARENT_GROWTH_BYTES = 64 * 2**20
RIGHT, WRONG = ("\\boxed{\\frac{140}{2}}", "70"), ("\\boxed{71}", "70")
ALIVE = [Verdict(1.0, "graded"), Verdict(0.0, "graded")]
REACHED = "reach for"
ENDED = ("ended with status", REACHED)
"""What verdicts say of processes that ended before their deadline."""


@dataclass
class Watch:
    """What is seen of the grading processes while they work."""

    peak_bytes: int = 0
    offspring: set[str] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    is_over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        for child in grading_processes():
            try:
                self.peak_bytes = max(self.peak_bytes, child.memory_info().rss)
                self.offspring |= {" ".join(process.cmdline()) for process in child.children(recursive=True)}
            except psutil.Error:  # ended meanwhile
                continue
            self.seen.add(child.pid)

    def keep_looking(self) -> None:
        while not self.is_over.wait(0.02):
            self.look()


@dataclass(frozen=True)
class Run:
    """What came of the whole corpus."""

    verdicts: dict[str, Verdict]
    seconds: dict[str, float]
    watch: Watch


def grading_processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        try:
            if "trace_rl.workers.grading" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def run(pool: GradingPool, attacks: list[Hostile]) -> Run:
    watch = Watch()
    watching = threading.Thread(target=watch.keep_looking)
    watching.start()
    verdicts, seconds = {}, {}
    try:
        for attack in attacks:
            started = time.monotonic()
            (verdicts[attack.name],) = pool.grade([(attack.text, attack.answer)])
            seconds[attack.name] = time.monotonic() - started
    finally:
        watch.is_over.set()
        watching.join()
    return Run(verdicts, seconds, watch)


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("canaries") / "canary"
    file.write_text("alive")
    return file


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    made = GradingPool(num_processes=2, timeout_s=TIMEOUT_S)
    assert made.grade([RIGHT, WRONG]) == ALIVE
    yield made
    made.close()


@pytest.fixture(scope="module")
def attacked(pool: GradingPool, canary: Path) -> Run:
    """The whole corpus, one pair after the other."""
    return run(pool, corpus(canary))


def test_every_attack_gets_a_verdict_in_time(attacked: Run) -> None:
    assert len(attacked.verdicts) >= 100
    late = {name: seconds for name, seconds in attacked.seconds.items() if seconds > TIMEOUT_S + MARGIN_S}
    assert not late
    assert {verdict.cause for verdict in attacked.verdicts.values()} == {"graded", "timeout", "error"}


def test_no_attack_earns_anything(attacked: Run) -> None:
    assert not {name: verdict for name, verdict in attacked.verdicts.items() if verdict.reward}


def test_what_never_ends_is_a_timeout(attacked: Run) -> None:
    endless = ("power_tower", "mersenne", "harmonic_sum", "towers_on_both_sides", "tower_in_the_reference")
    assert {attacked.verdicts[name].cause for name in endless} == {"timeout"}


def test_errors_say_what_went_wrong_in_few_words(attacked: Run) -> None:
    for verdict in attacked.verdicts.values():
        assert bool(verdict.detail) == (verdict.cause == "error")
        assert len(verdict.detail) < 600


def test_no_payload_runs(attacked: Run, canary: Path) -> None:
    assert [file.name for file in canary.parent.iterdir()] == ["canary"] and canary.read_text() == "alive"
    code = [attack.name for attack in corpus(canary) if attack.attack in ("code", "commands", "characters")]
    details = {name: attacked.verdicts[name].detail for name in code}
    assert not {name: detail for name, detail in details.items() if any(word in detail for word in ENDED)}
    assert not {name: verdict for name, verdict in attacked.verdicts.items() if REACHED in verdict.detail}


def test_processes_start_no_others_and_stay_within_their_memory(attacked: Run) -> None:
    assert not attacked.watch.offspring
    assert len(attacked.watch.seen) > 2  # killed ones were replaced
    assert attacked.watch.peak_bytes < LIBRARY_BYTES + MAX_TEXT_BYTES


def test_the_pool_is_at_full_strength_afterwards(pool: GradingPool, attacked: Run) -> None:
    assert pool.grade([RIGHT, WRONG] * 4) == ALIVE * 4
    alive = grading_processes()
    assert len(alive) == 2
    for process in alive:
        assert process.is_running() and not process.net_connections()
        assert process.memory_info().rss < MAX_KEPT_BYTES


RECORDER = """
import json, logging, sys
from pathlib import Path
from hostile_completions import corpus
from trace_rl.rewards import grade_text

logging.disable()
seen = []

def record(event, arguments):
    is_write = event == "open" and isinstance(arguments[1], str) and set("wxa+") & set(arguments[1])
    if is_write or event.startswith(("os.", "subprocess.", "socket.", "shutil.", "ctypes.dl", "pty.")):
        seen.append([event, repr(arguments)[:200]])
    elif event == "compile" and arguments[0] is not None:
        source = arguments[0]
        seen.append([event, source.decode() if isinstance(source, bytes) else str(source)])

sys.dont_write_bytecode = True
sys.addaudithook(record)
for attack in corpus(Path(sys.argv[1])):
    if attack.attack in ("code", "commands", "characters"):
        try:
            grade_text(attack.text, attack.answer)
        except Exception:
            pass
json.dump(seen, sys.stdout)
"""
LISTING = {"os.listdir", "os.scandir"}  # imports look for files


def test_nothing_of_a_payload_is_compiled_and_nothing_outside_is_touched(canary: Path) -> None:
    command = [sys.executable, "-P", "-c", RECORDER, str(canary)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    seen = json.loads(done.stdout)
    assert not [item for item in seen if item[0] != "compile" and item[0] not in LISTING]
    sources = [source for event, source in seen if event == "compile"]
    assert "from sympy import *" in sources  # sympy does compile: numbers, and the terms of series
    assert any("_lambdifygenerated" in source for source in sources)
    payloads = ("quit[", "import\x0cthis", "__import__(", "os.system", "exit(", canary.name)
    assert not [source for source in sources if any(payload in source for payload in payloads)]


ATTEMPTS = {
    "program": "import os; os.system('true')",
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "fork": "import os; os.fork()",
    "file": "open('made', 'w')",
    "low_level_file": "import os; os.open('made', os.O_CREAT | os.O_WRONLY)",
    "removal": "import os; os.remove('victim')",
    "folder": "import os; os.mkdir('made')",
    "socket": "import socket; socket.socket()",
    "library": "import ctypes; ctypes.CDLL('libc.so.6')",
}


def confined(code: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    prepared = (
        "from trace_rl.workers import confinement; confinement.limit_resources(2**28); "
        f"confinement.refuse_side_effects(); {code}"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", prepared], cwd=folder, capture_output=True, timeout=120, check=False
    )


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_a_process_that_reaches_out_ends_at_once(attempt: str, tmp_path: Path) -> None:
    (tmp_path / "victim").touch()
    done = confined(ATTEMPTS[attempt], tmp_path)
    assert done.returncode == VIOLATION_STATUS
    assert b"Text that was graded tried" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["victim"]


def test_a_confined_process_may_compute_read_and_import_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("7")
    works = confined("import fractions; print(fractions.Fraction(open('data').read()) ** 2)", tmp_path)
    assert (works.returncode, works.stdout) == (0, b"49\n")
    greedy = confined("bytearray(2**28)", tmp_path)
    assert greedy.returncode == 1 and b"MemoryError" in greedy.stderr
    files = confined("[open('data') for _ in range(64)]", tmp_path)
    assert files.returncode == 1 and b"Too many open files" in files.stderr


@pytest.mark.slow
def test_three_rounds_leave_the_parent_as_it_was(pool: GradingPool, attacked: Run, canary: Path) -> None:
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        again = run(pool, corpus(canary))
        assert set(again.verdicts) == set(attacked.verdicts)
        assert again.watch.peak_bytes < LIBRARY_BYTES + MAX_TEXT_BYTES
        assert pool.grade([RIGHT, WRONG] * 2) == ALIVE * 2
    assert psutil.Process().memory_info().rss - before < PARENT_GROWTH_BYTES
    assert len(grading_processes()) == 2
