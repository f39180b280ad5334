"""What can be typed wrong: a sentence, which says what to do, and no traceback."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from server.commands.bench import BenchError, run, run_fast
from server.commands.main import NO_MEMORY, main, sentence_of
from server.commands.serve import check_address
from server.errors import ConfigurationError


def aft(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """What the process would end with."""
    monkeypatch.setattr("sys.argv", ["aft", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_port_that_is_taken_is_found_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = aft("serve", "--port", port, "--model", str(tmp_path), monkeypatch=monkeypatch)
    assert ended == f"error: port {port} is taken, use --port."


def test_an_address_where_nobody_can_listen() -> None:
    for host in ("nowhere.invalid", "a" * 64, "192.0.2.1"):
        with pytest.raises(ConfigurationError, match=f"Nobody can listen on host '{host}' and port 0: "):
            check_address(host, 0)
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        check_address(host, 0)


def test_a_text_needs_somewhere_to_go(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["generate", "caf\u00e9", "--model", str(checkpoint), "--max-tokens", "1", "--threads", "1"]
    monkeypatch.setattr("sys.stdout", None)
    ended = aft(*arguments, monkeypatch=monkeypatch)
    assert ended == "error: Standard output is closed, so there is nowhere to write a text."
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    ended = aft(*arguments, monkeypatch=monkeypatch)
    assert ended == "error: Standard output is in ascii, which has no '\\xe9'; PYTHONIOENCODING=utf-8 helps."


@pytest.mark.skipif(os.name != "posix", reason="needs file descriptors")
def test_no_file_takes_the_place_of_a_closed_stream() -> None:
    code = (
        "import os, sys\n"
        "from server.__main__ import open_standard_streams\n"
        "open_standard_streams()\n"
        "sys.stderr.write(str(os.open(os.devnull, os.O_RDONLY) > 2))\n"
    )
    command = ["bash", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code]
    assert subprocess.run(command, stderr=subprocess.PIPE, check=True, timeout=60).stderr == b"True"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError(2, "No such file or directory", "in.txt"), "in.txt: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("odd"), "odd"),
        (MemoryError(), NO_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory."), NO_MEMORY),
        (RuntimeError("a mistake of ours"), None),
        (KeyError("a mistake of ours"), None),
    ],
)
def test_errors_of_the_machine_are_sentences_and_ours_are_not(error: Exception, sentence: str | None) -> None:
    assert sentence_of(error) == sentence


def test_memory_that_libraries_do_not_get() -> None:
    for take in (lambda: torch.empty(2**55, dtype=torch.uint8), lambda: np.empty(2**55, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            take()
        assert isinstance(error.value, Exception)
        assert sentence_of(error.value) == NO_MEMORY


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "The server answered "),
        (b"HTTP/1.1 404 Not Found\r\n\r\nno", "The server answered HTTP/1.1 404 Not Found"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "A stream ended with"),
        (b"x" * 2**17, "broke off its answer"),
    ],
)
def test_a_bench_of_what_is_no_server_of_ours(content: bytes, sentence: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"true}")
        writer.write(content)
        writer.close()

    async def bench() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            await run(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", [{}, {}], 2)

    with pytest.raises(BenchError, match=sentence):
        asyncio.run(bench())


def test_a_bench_of_nobody_names_the_address() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with pytest.raises(BenchError, match=rf"^Nobody answers at {url} \(.*\); is aft serve running there\?$"):
            run_fast(run(url, [{}, {}], 2))
