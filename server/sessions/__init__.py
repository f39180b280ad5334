"""Conversations that outlive their requests: kept by name, in a store."""

from server.sessions.sessions import Sessions, SessionsConfig, Turn

__all__ = ["Sessions", "SessionsConfig", "Turn"]
