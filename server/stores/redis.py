"""Sessions and prefixes in Redis: the store of several machines.

Each session is a hash, which Redis forgets some time after its end; each owner has a sorted set of session ids by their
ends. What reads and then writes is a script, so that it happens whole also between servers. Not for Redis Cluster: a
script touches keys of several slots.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.exceptions import OutOfMemoryError
from redis.retry import Retry

from server.errors import ConfigurationError
from server.stores.base import GRACE_SECONDS, Session, unavailable

SESSION, OWNER = "aft:session:", "aft:sessions-of:"  # prefixes of keys
FIELDS = [field.name for field in fields(Session)]
PREFIX, PREFIXES, PREFIX_BYTES = "aft:prefix:", "aft:prefixes", "aft:prefix-bytes"
TIMEOUT_SECONDS, PREFIX_TIMEOUT_SECONDS = 10.0, 1.0  # a prefix is not worth a long wait

# KEYS: owner, sessions. ARGV: end in seconds, milliseconds at which Redis forgets it, then the script's own, from
# `from` on fields and values. The owner's set lives as long as the last of its sessions.
SAVE = f"""
local function save(from)
    for i = 2, #KEYS do
        local id = string.sub(KEYS[i], {len(SESSION) + 1})
        redis.call('HSET', KEYS[i], 'session_id', id, unpack(ARGV, from))
        redis.call('PEXPIREAT', KEYS[i], ARGV[2])
        redis.call('ZADD', KEYS[1], ARGV[1], id)
    end
    local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
    redis.call('PEXPIREAT', KEYS[1], math.ceil((tonumber(last) + {GRACE_SECONDS}) * 1000))
    return 1
end
"""
# ARGV: ends, now, when what is forgotten by now had ended, most sessions. What is new is written first: a full Redis
# refuses that, but lets a script that has written go on.
CREATE = f"""{SAVE}
local most = tonumber(ARGV[5])
if redis.call('ZCOUNT', KEYS[1], '(' .. ARGV[3], '+inf') + #KEYS - 1 > most then return 0 end
save(6)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[4])
for _ = 1, redis.call('ZCARD', KEYS[1]) - most do
    redis.call('DEL', '{SESSION}' .. redis.call('ZPOPMIN', KEYS[1])[1])
end
return 1
"""
# ARGV: ends, owner, turn before.
COMMIT = f"""{SAVE}
local found = redis.call('HMGET', KEYS[2], 'owner', 'turn')
if found[1] ~= ARGV[3] or found[2] ~= ARGV[4] then return 0 end
return save(5)
"""
# ARGV: id, owner.
DELETE = """
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[2] then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('DEL', KEYS[1])
"""
# KEYS: owner. ARGV: now, how many, after which id or '', prefix of sessions, names of fields.
LIST = """
local first = 0
if ARGV[3] ~= '' then
    first = (redis.call('ZREVRANK', KEYS[1], ARGV[3]) or -1) + 1
end
local found = {}
for _, id in ipairs(redis.call('ZREVRANGEBYSCORE', KEYS[1], '+inf', '(' .. ARGV[1], 'LIMIT', first, ARGV[2])) do
    table.insert(found, redis.call('HMGET', ARGV[4] .. id, unpack(ARGV, 5)))
