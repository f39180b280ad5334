"""What a store of sessions does. A session is small and never grows, so it is stored whole at every turn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.errors import StoreUnavailableError

logger = logging.getLogger(__name__)


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

    A session is visible to its owner only, and not after its time. A store that fails raises StoreUnavailableError, and
    has then done all of what it was asked or nothing.
    """

    def create(self, sessions: Sequence[Session], data: bytes, max_per_owner: int) -> bool:
        """Add sessions that differ in their ids only, unless their owner would have more than that; all or none.

        data: the conversation of each, b"" before the first turn.
        """

    def load(self, session_id: str, owner: str, now: float) -> tuple[Session, bytes] | None:
        """A session and its conversation."""

    def commit(self, session: Session, data: bytes) -> bool:
        """Replace turn `session.turn - 1` of a session; False, and nothing done, if that is no longer its last."""

    def delete(self, session_id: str, owner: str) -> bool:
        """Whether there was one."""

    def list(self, owner: str, now: float) -> list[Session]:
        """The sessions of an owner, last used first."""

    def remove_expired(self, now: float) -> None:
        """Forget sessions whose time is over."""

    def close(self) -> None:
        """Let go of files and connections."""


def unavailable(error: Exception) -> StoreUnavailableError:
    """What a client is told; the cause, with its addresses and paths, is for the log."""
    logger.warning("The store failed: %s", error)
    return StoreUnavailableError("The store of sessions does not answer; the same request may succeed later.")
