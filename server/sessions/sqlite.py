"""Sessions and prefixes in an SQLite file: the store of a single machine."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.errors import ConfigurationError
from server.sessions.store import Session, unavailable

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    turn INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    created_at REAL NOT NULL,
    used_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS sessions_of_owner ON sessions (owner);
CREATE INDEX IF NOT EXISTS sessions_by_end ON sessions (expires_at);
"""
PREFIX_SCHEMA = """
CREATE TABLE IF NOT EXISTS prefixes (
    key BLOB PRIMARY KEY,
    used_at REAL NOT NULL,
    size INTEGER NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS prefixes_by_use ON prefixes (used_at, size);
"""
FIELDS = "session_id, owner, turn, num_tokens, created_at, used_at, expires_at"
BUSY_SECONDS, PREFIX_BUSY_SECONDS = 10.0, 1.0  # a prefix is not worth a long wait


class SQLiteStore:
    """Raises ConfigurationError if the file cannot be opened. Use as `SessionStore` says.

    Write-ahead log, synchronised at each commit: a turn that was answered survives the loss of process and power.
    """

    def __init__(self, path: Path | str) -> None:
        self._connection = _open(path, SCHEMA, BUSY_SECONDS, "FULL")
        self._lock = threading.Lock()

    def create(self, session: Session, data: bytes, max_per_owner: int) -> bool:
        values = (*vars(session).values(), data)
        # One statement, so that two servers cannot both see the last free place.
        added = self._execute(
            f"INSERT INTO sessions ({FIELDS}, data) SELECT ?, ?, ?, ?, ?, ?, ?, ? "
            "WHERE (SELECT count(*) FROM sessions WHERE owner = ? AND expires_at > ?) < ?",
            (*values, session.owner, session.created_at, max_per_owner),
        )
        return added.rowcount == 1

    def load(self, session_id: str, owner: str, now: float) -> tuple[Session, bytes] | None:
        rows = self._execute(
            f"SELECT {FIELDS}, data FROM sessions WHERE session_id = ? AND owner = ? AND expires_at > ?",
            (session_id, owner, now),
        ).fetchall()
        return (Session(*rows[0][:-1]), rows[0][-1]) if rows else None

    def commit(self, session: Session, data: bytes) -> bool:
        changed = self._execute(
            "UPDATE sessions SET turn = ?, num_tokens = ?, used_at = ?, expires_at = ?, data = ? "
            "WHERE session_id = ? AND owner = ? AND turn = ?",
            (
                *(session.turn, session.num_tokens, session.used_at, session.expires_at, data),
                *(session.session_id, session.owner, session.turn - 1),
            ),
        )
        return changed.rowcount == 1

    def delete(self, session_id: str, owner: str) -> bool:
        gone = self._execute("DELETE FROM sessions WHERE session_id = ? AND owner = ?", (session_id, owner))
        return gone.rowcount == 1

    def list(self, owner: str, now: float) -> list[Session]:
        rows = self._execute(
            f"SELECT {FIELDS} FROM sessions WHERE owner = ? AND expires_at > ? ORDER BY used_at DESC", (owner, now)
        )
        return [Session(*row) for row in rows.fetchall()]

    def remove_expired(self, now: float) -> None:
        self._execute("DELETE FROM sessions WHERE expires_at <= ?", (now,))

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _execute(self, statement: str, values: tuple[object, ...]) -> sqlite3.Cursor:
        with self._lock:  # one statement is one transaction
            try:
                return self._connection.execute(statement, values)
            except sqlite3.OperationalError as error:  # locked, the disk is full
                raise unavailable(error) from error


class SQLitePrefixStore:
    """Use as `PrefixStore` says; opened as SQLiteStore. Not synchronised: what a loss of power takes is read again."""

    def __init__(self, path: Path | str, max_bytes: int) -> None:
        self._connection = _open(path, PREFIX_SCHEMA, PREFIX_BUSY_SECONDS, "NORMAL")
        self._lock, self.max_bytes = threading.Lock(), max_bytes

    def put(self, key: bytes, data: bytes) -> None:
        if len(data) > self.max_bytes:
            return
        self._execute("INSERT OR REPLACE INTO prefixes VALUES (?, ?, ?, ?)", key, time.time(), len(data), data)
        while self._execute("SELECT total(size) FROM prefixes")[0][0] > self.max_bytes:
            self._execute("DELETE FROM prefixes WHERE key = (SELECT key FROM prefixes ORDER BY used_at LIMIT 1)")

    def find(self, keys: Sequence[bytes]) -> tuple[int, bytes] | None:
        for i, key in enumerate(keys):
            for (data,) in self._execute("SELECT data FROM prefixes WHERE key = ?", key):
                self._execute("UPDATE prefixes SET used_at = ? WHERE key = ?", time.time(), key)
                return i, data
        return None

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _execute(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise unavailable(error) from error


def _open(path: Path | str, schema: str, busy_seconds: float, synchronous: str) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.executescript(schema)
    except sqlite3.Error as error:
        raise ConfigurationError(f"The store {path} cannot be opened: {error}.") from error
    return connection
