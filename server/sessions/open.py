"""The store that a setting names."""

from __future__ import annotations

from server.errors import ConfigurationError
from server.sessions.sqlite import SQLiteStore
from server.sessions.store import SessionStore

REDIS_SCHEMES = ("redis://", "rediss://")


def open_store(where: str) -> SessionStore:
    """where: the path of an SQLite file, or the URL of a Redis. Raises ConfigurationError if it cannot be opened."""
    if where.startswith(REDIS_SCHEMES):
        try:
            from server.sessions.redis import RedisStore
        except ImportError as error:
            raise ConfigurationError("A store in Redis needs pip install 'aft-server[redis]'.") from error
        return RedisStore(where)
    if "://" in where:
        raise ConfigurationError(
            f"store must be the path of a file, redis:// or rediss://, not {where.split('://')[0]}://."
        )
    return SQLiteStore(where)
