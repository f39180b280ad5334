"""Jobs that nothing bounds, done where they can be ended: in processes with limits of time, memory and number."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from server.errors import OverloadedError, ShuttingDownError

logger = logging.getLogger(__name__)

MAX_PROCESSES = 2  # of a program
MEMORY = 2**29  # bytes of address space for each
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TZ")  # that they see; the rest holds secrets
TIMED_OUT = (-signal.SIGPROF, -signal.SIGALRM)

T = TypeVar("T")


class LimitedProcesses:
    """Processes of one program, a module whose loop is `limited_program.serve`. May be called from any thread.

    None is there before the first job, and one that its limits ended is replaced. They end with this process, however
    that ends: those that do nothing at once, the others at their limits.
    """

    def __init__(self, program: str, seconds: float, patience: float, first: object = None) -> None:
        """seconds: of computing for a job; patience: in which `in_thread` finds a free one; first: what each reads
        before its first job, if not None.
        """
        self._command = [sys.executable, "-P", "-m", program, str(MEMORY), str(seconds)]
        self._patience = patience
        self._first = b"" if first is None else _line(first)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._busy: set[subprocess.Popen[bytes]] = set()
        self._is_closed = False
        self._lock = threading.Lock()
        self._free = threading.Semaphore(MAX_PROCESSES)
        # Their own: what waits for these processes must not take threads that others need.
        self._threads = ThreadPoolExecutor(MAX_PROCESSES, thread_name_prefix=program)
        self._turn = asyncio.Semaphore(MAX_PROCESSES)
        weakref.finalize(self, _end_all, self._idle)

    def ask(self, job: dict[str, Any]) -> dict[str, str]:
        """The program's answer. Raises TimeoutError, ShuttingDownError, and MemoryError for any other end of a process,
        such as by too deep a recursion.
        """
        line = _line(job)
        with self._free:
            while True:
                process, is_new = self._take()
                answer = _exchange(process, self._first + line if is_new else line)
                if answer.endswith(b"\n"):
                    self._give_back(process)
                    return dict(json.loads(answer))
                status = self._drop(process)
                if status in TIMED_OUT:
                    raise TimeoutError
                if is_new and not self._is_closed:
                    raise MemoryError
                # Another one: this may have ended before, or what it did before may have cost it its memory.

    async def in_thread(self, busy: str, work: Callable[..., T], *arguments: Any) -> T:
        """Do what asks these processes. Raises OverloadedError(busy) if none becomes free."""
        try:
            await asyncio.wait_for(self._turn.acquire(), self._patience)
        except TimeoutError as error:
            raise OverloadedError(busy) from error
        future = asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)
        future.add_done_callback(lambda _: self._turn.release())
        return await asyncio.shield(future)  # the thread goes on when nobody waits for it any more

    def close(self) -> None:
        """End all processes, whatever they do."""
        with self._lock:
            self._is_closed = True
            _end_all(self._idle)
            for process in self._busy:
                process.kill()  # and whoever waits for its answer drops it

    def _take(self) -> tuple[subprocess.Popen[bytes], bool]:
        """A process, and whether it is new."""
        with self._lock:
            if self._is_closed:
                raise ShuttingDownError("The server is shutting down.")
            is_new = not self._idle
            process = self._start() if is_new else self._idle.pop()
            self._busy.add(process)
        return process, is_new

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # a terminal's interrupt is the server's alone
        )

    def _give_back(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._busy.discard(process)
            self._idle.append(process)
            if self._is_closed:
                _end_all(self._idle)

    def _drop(self, process: subprocess.Popen[bytes]) -> int:
        with self._lock:
            self._busy.discard(process)
        status = _end(process)
        if not self._is_closed:
            logger.warning("A process of %s was ended by what it did (status %d).", self._command[3], status)
        return status


def _line(content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """The line that answers, or less if the process has ended."""
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(line)
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return b""


def _end(process: subprocess.Popen[bytes]) -> int:
    """The status of a process that ends here, if it has not ended before."""
    process.kill()
    process.communicate()  # closes the pipes, whatever is left in them
    return process.returncode


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        _end(processes.pop())
