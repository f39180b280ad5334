"""The loop of a program that `limited_processes` starts. It imports so little that a program starts in a moment."""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable

SLOWEST = 10.0  # times as long as its job computes a process may be there for it, whatever it waits for


def serve(answer: Callable[..., dict[str, str]]) -> None:
    """Answer the jobs on standard input: each is a line of arguments, and becomes a line.

    The program's arguments are its limits: bytes of address space, and seconds of computing for a job. A job beyond
    them ends the process, also in the middle of a long operation and when the server is gone.
    """
    memory, seconds = int(sys.argv[1]), max(float(sys.argv[2]), 1e-6)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        job = json.loads(line)
        _set_alarms(seconds)
        answered = json.dumps(answer(**job)).encode()
        _set_alarms(0)
        sys.stdout.buffer.write(answered + b"\n")
        sys.stdout.buffer.flush()


def _set_alarms(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * SLOWEST)
