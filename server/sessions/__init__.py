"""Conversations that outlive their requests: kept by name, in a store."""

from server.sessions.open import open_prefix_store, open_store
from server.sessions.sessions import Sessions, SessionsConfig, Turn
from server.sessions.sqlite import SQLiteStore
from server.sessions.store import Session, SessionStore

__all__ = [
    "SQLiteStore",
    "Session",
    "SessionStore",
    "Sessions",
    "SessionsConfig",
    "Turn",
    "open_prefix_store",
    "open_store",
]
