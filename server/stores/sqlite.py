"""Sessions and prefixes in an SQLite file: the store of a single machine."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.errors import ConfigurationError, StoreFullError
from server.stores.base import Session, unavailable

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
DROP INDEX IF EXISTS sessions_of_owner; -- of version 0.2
CREATE INDEX IF NOT EXISTS sessions_of_owner_by_end ON sessions (owner, expires_at, session_id);
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
IN_MEMORY = ":memory:"
RESERVE_BYTES = 8 * 2**20  # more than the log has that is not in the file yet
BUSY_SECONDS, PREFIX_BUSY_SECONDS = 10.0, 1.0  # a prefix is not worth a long wait


class SQLiteSessionStore:
    """Raises ConfigurationError if the file cannot be opened. Use as `SessionStore` says. max_bytes: of all sessions.

    Write-ahead log, synchronised at each commit: a turn that was answered survives the loss of process and power.
    """

    def __init__(self, path: Path | str, max_bytes: int | None = None) -> None:
        reserve = None if str(path) == IN_MEMORY else Reserve(Path(f"{path}-reserve"), RESERVE_BYTES)
        self._database = _Database(path, SCHEMA, BUSY_SECONDS, "FULL", reserve, max_bytes)

    def create(self, sessions: Sequence[Session], data: bytes, max_per_owner: int) -> bool:
        first, ids = sessions[0], json.dumps([session.session_id for session in sessions])
        _, *values = vars(first).values()
        self._database.change(
            "DELETE FROM sessions WHERE session_id IN ("
            "SELECT session_id FROM sessions WHERE owner = ? AND expires_at <= ? ORDER BY expires_at "
            "LIMIT max(0, (SELECT count(*) FROM sessions WHERE owner = ?) + ? - ?))",
            *(first.owner, first.created_at, first.owner, len(sessions), max_per_owner),
        )
        # One statement, so that all are there or none, and two servers cannot both see the last free place.
        n_added = self._keep(
            first.created_at,
            f"INSERT INTO sessions ({FIELDS}, data) SELECT value, ?, ?, ?, ?, ?, ?, ? FROM json_each(?) "
            "WHERE (SELECT count(*) FROM sessions WHERE owner = ? AND expires_at > ?) + ? <= ?",
            *(*values, data, ids),
            *(first.owner, first.created_at, len(sessions), max_per_owner),
        )
        return n_added == len(sessions)

    def load(self, session_id: str, owner: str, now: float) -> tuple[Session, bytes] | None:
        rows = self._database.rows(
            f"SELECT {FIELDS}, data FROM sessions WHERE session_id = ? AND owner = ? AND expires_at > ?",
            *(session_id, owner, now),
        )
        return (Session(*rows[0][:-1]), rows[0][-1]) if rows else None

    def commit(self, session: Session, data: bytes) -> bool:
        n_changed = self._keep(
            session.used_at,
            "UPDATE sessions SET turn = ?, num_tokens = ?, used_at = ?, expires_at = ?, data = ? "
            "WHERE session_id = ? AND owner = ? AND turn = ?",
            *(session.turn, session.num_tokens, session.used_at, session.expires_at, data),
            *(session.session_id, session.owner, session.turn - 1),
        )
        return n_changed == 1

    def delete(self, session_id: str, owner: str) -> bool:
        statement = "DELETE FROM sessions WHERE session_id = ? AND owner = ?"
        return self._database.change(statement, session_id, owner) == 1

    def list(self, owner: str, now: float, limit: int, after: str | None = None) -> list[Session]:
        return [
            Session(*row)
            for row in self._database.rows(
                f"SELECT {FIELDS} FROM sessions WHERE owner = ? AND expires_at > ? AND (? IS NULL OR "
                "(expires_at, session_id) < (SELECT expires_at, session_id FROM sessions WHERE session_id = ?)) "
                "ORDER BY expires_at DESC, session_id DESC LIMIT ?",
                *(owner, now, after, after, limit),
            )
        ]

    def remove_expired(self, before: float) -> None:
        self._database.change("DELETE FROM sessions WHERE expires_at <= ?", before)

    def close(self) -> None:
        self._database.close()

    def _keep(self, now: float, statement: str, *values: object) -> int:
        """As `change`. Where there is no room, what has ended makes some, whoever's it is."""
        try:
            return self._database.change(statement, *values)
        except StoreFullError:
            self.remove_expired(now)
            return self._database.change(statement, *values)


