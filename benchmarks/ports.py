"""Ports for servers of this machine."""

from __future__ import annotations

import contextlib
import random
import socket

PORTS = range(20_000, 30_000)


def free_port() -> int:
    """Not of those that the system gives to connections: one might have it before the server does, or between two."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("none of a hundred ports is free")
