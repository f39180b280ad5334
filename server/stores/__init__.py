"""What outlives the process: bytes by key, for sessions and for prefixes, in SQLite or Redis."""

from __future__ import annotations

from server.engine import PrefixStore
from server.errors import ConfigurationError
from server.stores.base import GRACE_SECONDS, Session, SessionStore
from server.stores.sqlite import SQLitePrefixStore, SQLiteSessionStore

__all__ = ["GRACE_SECONDS", "SQLiteSessionStore", "Session", "SessionStore", "open_prefix_store", "open_store"]

REDIS_SCHEMES = ("redis://", "rediss://")


def open_store(where: str) -> SessionStore:
    """where: the path of an SQLite file, or the URL of a Redis. Raises ConfigurationError if it cannot be opened."""
    if not _is_redis(where):
        return SQLiteSessionStore(where)
    from server.stores.redis import RedisSessionStore

    return RedisSessionStore(where)


def open_prefix_store(where: str, max_bytes: int) -> PrefixStore:
    """Of the prefix cache, in the same place. Raises as `open_store`."""
    if not _is_redis(where):
        return SQLitePrefixStore(where, max_bytes)
    from server.stores.redis import RedisPrefixStore

    return RedisPrefixStore(where, max_bytes)


def _is_redis(where: str) -> bool:
    if not where.startswith(REDIS_SCHEMES):
        if "://" in where:
            scheme = where.split("://")[0]
            raise ConfigurationError(f"store must be the path of a file, redis:// or rediss://, not {scheme}://.")
        return False
    try:
        import redis  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("A store in Redis needs a package: pip install redis.") from error
    return True