class SQLitePrefixStore:
    """Use as `PrefixStore` says; opened as SQLiteSessionStore.

    Not synchronised: what a loss of power takes is read again.
    """

    def __init__(self, path: Path | str, max_bytes: int) -> None:
        self._database, self.max_bytes = _Database(path, PREFIX_SCHEMA, PREFIX_BUSY_SECONDS, "NORMAL"), max_bytes

    def put(self, key: bytes, data: bytes) -> None:
        if len(data) > self.max_bytes:
            return
        change, rows = self._database.change, self._database.rows
        change("INSERT OR REPLACE INTO prefixes VALUES (?, ?, ?, ?)", key, time.time(), len(data), data)
        while rows("SELECT total(size) FROM prefixes")[0][0] > self.max_bytes:
            change("DELETE FROM prefixes WHERE key = (SELECT key FROM prefixes ORDER BY used_at LIMIT 1)")

    def find(self, keys: Sequence[bytes]) -> tuple[int, bytes] | None:
        for i, key in enumerate(keys):
            for (data,) in self._database.rows("SELECT data FROM prefixes WHERE key = ?", key):
                self._database.change("UPDATE prefixes SET used_at = ? WHERE key = ?", time.time(), key)
                return i, data
        return None

    def close(self) -> None:
        self._database.close()


class Reserve:
    """A file of zeros: room on a full disk, for which it is emptied while something else is written."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        self._path, self._n_bytes = path, n_bytes

    def empty(self) -> None:
        with contextlib.suppress(OSError):
            os.truncate(self._path, 0)

    def fill(self) -> None:
        """As far as there is room."""
        with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
            file.write(bytes(max(0, self._n_bytes - file.tell())))


class _Database:
    """A connection for all threads; each statement is one transaction.

    What goes wrong (it is locked, the disk is full, the file is damaged) raises StoreUnavailableError. reserve: for
    what needs no more pages of the file than there are, deleting say, and only has to be logged; max_bytes: of all.
    """

    def __init__(
        self,
        path: Path | str,
        schema: str,
        busy_seconds: float,
        synchronous: str,
        reserve: Reserve | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self._lock, self._reserve = threading.Lock(), reserve
        if reserve:
            reserve.empty()
        try:
            self._connection = sqlite3.connect(
                path, timeout=busy_seconds, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._connection.executescript(schema)
            self._connection.executescript("BEGIN; PRAGMA user_version = 1; ROLLBACK")  # can it be written at all?
            self._max_pages = self._pragma("max_page_count")
            if max_bytes is not None:
                self._max_pages = self._pragma("max_page_count", max_bytes // self._pragma("page_size"))
        except sqlite3.Error as error:
            raise ConfigurationError(f"The store {path} cannot be opened: {error}.") from error
        if reserve:
            reserve.fill()

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self._execute(statement, values)[0]

    def change(self, statement: str, *values: object) -> int:
        """How many rows that changed."""
        return self._execute(statement, values)[1]

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _execute(self, statement: str, values: Sequence[object]) -> tuple[list[tuple[Any, ...]], int]:
        with self._lock:
            try:
                try:
                    return self._try(statement, values)
                except sqlite3.OperationalError as error:
                    if not _is_full(error) or self._reserve is None:
                        raise
                    return self._try_with(self._reserve, statement, values)
            except sqlite3.Error as error:
                raise unavailable(error, is_full=_is_full(error)) from error

    def _try(self, statement: str, values: Sequence[object]) -> tuple[list[tuple[Any, ...]], int]:
        cursor = self._connection.execute(statement, values)
        return cursor.fetchall(), cursor.rowcount

    def _try_with(
        self, reserve: Reserve, statement: str, values: Sequence[object]
    ) -> tuple[list[tuple[Any, ...]], int]:
        """Once more, on a full disk. What the log takes of the reserve comes back when it has gone into the file."""
        self._pragma("max_page_count", self._pragma("page_count"))
        reserve.empty()
        try:
            return self._try(statement, values)
        finally:
            self._pragma("max_page_count", self._max_pages)
            with contextlib.suppress(sqlite3.Error):
                self._pragma("wal_checkpoint(TRUNCATE)")
            reserve.fill()

    def _pragma(self, name: str, value: int | None = None) -> int:
        found = self._connection.execute(f"PRAGMA {name}" if value is None else f"PRAGMA {name} = {value}")
        return int(found.fetchone()[0])


def _is_full(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
