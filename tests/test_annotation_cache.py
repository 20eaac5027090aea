"""The cache of answers: what is the same request, what survives kills and company, and whose files are left alone."""

import hashlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from trace_rl.annotation_prompts import Message
from trace_rl.errors import ConfigError
from trace_rl.workers.annotation_cache import AnswerCache, CacheError, key_of
from trace_rl.workers.annotation_limits import Spent
from trace_rl.workers.chat import ChatAnswer, ChatRequest

REQUEST = ChatRequest((Message("system", "Mark."), Message("user", "1: 2 + 2 = 5")), {"type": "object"}, 64, 0.0)
ANSWER = ChatAnswer('{"spans": []}', 40, 10, {"usage_missing": 1.0})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "annotations.sqlite"


def test_an_answer_is_found_after_the_file_is_opened_again(path: Path) -> None:
    cache = AnswerCache(path)
    assert cache.find("k") is None
    assert cache.store("k", ANSWER, "label") == ANSWER == cache.find("k")
    cache.close()
    again = AnswerCache(path)
    assert again.find("k") == ANSWER and again.find("other") is None
    assert again.spent("") == Spent()  # a store without a price charges nobody


def test_the_first_answer_stays_but_the_second_is_paid_for_too(path: Path) -> None:
    first, second = AnswerCache(path), AnswerCache(path)
    other = ChatAnswer("other", 1, 2)
    price = Spent(1, 40, 10, 0.5)
    assert first.store("k", ANSWER, "label", "run", price) == ANSWER
    assert second.store("k", other, "label", "run", price) == ANSWER == second.find("k")
    assert first.spent("run") == Spent(2, 80, 20, 1.0) and first.spent("other run") == Spent()


@pytest.mark.parametrize("text", ["", "\ud83d broken pair", "nul \0 and 数学 \U0001f600", "x" * 1_000_000])
def test_any_text_comes_back_as_it_was(path: Path, text: str) -> None:
    cache = AnswerCache(path)
    cache.store("k", replace(ANSWER, text=text), "label \ud83d", "run \ud83d", Spent(1))
    assert cache.find("k") == replace(ANSWER, text=text)
    assert cache.spent("run \ud83d") == Spent(1)


def test_keys_differ_where_the_answer_may_differ() -> None:
    key = key_of("api:m", "v1", REQUEST)
    swapped = (Message("system", "Mark.1"), Message("user", ": 2 + 2 = 5"))
    others = [
        key_of("api:n", "v1", REQUEST),
        key_of("api:m", "v2", REQUEST),
        key_of("api:mv", "1", REQUEST),
        key_of("api:m", "v1", replace(REQUEST, messages=REQUEST.messages[:1])),
        key_of("api:m", "v1", replace(REQUEST, messages=swapped)),
        key_of("api:m", "v1", replace(REQUEST, schema={"type": "array"})),
        key_of("api:m", "v1", replace(REQUEST, max_tokens=65)),
        key_of("api:m", "v1", replace(REQUEST, temperature=0.1)),
        key_of("api:m", "v1", replace(REQUEST, policy_version=1)),
    ]
    assert len({key, *others}) == 10


def test_keys_are_the_same_where_the_answer_is() -> None:
    """And stay so: a changed key would ask for everything again."""
    request = replace(REQUEST, schema={"b": 1, "a": [True]}, temperature=0)
    key = key_of("api:m", "v1", request)
    assert key == key_of("api:m", "v1", replace(request, schema={"a": [True], "b": 1}, temperature=0.0))
    assert key == key_of("api:m", "v1", replace(request, affinity="p7"))
    written = (
        '{"identity":"api:m","max_tokens":64,"messages":[["system","Mark."],["user","1: 2 + 2 = 5"]],'
        '"policy_version":0,"prompt_version":"v1","schema":{"a":[true],"b":1},"temperature":0.0}'
    )
    assert key == hashlib.sha256(written.encode()).hexdigest()


