"""kernels.c, compiled on first use by the machine's C compiler for its own processor, and kept for later starts.

Run as a program, this file compiles without importing PyTorch, so that it can be done while another process does that.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: at worst two processes compile the same
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
# No -ffast-math: sums keep their order, or nothing would be exact.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"]
LINK_FLAGS = ["-fopenmp", "-fPIC", "-shared"]


class Operation(ctypes.Structure):
    """struct op of kernels.c. `keep` holds the tensors whose memory it names."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("n", ctypes.c_int64 * 7),
        ("input", ctypes.c_void_p),
        ("input2", ctypes.c_void_p),
        ("weights", ctypes.c_void_p * 4),
        ("output", ctypes.c_void_p),
        ("state", ctypes.c_void_p * 6),
        ("eps", ctypes.c_double),
    )


class Library:
    """The functions of a compiled kernels.c."""

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))
        functions.panel_width.restype = ctypes.c_int64
        self.panel_width: int = functions.panel_width()
        self._run = functions.run
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        self._run.restype = None

    def run(self, operations: ctypes.Array[Operation], n_rows: int, n_threads: int) -> None:
        """Run operations one after the other, each by all threads."""
        self._run(ctypes.addressof(operations), len(operations), n_rows, n_threads)


@cache
def library() -> Library | None:
    """The kernels, or None, with a line in the log, where they cannot be compiled. The first call takes a second."""
    try:
        return Library(_compiled(_shared_folder() or Path(tempfile.mkdtemp(prefix="aft-"))))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("Decoding without compiled kernels, which is slower: %s", detail)
        return None


def compile_ahead() -> None:
    """Compile, if that is needed, for other processes to find. Problems are theirs to report."""
    folder = _shared_folder()
    if folder is not None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            _compiled(folder)


def _compiled(folder: Path) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("there is no C compiler; install gcc or clang, or set CC.")
    command = [compiler, *FLAGS, *LINK_FLAGS]
    path = folder / f"kernels-{_digest(command)}.so"
    if not path.exists():
        with _lock(folder):
            if not path.exists():
                _compile(command, path)
    return path


def _compile(command: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([*command, str(SOURCE), "-o", str(built), "-lm"], check=True, capture_output=True)
        os.replace(built, path)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Wait for another process that compiles the same. The lock ends with its process."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _shared_folder() -> Path | None:
    """Where libraries are kept for all processes; None where nothing can be kept."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aft"
        folder.mkdir(parents=True, exist_ok=True)
        return folder if os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # the latter for a user without a home
        return None


def _digest(command: Sequence[str]) -> str:
    """Of all that the library depends on; -march=native makes that the processor, too."""
    parts = [SOURCE.read_bytes(), " ".join(command).encode(), platform.machine().encode(), _processor()]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU")))


if __name__ == "__main__":
    compile_ahead()