end
return found
"""
# KEYS: prefix, prefixes by their last use, their bytes. ARGV: key, now, data, most bytes, prefix of keys.
PUT_PREFIX = """
local total = redis.call('INCRBY', KEYS[3], #ARGV[3] - redis.call('STRLEN', KEYS[1]))
redis.call('SET', KEYS[1], ARGV[3])
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
while total > tonumber(ARGV[4]) do
    local oldest = redis.call('ZPOPMIN', KEYS[2])[1]
    if not oldest then -- somebody else has deleted prefixes, and the sum was wrong
        redis.call('SET', KEYS[3], 0)
        break
    end
    total = redis.call('DECRBY', KEYS[3], redis.call('STRLEN', ARGV[5] .. oldest))
    redis.call('DEL', ARGV[5] .. oldest)
end
"""
# KEYS: prefixes by their last use. ARGV: now, prefix of keys, keys.
FIND_PREFIX = """
for i = 3, #ARGV do
    local data = redis.call('GET', ARGV[2] .. ARGV[i])
    if data then
        redis.call('ZADD', KEYS[1], ARGV[1], ARGV[i])
        return {i - 3, data}
    end
end
"""


class RedisSessionStore:
    """url: redis://[user:password@]host:port/database, or rediss:// for TLS. Use as `SessionStore` says.

    Raises ConfigurationError if there is no Redis at `url`, StoreUnavailableError if it fails later. Whether a turn
    that was answered survives the loss of Redis is Redis' setting: appendonly yes, appendfsync always.
    """

    def __init__(self, url: str) -> None:
        self._client = connect(url, TIMEOUT_SECONDS)
        scripts = (CREATE, COMMIT, DELETE, LIST)
        self._create, self._commit, self._delete, self._list = map(self._client.register_script, scripts)

    def create(self, sessions: Sequence[Session], data: bytes, max_per_owner: int) -> bool:
        now = sessions[0].created_at
        return self._save(self._create, sessions, data, repr(now), repr(now - GRACE_SECONDS), max_per_owner)

    def load(self, session_id: str, owner: str, now: float) -> tuple[Session, bytes] | None:
        try:
            values: list[Any] = self._client.hmget(SESSION + session_id, [*FIELDS, "data"])
        except RedisError as error:
            raise unavailable(error) from error
        session = _session(values[:-1])
        if session is None or session.owner != owner or session.expires_at <= now:
            return None
        return session, values[-1]

    def commit(self, session: Session, data: bytes) -> bool:
        return self._save(self._commit, [session], data, session.owner, session.turn - 1)

    def delete(self, session_id: str, owner: str) -> bool:
        return bool(_run(self._delete, [SESSION + session_id, OWNER + owner], session_id, owner))

    def list(self, owner: str, now: float, limit: int, after: str | None = None) -> list[Session]:
        rows = _run(self._list, [OWNER + owner], repr(now), limit, after or "", SESSION, *FIELDS)
        return [session for row in rows if (session := _session(row))]

    def remove_expired(self, before: float) -> None:
        """Nothing: Redis forgets each session at its time."""

    def close(self) -> None:
        self._client.close()

    def _save(self, script: Script, sessions: Sequence[Session], data: bytes, *condition: str | int) -> bool:
        first = sessions[0]
        keys = [OWNER + first.owner, *(SESSION + session.session_id for session in sessions)]
        ends = (repr(first.expires_at), math.ceil((first.expires_at + GRACE_SECONDS) * 1000))
        values = [item for name in FIELDS[1:] for item in (name, _text(getattr(first, name)))]
        return bool(_run(script, keys, *ends, *condition, *values, "data", data))


class RedisPrefixStore:
    """Use as `PrefixStore` says; opened as RedisSessionStore."""

    def __init__(self, url: str, max_bytes: int) -> None:
        self._client, self.max_bytes = connect(url, PREFIX_TIMEOUT_SECONDS), max_bytes
        self._put, self._find = map(self._client.register_script, (PUT_PREFIX, FIND_PREFIX))

    def put(self, key: bytes, data: bytes) -> None:
        if len(data) <= self.max_bytes:
            keys: list[str | bytes] = [PREFIX.encode() + key, PREFIXES, PREFIX_BYTES]
            _run(self._put, keys, key, time.time(), data, self.max_bytes, PREFIX)

    def find(self, keys: Sequence[bytes]) -> tuple[int, bytes] | None:
        found = _run(self._find, [PREFIXES], time.time(), PREFIX, *keys)
        return tuple(found) if found else None

    def close(self) -> None:
        self._client.close()


def connect(url: str, timeout: float) -> Redis:
    """Raises ConfigurationError, which does not tell the password, if there is no Redis at `url`.

    timeout: seconds of each command. One that fails is not sent again: it may have been done, and a turn must not be
    stored twice.
    """
    try:
        client = Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        client.ping()
    except RedisError as error:
        raise ConfigurationError(f"The store at {urlsplit(url).hostname} cannot be opened: {error}") from error
    except ValueError:  # whose words may be a part of the password
        raise ConfigurationError("store is no URL of a Redis; a password in it is percent-encoded.") from None
    return client


def _run(script: Script, keys: Sequence[str | bytes], *arguments: Any) -> Any:
    try:
        return script(keys, arguments)
    except RedisError as error:
        raise unavailable(error, is_full=isinstance(error, OutOfMemoryError)) from error


def _text(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _session(values: Sequence[bytes | None]) -> Session | None:
    """From the values of FIELDS; None where there is no session."""
    if None in values:
        return None
    session_id, owner, turn, num_tokens, *times = [value.decode() for value in values if value is not None]
    return Session(session_id, owner, int(turn), int(num_tokens), *map(float, times))
