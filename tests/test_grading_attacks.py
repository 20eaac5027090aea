"""Hostile responses and references through the real pool: a verdict each, in time, and nothing else happens."""

import json
import os
import resource
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
REACHED, ENDED = "reach for", "ended with status"
"""What verdicts say of processes that ended before their deadline."""


ENDLESS = ("power_tower", "tower_in_the_reference")
SOME_SLOW_ONES = (
    *ENDLESS,
    *(
        "series_of_call_without_parentheses",
        "zeros",
        "matrix_power",
        "nested_2",
        "braces",
        "boxes",
        "megabyte_of_digits",
    ),
    *("megabyte_in_a_box", "megabyte_in_the_reference", "unbalanced_boxes", "many_boxes", "integer", "set_of_100000"),
    *("set_in_the_reference", "blanks_in_a_box"),
)


@dataclass
class Watch:
    """What is seen of the grading processes while they work."""

    peak_bytes: int = 0
    offspring: set[str] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    is_over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        for pid in grading_processes():
            try:
                resident_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                self.offspring |= {Path(f"/proc/{child}/cmdline").read_text() for child in children_of(pid)}
            except (OSError, IndexError):  # ended meanwhile
                continue
            self.peak_bytes = max(self.peak_bytes, resident_pages * resource.getpagesize())
            self.seen.add(pid)

    def keep_looking(self) -> None:
        while not self.is_over.wait(0.05):
            self.look()


@dataclass(frozen=True)
class Run:
    """What came of the whole corpus."""

    verdicts: dict[str, Verdict]
    seconds: dict[str, float]
    watch: Watch


def children_of(pid: int) -> list[int]:
    """As the kernel lists them; `psutil` would read the table of all processes for each look."""
    lists = [tasks.read_text() for tasks in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for child in " ".join(lists).split()]


def grading_processes() -> list[int]:
    found = []
    for pid in children_of(os.getpid()):
        try:
            if "trace_rl.workers.grading" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
        except OSError:  # ended meanwhile
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


def is_quick(attack: Hostile) -> bool:
    """Whether it is part of every test run: most are, and some of those that cost a deadline and a new process."""
    if attack.name.endswith("_everywhere") or attack.name in SOME_SLOW_ONES:
        return True
    return attack.attack in ("code", "commands", "characters") and "series" not in attack.name


@pytest.fixture(scope="module")
def attacked(pool: GradingPool, canary: Path) -> Run:
    """The quick attacks, one after the other."""
    return run(pool, [attack for attack in corpus(canary) if is_quick(attack)])


def check_verdicts(found: Run) -> None:
    """Each in time and with a known cause; errors say in few words what went wrong; nothing earns anything."""
    assert not {name: seconds for name, seconds in found.seconds.items() if seconds > TIMEOUT_S + MARGIN_S}
    assert {verdict.cause for verdict in found.verdicts.values()} <= {"graded", "timeout", "error"}
    for verdict in found.verdicts.values():
        assert bool(verdict.detail) == (verdict.cause == "error") and len(verdict.detail) < 600
    assert not {name: verdict for name, verdict in found.verdicts.items() if verdict.reward}


def check_nothing_happened(found: Run, canary: Path) -> None:
    """No payload ran, no process was started, memory stayed below the cap."""
    assert [file.name for file in canary.parent.iterdir()] == ["canary"] and canary.read_text() == "alive"
    code = {attack.name for attack in corpus(canary) if attack.attack in ("code", "commands", "characters")}
    details = {name: verdict.detail for name, verdict in found.verdicts.items()}
    assert not {name: detail for name, detail in details.items() if REACHED in detail}
    assert not {name: detail for name, detail in details.items() if ENDED in detail and name in code}
    assert not found.watch.offspring
    assert 0 < found.watch.peak_bytes < LIBRARY_BYTES + MAX_TEXT_BYTES


def test_every_attack_gets_a_verdict_in_time(attacked: Run) -> None:
    assert len(attacked.verdicts) >= 80
    check_verdicts(attacked)
    assert {attacked.verdicts[name].cause for name in ENDLESS} == {"timeout"}


def test_no_payload_runs_and_memory_stays_bounded(attacked: Run, canary: Path) -> None:
    check_nothing_happened(attacked, canary)
    assert len(attacked.watch.seen) > 2  # killed processes were replaced


def test_the_pool_is_at_full_strength_afterwards(pool: GradingPool, attacked: Run) -> None:
    assert pool.grade([RIGHT, WRONG] * 4) == ALIVE * 4
    alive = [psutil.Process(pid) for pid in grading_processes()]
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
    greedy = confined("bytearray(2**29)", tmp_path)  # well over the bound: what Python had free does not count in it
    assert greedy.returncode == 1 and b"MemoryError" in greedy.stderr
    files = confined("[open('data') for _ in range(64)]", tmp_path)
    assert files.returncode == 1 and b"Too many open files" in files.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_rounds_of_all_attacks_leave_the_parent_as_it_was(pool: GradingPool, canary: Path) -> None:
    """About 60 of the attacks run into their deadline."""
    attacks = corpus(canary)
    check_verdicts(run(pool, attacks))
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        found = run(pool, attacks)
        check_verdicts(found)
        check_nothing_happened(found, canary)
        assert pool.grade([RIGHT, WRONG] * 2) == ALIVE * 2
        assert len(grading_processes()) == 2
    assert psutil.Process().memory_info().rss - before < PARENT_GROWTH_BYTES
