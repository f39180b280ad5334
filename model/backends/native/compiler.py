"""The kernels, compiled on first use by the machine's C compiler for its own processor, and kept for later starts.

Run as a program, this module compiles without importing PyTorch, so that it can be done while another process does.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from model.activation import Activation
from model.recurrences import limits

if TYPE_CHECKING:
    from model.kernel import Kernel

try:
    import fcntl
except ImportError:  # not a POSIX system: at worst two processes compile the same
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernels")
# No -ffast-math: sums keep their order, or nothing would be exact.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast"]
CONSTANTS = {
    "REFERENCE_SLACK": f"{limits.REFERENCE_SLACK}f",
    "LOW_SUM": f"{limits.LOW_SUM}f",
    "LARGEST_KEY": f"{limits.LARGEST_KEY}f",
    "EMPTY_REFERENCE": f"{limits.EMPTY_REFERENCE}f",
    "KEY_BLOCK": str(limits.KEY_BLOCK),
    **{f"ACTIVATION_{activation.name}": str(activation.value) for activation in Activation},
}
LINK_FLAGS = ["-fPIC", "-shared"]
OPENMP_FLAG = "-fopenmp"
OPENMP_IS_MISSING = re.compile(rb"openmp|\b(?:lib|l)?g?omp\b")  # the option, its header or its library


class _Task(ctypes.Structure):
    """struct task of run.c."""

    _fields_ = (("run", ctypes.c_void_p), ("args", ctypes.c_void_p))


class Tasks:
    """Calls of kernels, one after the other, each by all threads. Keeps what they point at."""

    def __init__(self, functions: ctypes.CDLL, calls: Sequence[Kernel]) -> None:
        self.calls, self._run = tuple(calls), functions.run
        addresses = [ctypes.cast(functions[call.function], ctypes.c_void_p).value for call in self.calls]
        tasks = (_Task(address, ctypes.addressof(call)) for address, call in zip(addresses, self.calls, strict=True))
        self._tasks = (_Task * len(self.calls))(*tasks)

    def run(self, n_rows: int, n_threads: int) -> None:
        """n_rows: no more than the calls' tensors have; n_threads: no more than their scratch is for."""
        self._run(self._tasks, len(self._tasks), n_rows, n_threads)


class Library:
    """The compiled kernels.

    panel_width: columns of a matrix that lie together; is_parallel: whether more than one thread can run them.
    """

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        for constant in (self._functions.panel_width, self._functions.is_parallel):
            constant.restype = ctypes.c_int64
        self.panel_width: int = self._functions.panel_width()
        self.is_parallel = bool(self._functions.is_parallel())
        self._functions.run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        self._functions.run.restype = None

    def has(self, function: str) -> bool:
        """Whether there is a kernel of that name."""
        return hasattr(self._functions, function)

    def tasks(self, calls: Sequence[Kernel]) -> Tasks:
        """Raises AttributeError for a kernel that there is not."""
        return Tasks(self._functions, calls)


@cache
def library() -> Library | None:
    """The kernels, or None, with a line in the log, where they cannot be compiled. The first call takes seconds."""
    try:
        kernels = Library(_compiled(_shared_folder() or Path(tempfile.mkdtemp(prefix="aft-"))))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("Decoding without compiled kernels, which is slower: %s", detail)
        return None
    if not kernels.is_parallel:
        logger.warning("Compiled kernels run on one thread: the C compiler has no OpenMP.")
    return kernels


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
    defined = [f"-D{name}={value}" for name, value in CONSTANTS.items()]
    command = [compiler, *FLAGS, *defined, *LINK_FLAGS]
    try:
        return _kept(folder, [*command, OPENMP_FLAG])
    except subprocess.CalledProcessError as error:
        if not OPENMP_IS_MISSING.search(error.stderr):
            raise
        return _kept(folder, command)  # Apple's clang, say


def _kept(folder: Path, command: Sequence[str]) -> Path:
    """The library that the command makes, made unless it is there."""
    path = folder / f"kernels-{_digest(command)}.so"
    if not path.exists():
        with _lock(folder):
            if not path.exists():
                _compile(command, path)
    return path


def _compile(command: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        # One translation unit: each kernel may inline what the others have in common.
        whole = "".join(f'#include "{path.name}"\n' for path in sorted(SOURCES.glob("*.c"))).encode()
        options = ["-I", str(SOURCES), "-x", "c", "-", "-o", str(built), "-lm"]
        subprocess.run([*command, *options], input=whole, check=True, capture_output=True)
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
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".c", ".h")]
    parts = [*sources, " ".join(command).encode(), platform.machine().encode(), _processor()]
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU")))


if __name__ == "__main__":
    compile_ahead()
