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
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
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
COMPILE_SECONDS, LOCK_SECONDS = 60.0, 90.0  # it takes one or two
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
        kernels = _loaded()
    except (OSError, AttributeError) as error:  # the latter for a library without our functions
        logger.warning("Decoding without compiled kernels, which is slower: %s", error)
        return None
    if not kernels.is_parallel:
        logger.warning("Compiled kernels run on one thread: the C compiler has no OpenMP.")
    return kernels


def compile_ahead() -> None:
    """Compile, if that is needed, for other processes to find. Problems are theirs to report."""
    with contextlib.suppress(OSError, KeyboardInterrupt):
        if folder := _shared_folder():
            _compiled(folder)


class CompilerError(OSError):
    """The compiler failed, or took too long; output is what it said."""

    def __init__(self, message: str, output: bytes = b"") -> None:
        super().__init__(message)
        self.output = output


class SharedFolderError(OSError):
    """The folder of kept libraries is not to be used."""


def _loaded() -> Library:
    try:
        if folder := _shared_folder():
            return _loaded_from(folder)
    except SharedFolderError as error:
        logger.warning("Kernels are compiled for this process alone: %s", error)
    with tempfile.TemporaryDirectory(prefix="aft-", ignore_cleanup_errors=True) as private:
        return _loaded_from(Path(private))  # what is loaded needs its file no more


def _loaded_from(folder: Path) -> Library:
    path = _compiled(folder)
    try:
        return Library(path)
    except (OSError, AttributeError):  # made by another system that shares the home, say
        path.unlink(missing_ok=True)
        return Library(_compiled(folder))


def _compiled(folder: Path) -> Path:
    command = [*_compiler(), *FLAGS, *(f"-D{name}={value}" for name, value in CONSTANTS.items()), *LINK_FLAGS]
    try:
        return _kept(folder, [*command, OPENMP_FLAG])
    except CompilerError as error:
        if not OPENMP_IS_MISSING.search(error.output):
            raise
        return _kept(folder, command)  # Apple's clang, say


def _compiler() -> list[str]:
    """CC may have options, as make reads it."""
    try:
        chosen = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise OSError(f"CC = {os.environ['CC']!r} is not a command: {error}.") from error
    found = chosen or [path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))][:1]
    if not found:
        raise OSError("there is no C compiler; install gcc or clang, or set CC.")
    return found


def _kept(folder: Path, command: Sequence[str]) -> Path:
    """The library that the command makes, made unless it is there."""
    name = f"kernels-{_digest(command)}"
    if path := _found(folder, name):
        return path
    with _lock(folder):
        return _found(folder, name) or _compile(command, folder, name)


def _found(folder: Path, name: str) -> Path | None:
    """The library of that name, with its content's digest after it; what is damaged or not ours is deleted."""
    for path in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):  # deleted by another process
            status = path.stat()
            is_private = _is_ours(status) and not status.st_mode & 0o022
            if is_private and path.stem == f"{name}-{_digest_of(path.read_bytes())}":
                return path
            path.unlink()
    return None


def _compile(command: Sequence[str], folder: Path, name: str) -> Path:
    """Under the folder's lock."""
    if fcntl is not None:
        for left in folder.glob("tmp*"):  # by a process that was killed while it compiled
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="tmp", dir=folder) as temporary:
        built = Path(temporary) / "kernels.so"
        # One translation unit: each kernel may inline what the others have in common.
        whole = "".join(f'#include "{path.name}"\n' for path in sorted(SOURCES.glob("*.c"))).encode()
        _run([*command, "-I", str(SOURCES), "-x", "c", "-", "-o", str(built), "-lm"], whole)
        path = folder / f"{name}-{_digest_of(built.read_bytes())}.so"
        built.chmod(0o755)  # whatever the umask is
        os.replace(built, path)
    return path


def _run(command: Sequence[str], source: bytes) -> None:
    """Raises CompilerError if the command fails, or is not done in time; it and its children are then killed."""
    pipe, is_group = subprocess.PIPE, os.name == "posix"
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=is_group) as process:
        try:
            _, output = process.communicate(source, COMPILE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise CompilerError(f"{command[0]} was not done after {COMPILE_SECONDS} seconds.") from error
        finally:
            if process.returncode is None and is_group:
                os.killpg(process.pid, signal.SIGKILL)
            elif process.returncode is None:
                process.kill()
    if process.returncode:
        said = output.decode(errors="replace").strip()
        raise CompilerError(f"{command[0]} ended with status {process.returncode}. {said}".rstrip(), output)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Wait for another process that compiles the same. The lock ends with its process.

    Raises SharedFolderError if it is held for longer than any compilation takes.
    """
    if fcntl is None:
        yield
        return
    path, deadline = folder / "lock", time.monotonic() + LOCK_SECONDS
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)  # who cannot write it cannot hold it
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SharedFolderError(f"{path} has been locked for {LOCK_SECONDS} seconds.") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _shared_folder() -> Path | None:
    """Where this user's libraries are kept for all processes; None where nothing can be kept.

    Raises SharedFolderError for a folder of another user, who could put any code into it.
    """
    try:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve()
        folder = parent / "aft"
        for path in (*reversed(parent.parents), parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return None
    except (OSError, RuntimeError):  # the latter for a user without a home
        return None
    if not _is_ours(folder.stat()):
        raise SharedFolderError(f"{folder} belongs to another user.")
    folder.chmod(0o700)
    return folder


def _is_ours(status: os.stat_result) -> bool:
    return os.name != "posix" or status.st_uid == os.geteuid()


def _digest(command: Sequence[str]) -> str:
    """Of all that the library depends on; -march=native makes that the processor, too."""
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".c", ".h")]
    parts = [*sources, " ".join(command).encode(), platform.machine().encode(), _processor()]
    return _digest_of(b"\0".join(parts))


def _digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU")))


if __name__ == "__main__":
    compile_ahead()
