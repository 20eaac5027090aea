"""Answers of language models on disk, and what each run has spent on them, so that nothing is paid for twice.

Decides what makes two requests the same, and what survives a kill: an answer and its price are one transaction. It must
not know what is asked or when asking is worth it.

Invariants: the first answer to a key stays; after a process is killed every answer whose `store` returned is there, and
a run's ledger is the sum of what was charged (after a loss of power the last transactions may be missing, whole ones).
Several processes may use one file. An `AnswerCache` is used by one thread at a time and is not carried across a fork.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trace_rl.errors import ConfigError, TraceError
from trace_rl.workers.annotation_limits import Spent
from trace_rl.workers.chat import ChatAnswer, ChatRequest

logger = logging.getLogger(__name__)

_VERSION = 1
_APPLICATION = 0x54524143
"""Marks the file as ours; another program's database is left alone."""
_PATIENCE_S = 5.0
"""How long another process's write is waited for; one takes well under a millisecond."""
_TABLES = (
    "CREATE TABLE answers (key TEXT PRIMARY KEY, label TEXT NOT NULL, answer TEXT NOT NULL)",
    "CREATE TABLE ledger (run TEXT PRIMARY KEY, requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, "
    "completion_tokens INTEGER NOT NULL, money REAL NOT NULL)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
_CHARGE = (
    "INSERT INTO ledger VALUES (?, ?, ?, ?, ?) ON CONFLICT (run) DO UPDATE SET requests = requests + excluded.requests,"
    " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
    " completion_tokens = completion_tokens + excluded.completion_tokens, money = money + excluded.money"
)


class CacheError(TraceError):
    """The cache cannot be read or written at the moment; asking goes on without it."""


def key_of(identity: str, prompt_version: str, request: ChatRequest) -> str:
    """SHA-256 of everything that an answer depends on; not of `affinity`, which only says where it is computed."""
    parts = {
        "identity": identity,
        "prompt_version": prompt_version,
        "messages": [[message.role, message.content] for message in request.messages],
        "schema": request.schema,
        "max_tokens": request.max_tokens,
        "temperature": float(request.temperature),
        "policy_version": request.policy_version,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class AnswerCache:
    """A file of answers and of runs' spending.

    Args:
        path: made with its folder where it is missing.

    Raises:
        ConfigError: the file cannot be opened, is another program's, or has another version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Transactions are begun by hand. Asynchronous actors are built on another thread than they run on.
            self._db = sqlite3.connect(path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False)
            with _closed_on_error(self._db):
                self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"The answers of the annotator cannot be kept in {path}: {error}; give a file of this program, or one "
                "that does not exist yet, as annotator.cache_path"
            ) from error

    def find(self, key: str) -> ChatAnswer | None:
        """The stored answer.

        Raises:
            CacheError: the file cannot be read.
        """
        with self._reported("read"):
            row = self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            return _read(row[0]) if row else None

    def store(self, key: str, answer: ChatAnswer, label: str, run: str = "", spent: Spent | None = None) -> ChatAnswer:
        """Store an answer unless there is one, charge `spent` to `run` in the same transaction, and return the answer
        that is stored.

        Args:
            label: for people who look into the file.
            spent: None where nothing was paid.

        Raises:
            CacheError: the file cannot be written; neither answer nor charge was kept.
        """
        row = (key, _printable(label), _written(answer))
        with self._transaction():
            is_new = self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", row).rowcount == 1
            if spent is not None:
                self._charge(run, spent)
            if is_new:
                return answer
            return _read(self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()[0])

    def charge(self, run: str, spent: Spent) -> None:
        """Add to what a run has spent.

        Raises:
            CacheError: the file cannot be written; nothing was charged.
        """
        with self._transaction():
            self._charge(run, spent)

    def spent(self, run: str) -> Spent:
        """All that was charged to a run.

        Raises:
            CacheError: the file cannot be read.
        """
        with self._reported("read"):
            columns = "requests, prompt_tokens, completion_tokens, money"
            row = self._db.execute(f"SELECT {columns} FROM ledger WHERE run = ?", (_printable(run),)).fetchone()
            return Spent(*row) if row else Spent()

    def close(self) -> None:
        self._db.close()

    def _charge(self, run: str, spent: Spent) -> None:
        amounts = (spent.requests, spent.prompt_tokens, spent.completion_tokens, spent.money)
        self._db.execute(_CHARGE, (_printable(run), *amounts))

    def _prepare(self) -> None:
        """Check whose file it is before anything is written to it; make the tables of a new one."""
        with self._db:
            self._db.execute("BEGIN")  # one view of a file that another process may be making
            self._check()
        mode = _patiently(lambda: self._db.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        if mode != "wal":
            logger.warning("%s is kept in journal mode %s, because its file system has no WAL", self._path, mode)
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            if self._check():  # again, under the lock: another process may have made the tables meanwhile
                for statement in _TABLES:
                    self._db.execute(statement)

    def _check(self) -> bool:
        """Whether the file is empty.

        Raises:
            sqlite3.DatabaseError: the file is not ours, or not of this version.
        """
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        is_empty = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if is_empty and not application and not version:
            return True
        if application != _APPLICATION:
            raise sqlite3.DatabaseError("the file is the database of another program")
        if version != _VERSION:
            raise sqlite3.DatabaseError(f"the file is of version {version}, but this program reads {_VERSION}")
        return False

    @contextmanager
    def _reported(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"The stored answers in {self._path} cannot be {doing}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._reported("written"), self._db:  # which commits, or rolls back on an error
            self._db.execute("BEGIN IMMEDIATE")
            yield


@contextmanager
def _closed_on_error(db: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        db.close()
        raise


def _patiently(act: Callable[[], str]) -> str:
    """SQLite does not wait for other processes while the journal mode changes, so we do."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return act()
        except sqlite3.OperationalError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


def _written(answer: ChatAnswer) -> str:
    """ASCII, because a model's text may hold lone surrogates, which SQLite does not take."""
    fields = {
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "notes": dict(answer.notes),
    }
    return json.dumps(fields)


def _read(written: str) -> ChatAnswer:
    fields = json.loads(written)
    return ChatAnswer(fields["text"], fields["prompt_tokens"], fields["completion_tokens"], fields["notes"])


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
