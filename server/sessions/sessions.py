"""Turns of sessions: what begins from a committed state either commits the next one, or leaves it as it was."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from server.engine import Conversation, StateFiles
from server.errors import (
    BusySessionError,
    ConfigurationError,
    NotFoundError,
    QuotaError,
    StoreUnavailableError,
)
from server.settings import LONGEST, MIB, check, setting
from server.stores import GRACE_SECONDS, Session, SessionStore

T = TypeVar("T")

STORE_THREADS = 16
PATIENCE_SECONDS = 5.0  # for a thread of the store
EMPTY = b""  # the conversation of a session without turns


@dataclass(frozen=True, kw_only=True)
class SessionsConfig:
    """Raises ConfigurationError, naming the field, for values out of range. Sizes are in bytes.

    Where there are no API keys, max_sessions and session_quota are of everyone together. Each session counts as a whole
    state: it will be one after its first turn, and never be more.
    """

    session_ttl: float = setting(
        86_400, "Seconds after its last use when a session is forgotten.", positive=True, at_most=LONGEST
    )
    max_sessions: int = setting(10_000, "Sessions of one API key.", at_least=1, at_most=2**31 - 1)
    session_quota: int = setting(2**28, "of sessions of one API key.", unit="MiB", positive=True)
    session_memory: int = setting(2**30, "of all sessions, where they are in memory.", unit="MiB", positive=True)

    def __post_init__(self) -> None:
        check(self)


class Sessions:
    """All methods but `close` are called on one event loop; the store works in threads of its own. owner: who asks.

    files: how the states of the model are written. Raises ConfigurationError if the quota has no room for one session.
    """

    def __init__(
        self,
        store: SessionStore,
        files: StateFiles,
        config: SessionsConfig | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.config, self._clock = store, config or SessionsConfig(), clock
        self._files = files
        self._max_sessions = min(self.config.max_sessions, self.config.session_quota // files.max_bytes)
        if not self._max_sessions:
            raise ConfigurationError(
                f"session_quota must be at least {math.ceil(files.max_bytes / MIB)} MiB, for the {files.max_bytes} "
                f"bytes of one session of this model."
            )
        # A store that hangs must not hold up those who render and tokenise in threads.
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="store")
        # With the owner: whoever knows the id of another's session must neither hold it up nor see that it is busy.
        self._busy: set[tuple[str, str]] = set()

    async def create(self, owner: str) -> Session:
        """A session without turns. Raises QuotaError if the owner has too many."""
        return (await self._add(owner, 0, 0, EMPTY))[0]

    async def fork(self, session_id: str, owner: str, n: int = 1) -> Sequence[Session]:
        """n new sessions with the conversation of another, or none. Raises NotFoundError and QuotaError."""
        session, data = await self._load(session_id, owner)
        return await self._add(owner, session.turn, session.num_tokens, data, n)

    async def get(self, session_id: str, owner: str) -> Session:
        """Raises NotFoundError."""
        return (await self._load(session_id, owner))[0]

    async def list(self, owner: str, limit: int, after: str | None = None) -> tuple[Sequence[Session], bool]:
        """The first sessions of the owner, or the first after one of them, last used first; whether there are more.

        Raises NotFoundError.
        """
        if after is not None:
            await self.get(after, owner)
        found = await self._ask(self.store.list, owner, self._clock(), limit + 1, after)
        return found[:limit], len(found) > limit

    async def delete(self, session_id: str, owner: str) -> None:
        """Raises NotFoundError."""
        if not await self._ask(self.store.delete, session_id, owner):
            raise _unknown(session_id)

    async def export(self, session_id: str, owner: str) -> bytes:
        """The conversation as a file. Raises NotFoundError, also for a session without turns."""
        _, data = await self._load(session_id, owner)
        if data == EMPTY:
            raise NotFoundError(f"Session {session_id} has no turn yet, and nothing to export.")
        return data

    async def import_(self, data: bytes, owner: str) -> Session:
        """A new session from such a file. Raises InvalidConversationError and QuotaError."""
        conversation = await asyncio.to_thread(self._parse, data)
        return (await self._add(owner, 1, conversation.num_tokens, data))[0]

    async def begin_turn(self, session_id: str, owner: str) -> Turn:
        """Raises NotFoundError, and BusySessionError while another turn is under way."""
        key = owner, session_id
        if key in self._busy:
            await self._load(session_id, owner)  # what is not there is not busy
            raise BusySessionError(f"Session {session_id} has a turn under way.")
        self._busy.add(key)
        try:
            session, data = await self._load(session_id, owner)
            start = await asyncio.to_thread(self._parse, data) if data != EMPTY else None
        except BaseException:
            self._busy.discard(key)
            raise
        return Turn(self, session, start)

    async def commit(self, session: Session, conversation: Conversation) -> None:
        """Store the turn after `session`. Raises BusySessionError if another server has stored one meanwhile."""
        now = self._clock()
        following = replace(
            session,
            turn=session.turn + 1,
            num_tokens=conversation.num_tokens,
            used_at=now,
            expires_at=now + self.config.session_ttl,
        )
        data = await asyncio.to_thread(self._files.write, conversation.snapshot, conversation.unread_ids)
        if not await self._ask(self.store.commit, following, data):
            raise BusySessionError(f"Session {session.session_id} was changed or deleted during this turn.")

    def release(self, session: Session) -> None:
        self._busy.discard((session.owner, session.session_id))

    async def _add(self, owner: str, turn: int, num_tokens: int, data: bytes, n: int = 1) -> Sequence[Session]:
        now, most = self._clock(), self._max_sessions
        await self._ask(self.store.remove_expired, now - GRACE_SECONDS)
        end = now + self.config.session_ttl
        added = [Session(uuid.uuid4().hex, owner, turn, num_tokens, now, now, end) for _ in range(n)]
        if not await self._ask(self.store.create, added, data, most):
            if n == 1:
                raise QuotaError(f"There are {most} sessions already, as many as are allowed.")
            raise QuotaError(f"{n} more would make more than the {most} sessions that are allowed.")
        return added

    async def _load(self, session_id: str, owner: str) -> tuple[Session, bytes]:
        found = await self._ask(self.store.load, session_id, owner, self._clock())
        if found is None:
            raise _unknown(session_id)
        return found

    async def _ask(self, ask: Callable[..., T], *arguments: Any) -> T:
        """Raises StoreUnavailableError also if others have kept the store's threads for so long that it must hang."""
        asked_at = time.monotonic()

        def answer() -> T:
            if time.monotonic() - asked_at > PATIENCE_SECONDS:
                raise StoreUnavailableError("The store of sessions is too slow; the same request may succeed later.")
            return ask(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._threads, answer)

    def _parse(self, data: bytes) -> Conversation:
        return Conversation(*self._files.read(data))

    def close(self) -> None:
        """Let go of the store, when it has done what it was asked."""
        self._threads.shutdown()
        self.store.close()


class Turn:
    """One turn of a session: `start` to go on from, None in the first; then `commit`, or nothing; then `release`."""

    def __init__(self, sessions: Sessions, session: Session, start: Conversation | None) -> None:
        self._sessions, self.session, self.start = sessions, session, start

    async def commit(self, conversation: Conversation) -> None:
        await self._sessions.commit(self.session, conversation)

    def release(self) -> None:
        """May be called again."""
        self._sessions.release(self.session)


def _unknown(session_id: str) -> NotFoundError:
    return NotFoundError(f"There is no session {session_id[:64]!r}.")