def test_a_failed_transaction_keeps_neither_answer_nor_price(path: Path) -> None:
    """The ledger refuses text in its way: a trigger stands for a full disk in the middle of the transaction."""
    cache = AnswerCache(path)
    with sqlite3.connect(path) as other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON ledger BEGIN SELECT raise(ABORT, 'disk full'); END")
    with pytest.raises(CacheError, match="disk full"):
        cache.store("k", ANSWER, "label", "run", Spent(1))
    with pytest.raises(CacheError, match="disk full"):
        cache.charge("run", Spent(1))
    assert cache.find("k") is None and cache.spent("run") == Spent()
    assert cache.store("k", ANSWER, "label") == ANSWER  # and the next transaction is not caught in the last one


def test_unreadable_content_is_an_error_that_the_caller_can_pass_over(path: Path) -> None:
    cache = AnswerCache(path)
    cache.store("k", ANSWER, "label")
    with sqlite3.connect(path) as other:
        other.execute("UPDATE answers SET answer = '{\"text\": 1'")
    with pytest.raises(CacheError, match="cannot be read"):
        cache.find("k")


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    notes, foreign, newer = tmp_path / "notes.txt", tmp_path / "foreign.sqlite", tmp_path / "newer.sqlite"
    notes.write_text("not a database " * 100)
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE experiments (name TEXT)")
    AnswerCache(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    cases = ((notes, "not a database"), (foreign, "another program"), (newer, "version 2, but this program reads 1"))
    for path, reason in cases:
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=f"{path.name}.*{reason}.*annotator.cache_path"):
            AnswerCache(path)
        assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="unable to open"):
        AnswerCache(tmp_path)
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        AnswerCache(notes / "below" / "a.sqlite")


def test_without_wal_the_cache_works_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A database in memory has no WAL, as a network file system has none."""
    with caplog.at_level(logging.WARNING):
        cache = AnswerCache(Path(":memory:"))
    assert "journal mode memory" in caplog.text
    assert cache.store("k", ANSWER, "label", "run", Spent(1)) == cache.find("k")


WRITER = """
import json, sys, time
from pathlib import Path
from trace_rl.workers.annotation_cache import AnswerCache
from trace_rl.workers.annotation_limits import Spent
from trace_rl.workers.chat import ChatAnswer
name, count = sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
cache = AnswerCache(Path(sys.argv[1]))
for number in range(count):
    stored = cache.store(f"key {number}", ChatAnswer(f"{name} {number}", 3, 2), name, name, Spent(1, 3, 2, 0.25))
    print(json.dumps([number, stored.text]), flush=True)
    time.sleep(0.001)  # as between answers; SQLite's waiting is not fair to those who wait for one that never pauses
"""


def test_writers_in_several_processes_and_one_that_is_killed(path: Path) -> None:
    """Four processes make the file and write the same keys at the same time; one would never end and is killed."""
    names = ("a", "b", "c", "victim")
    writers = {
        name: subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name, "1000000" if name == "victim" else "300"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    for writer in writers.values():
        assert writer.stdout and writer.stdout.readline() == "ready\n"
    for writer in writers.values():
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    victim = writers["victim"]
    assert victim.stdout
    said = {"victim": [victim.stdout.readline() for _ in range(150)]}
    os.kill(victim.pid, signal.SIGKILL)
    said["victim"] += victim.stdout.readlines()
    for name in "abc":
        output, _ = writers[name].communicate(timeout=60)
        assert writers[name].returncode == 0
        said[name] = output.splitlines()
    victim.communicate(timeout=10)
    assert victim.returncode == -signal.SIGKILL

    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    cache = AnswerCache(path)
    for name in "abc":
        assert len(said[name]) == 300 and cache.spent(name) == Spent(300, 900, 600, 75.0)
    for lines in said.values():
        for number, text in map(json.loads, (line for line in lines if line.endswith(("]", "]\n")))):
            found = cache.find(f"key {number}")
            assert found is not None and found.text == text  # everyone was told the answer that is there
    # the victim was killed between two answers, or between storing one and saying so
    paid = cache.spent("victim")
    assert paid.requests - len(said["victim"]) in (0, 1)
    assert paid == Spent(paid.requests, 3 * paid.requests, 2 * paid.requests, 0.25 * paid.requests)
    for number in range(paid.requests):
        assert cache.find(f"key {number}") is not None  # paid and recorded
    assert cache.find(f"key {max(300, paid.requests)}") is None  # and nothing recorded that was not paid
