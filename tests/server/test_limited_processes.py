from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server import limited_processes
from server.errors import OverloadedError, ShuttingDownError
from server.limited_processes import LimitedProcesses

PROGRAM = """
import json, os, sys, time
from server.limited_program import serve

def answer(do):
    if do == "sleep":
        time.sleep(60)
    while do == "compute":
        pass
    if do == "fill":
        return {"x": "x" * 2**30}
    if do == "fail":
        raise ValueError
    return {"pid": str(os.getpid()), "environment": " ".join(os.environ), "first": first}

first = json.loads(sys.stdin.buffer.readline())
serve(answer)
"""
New = Callable[..., LimitedProcesses]


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[New]:
    (tmp_path / "a_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    made: list[LimitedProcesses] = []

    def new(seconds: float = 3600.0, patience: float = 3600.0) -> LimitedProcesses:
        made.append(LimitedProcesses("a_program", seconds, patience, "hello"))
        return made[-1]

    yield new
    for processes in made:
        processes.close()


def pid_of(processes: LimitedProcesses) -> int:
    return int(processes.ask({"do": "nothing"})["pid"])


def exists(pid: int) -> bool:
    """Whether a process is there, and more than its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_is_there_when_it_is_needed_and_used_again(new: New) -> None:
    processes = new()
    assert not processes._idle
    assert processes.ask({"do": "nothing"})["first"] == "hello"
    pid = pid_of(processes)
    assert pid_of(processes) == pid
    os.kill(pid, signal.SIGKILL)
    other = pid_of(processes)
    assert other != pid
    processes.close()
    assert not exists(pid)
    assert not exists(other)
    with pytest.raises(ShuttingDownError):
        processes.ask({"do": "nothing"})


@pytest.mark.parametrize(
    ("do", "error"), [("compute", TimeoutError), ("sleep", TimeoutError), ("fill", MemoryError), ("fail", MemoryError)]
)
def test_a_job_ends_at_its_limits_and_the_next_one_has_another_process(do: str, error: type, new: New) -> None:
    processes = new(seconds=3600.0 if error is MemoryError else 0.1)
    pid = pid_of(processes)
    with pytest.raises(error):
        processes.ask({"do": do})
    assert not exists(pid)
    assert pid_of(processes) != pid


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
def test_a_process_that_dies_takes_its_job_with_it(how: signal.Signals, new: New) -> None:
    processes = new()
    with ThreadPoolExecutor(1) as pool:
        died = pool.submit(processes.ask, {"do": "sleep"})
        wait_until(lambda: len(processes._busy) == 1)
        os.kill(next(iter(processes._busy)).pid, how)
        with pytest.raises(MemoryError):
            died.result(60)
    pid_of(processes)


def test_jobs_under_way_end_with_the_others(new: New) -> None:
    processes = new()
    with ThreadPoolExecutor(3) as pool:
        ended = [pool.submit(processes.ask, {"do": "sleep"}) for _ in range(3)]
        wait_until(lambda: len(processes._busy) == 2)
        processes.close()
        for one in ended:
            with pytest.raises(ShuttingDownError):
                one.result(60)


def test_who_waits_for_a_free_one_waits_so_long_only_and_takes_no_threads_of_others(new: New) -> None:
    begun: list[int] = []
    goes_on = threading.Event()

    def hang() -> str:
        begun.append(1)
        goes_on.wait()
        return "done"

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        processes = new(patience=0.01)
        one, other = (asyncio.create_task(processes.in_thread("busy", hang)) for _ in range(2))
        try:
            async with asyncio.timeout(60):
                while len(begun) < 2:
                    await asyncio.sleep(0.01)
                other.cancel()  # whose thread goes on
                with pytest.raises(OverloadedError, match="busy"):
                    await processes.in_thread("busy", hang)
                assert await asyncio.to_thread(lambda: "free") == "free"
        finally:
            goes_on.set()
        assert await one == "done"

    asyncio.run(main())


def test_it_sees_no_secret(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    seen = set(new().ask({"do": "nothing"})["environment"].split())
    assert seen - {"LC_CTYPE"} <= {*limited_processes.ENVIRONMENT, "PYTHONPATH"}  # what Python sets itself


def test_processes_that_are_forgotten_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    processes = LimitedProcesses("a_program", 3600.0, 3600.0, "hello")
    pid = pid_of(processes)
    del processes
    gc.collect()
    assert not exists(pid)


SERVER = """
import threading, time
from server.limited_processes import LimitedProcesses

idle, busy = (LimitedProcesses("a_program", 1.0, 1.0, "hello") for _ in range(2))
pids = [each.ask({"do": "nothing"})["pid"] for each in (idle, busy)]
threading.Thread(target=busy.ask, args=({"do": "compute"},)).start()
while not busy._busy:
    pass
print(*pids, flush=True)
time.sleep(60)
"""


def test_no_process_outlives_a_server_that_is_killed(new: New) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout is not None
        left = json.loads(b"[%s]" % server.stdout.readline().replace(b" ", b","))
        server.kill()
    assert len(left) == 2
    wait_until(lambda: not any(exists(pid) for pid in left))
