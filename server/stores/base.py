"""What a store of sessions does. A session is small and never grows, so it is stored whole at every turn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.errors import StoreFullError, StoreUnavailableError

logger = logging.getLogger(__name__)

GRACE_SECONDS = 7 * 86_400  # for which a session is kept after its end: until then a clock may have been wrong


@dataclass(frozen=True)
class Session:
    """turn: turns committed so far; num_tokens: of the whole conversation; times in seconds since 1970."""

    session_id: str
    owner: str
    turn: int
    num_tokens: int
    created_at: float
    used_at: float
    expires_at: float


class SessionStore(Protocol):
    """Called from several threads, and by several servers at a time. Each method happens whole or not at all.

    A session is visible to its owner only, and not after its end. It is kept for GRACE_SECONDS more, and visible again
    if the clock was wrong. A store that fails raises StoreUnavailableError, and has then done all of what it was asked,
    as far as anyone sees, or nothing.
    """

    def create(self, sessions: Sequence[Session], data: bytes, max_per_owner: int) -> bool:
        """Add sessions that differ in their ids only, unless their owner would have more than that; all or none.

        data: the conversation of each, b"" before the first turn. Those of the owner that have ended are let go where
        there would be more than max_per_owner with them, those that ended first before the others.
        """

    def load(self, session_id: str, owner: str, now: float) -> tuple[Session, bytes] | None:
        """A session and its conversation."""

    def commit(self, session: Session, data: bytes) -> bool:
        """Replace turn `session.turn - 1` of a session; False, and nothing done, if that is no longer its last."""

    def delete(self, session_id: str, owner: str) -> bool:
        """Whether there was one."""

    def list(self, owner: str, now: float, limit: int, after: str | None = None) -> list[Session]:
        """The first sessions of an owner, or the first after one of them. Those that end last, and so were used last,
        come first.
        """

    def remove_expired(self, before: float) -> None:
        """Forget sessions that ended before that."""

    def close(self) -> None:
        """Let go of files and connections."""


def unavailable(error: Exception, *, is_full: bool = False) -> StoreUnavailableError:
    """What a client is told; the cause, with its addresses and paths, is for the log."""
    logger.warning("The store failed: %s", error)
    if is_full:
        return StoreFullError("The store of sessions is full; there is room again when some are deleted.")
    return StoreUnavailableError("The store of sessions does not answer; the same request may succeed later.")
