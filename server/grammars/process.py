"""Grammars tried where they can be ended: in processes with limits of time, memory and number."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence

from server.errors import InvalidRequestError

logger = logging.getLogger(__name__)

MAX_PROCESSES = 2
MEMORY = 2**29  # bytes of address space for each
STARTING = 60.0  # seconds


class GrammarProcesses:
    """Tries grammars for one vocabulary. May be called from any thread. No process is there before the first grammar.

    tokens: the bytes of each token; timeout: seconds for a grammar, half of which are left for compiling it again.
    """

    def __init__(
        self, tokens: Sequence[bytes], special_ids: Sequence[int], end_of_text_id: int, timeout: float
    ) -> None:
        vocabulary = {
            "tokens": [token.decode("latin-1") for token in tokens],
            "special_ids": list(special_ids),
            "end_of_text_id": end_of_text_id,
        }
        self._first = _line({"vocabulary": vocabulary, "memory": MEMORY})
        self._timeout = timeout
        self._turn = threading.Semaphore(MAX_PROCESSES)
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        weakref.finalize(self, _end, self._idle)

    def try_(self, kind: str, text: str) -> str:
        """The source of a grammar that does no harm. Raises InvalidRequestError, whose message is a clause."""
        try:
            with self._turn:
                found = self._ask({"kind": kind, "text": text})
        except TimeoutError as error:
            raise InvalidRequestError(f"it takes more than the {self._timeout:g} seconds it may take here") from error
        except (EOFError, OSError) as error:
            raise InvalidRequestError("it takes more memory, or is nested more deeply, than it may here") from error
        if "problem" in found:
            raise InvalidRequestError(found["problem"])
        return found["source"]

    def close(self) -> None:
        """End all processes, whatever they do."""
        with self._lock:
            self._is_closed = True
            _end(self._idle)
            for process in self._busy:
                process.kill()  # and whoever waits for its answer drops it

    def _ask(self, job: dict[str, str]) -> dict[str, str]:
        while True:
            process = self._take()
            is_new = process.is_new
            try:
                found = process.ask(job, self._timeout / 2)
            except (EOFError, OSError) as error:
                self._drop(process)
                if is_new or isinstance(error, TimeoutError):
                    raise
                continue  # it may have ended before, or what it did before may have cost it its memory
            with self._lock:
                self._busy.discard(process)
                self._idle.append(process)
                if self._is_closed:
                    _end(self._idle)
            return found

    def _take(self) -> _Process:
        with self._lock:
            if self._is_closed:
                raise EOFError
            process = self._idle.pop() if self._idle else _Process(self._first)
            self._busy.add(process)
            return process

    def _drop(self, process: _Process) -> None:
        with self._lock:
            self._busy.discard(process)
        status = process.end()
        logger.warning("A grammar was given up, and its process ended (status %d).", status)


class _Process:
    """is_new: whether it has not tried anything yet."""

    def __init__(self, first: bytes) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.grammars.worker"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                start_new_session=True,  # a terminal's interrupt is the server's alone
            )
        self._first = first
        self.is_new = True

    def ask(self, job: dict[str, str], seconds: float) -> dict[str, str]:
        """Raises TimeoutError, and EOFError or OSError if the process has ended."""
        if self.is_new:
            self._exchange(self._first, STARTING)  # not of the grammar's time: it may be a busy machine's first one
            self.is_new = False
        return self._exchange(_line({**job, "seconds": seconds}), seconds)

    def _exchange(self, line: bytes, seconds: float) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.sendall(line)
        received = bytearray()
        while not received.endswith(b"\n"):
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            part = self._socket.recv(2**16)
            if not part:
                raise EOFError
            received += part
        answer: dict[str, str] = json.loads(received)
        return answer

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """To be called by whoever has it, since the socket is closed as well."""
        self.kill()
        self._socket.close()
        status: int = self._process.wait()
        return status


def _end(processes: list[_Process]) -> None:
    while processes:
        processes.pop().end()


def _line(content: object) -> bytes:
    return json.dumps(content).encode() + b"\n"
