"""Sessions in an SQLite file: the store of a single machine."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

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
FIELDS = "session_id, owner, turn, num_tokens, created_at, used_at, expires_at"
BUSY_SECONDS = 10.0


class SQLiteStore:
    """Raises ConfigurationError if the file cannot be opened. Use as `SessionStore` says.

    Write-ahead log, synchronised at each commit: a turn that was answered survives the loss of process and power.
    """

    def __init__(self, path: Path | str) -> None:
        try:
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise ConfigurationError(f"The store {path} cannot be opened: {error}.") from error
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
