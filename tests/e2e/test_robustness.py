"""What a server that anyone can reach must bear: any body, any reader, anything its own document allows."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from pydantic import BaseModel, ValidationError

from server.api.openai.protocol import ChatCompletionRequest, CompletionRequest
from server.api.tgi.protocol import GenerateRequest, StreamRequest
from server.api.tokenize import DetokenizeRequest, TokenizeRequest
from server.commands.bench import stream
from tests.e2e.conftest import Server

N_MALFORMED = 5000
ROUTES: dict[str, dict[str, Any]] = {
    "/generate": {"inputs": "The fox", "parameters": {"max_new_tokens": 2, "seed": 1}, "stream": False},
    "/generate_stream": {"inputs": "The fox", "parameters": {"max_new_tokens": 2}},
    "/v1/completions": {"prompt": "The fox", "max_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1.0}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "The fox"}], "max_tokens": 2},
    "/tokenize": {"inputs": "The fox"},
    "/detokenize": {"tokens": [5, 6]},
}
WRONG_VALUES = [
    *(
        "true",
        "[[]]",
        "{}",
        '{"a": {"b": []}}',
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "1" * 400,
        "-1",
        "0.5",
        '"\\ud800"',
    ),
    *('"x\\udfff"', '"\\u0000"', "[null]", '[{"role": "user"}]', '["a", 1]', "[1e30]", '{"type": "regex", "value": 1}'),
    *('"' + "y" * 3000 + '"', "[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200, "9007199254740993", "1e-400"),
]


def malformed_bodies(seed: int) -> Iterator[tuple[str, bytes]]:
    """(route, body): good bodies broken in one of many ways. Some turn out good after all."""
    chance = random.Random(seed)
    while True:
        path = chance.choice(list(ROUTES))
        body = json.loads(json.dumps(ROUTES[path]))
        text = json.dumps(body)
        match chance.randrange(8):
            case 0:  # cut off
                content = text[: chance.randrange(len(text))].encode()
            case 1:  # bytes replaced
                broken = bytearray(text.encode())
                for _ in range(chance.randrange(1, 6)):
                    broken[chance.randrange(len(broken))] = chance.randrange(256)
                content = bytes(broken)
            case 2:  # noise
                content = chance.randbytes(chance.randrange(200))
            case 3:  # nested deeply
                depth = chance.choice((500, 5000, 100_000))
                content = (f'{{"inputs": {"[" * depth}{"]" * depth}}}').encode()
            case 4:  # an unknown field
                content = json.dumps({**body, chance.choice(("input", "", "Inputs", "__proto__")): 1}).encode()
            case 5:  # not an object
                content = chance.choice(WRONG_VALUES).encode()
            case 6:  # invalid UTF-8 within a string
                content = text.encode().replace(b"fox", chance.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88")))
            case _:  # a wrong value somewhere
                inner = body.get("parameters") if chance.random() < 0.4 else None
                place = inner if isinstance(inner, dict) else body
                place[chance.choice(list(place))] = "\0WRONG\0"
                content = json.dumps(body).replace('"\\u0000WRONG\\u0000"', chance.choice(WRONG_VALUES)).encode()
        yield path, content


def test_malformed_bodies_are_refused_in_a_sentence(checkpoint: Path) -> None:
    with Server("--model", str(checkpoint), "--request-timeout", "60") as server:
        address = urlsplit(server.url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        n_refused, bodies = 0, malformed_bodies(seed=0)
        for i in range(10 * N_MALFORMED):
            path, content = next(bodies)
            if chance_has_left_it_good(path, content):
                continue
            connection.request("POST", path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
            assert 400 <= response.status < 500, (response.status, path, content[:300], answer)
            error = json.loads(answer)["error"]
            sentence = error["message"] if path.startswith("/v1/") else error
            assert sentence.endswith((".", "?")), (sentence, content[:300])
            assert len(sentence) < 600
            n_refused += 1
            if n_refused == N_MALFORMED:
                break
            if i % 500 == 0:
                good = httpx2.post(f"{server.url}/generate", json=ROUTES["/generate"], timeout=60)
                assert good.status_code == 200
        assert n_refused == N_MALFORMED
        assert httpx2.post(f"{server.url}/generate", json=ROUTES["/generate"], timeout=60).status_code == 200
        connection.close()


def chance_has_left_it_good(path: str, content: bytes) -> bool:
    """Whether the body is one that the server may accept: it parses, and has the right fields of the right types."""
    kinds: tuple[type[BaseModel], ...] = (
        GenerateRequest,
        StreamRequest,
        CompletionRequest,
        ChatCompletionRequest,
        TokenizeRequest,
        DetokenizeRequest,
    )
    try:
        value = json.loads(content)
        dict(zip(ROUTES, kinds, strict=True))[path].model_validate(value)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, ValidationError, RecursionError):
        return path == "/tokenize" and b'"prompt"' in content
    return True


def test_schemathesis_finds_nothing_undeclared(checkpoint: Path, tmp_path: Path) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = ["--model", str(checkpoint), "--max-model-len", "64", "--max-num-seqs", "128"]
    with Server(*options) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", checks]
        command += ["--max-examples", "25", "--seed", "1", "--generation-database", "none", "--no-color"]
        # It leaves files where it is run.
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-6000:]
        paths = httpx2.get(f"{server.url}/openapi.json", timeout=60).json()["paths"]
        assert f"Tested: {sum(map(len, paths.values()))}\n" in done.stdout


def test_vanishing_clients_leave_nothing_behind(checkpoint: Path) -> None:
    """64 streams at a time, of which one in five is left at a random moment; the others get what they get alone."""
    chance = random.Random(2)
    bodies = [
        {
            "inputs": f"The fox{' and' * (i % 7)}",
            "parameters": {"max_new_tokens": 30 + i % 50, "temperature": 1.0, "seed": i},
        }
        for i in range(192)
    ]
    vanish = {i: chance.randrange(1, 30) for i in chance.sample(range(len(bodies)), len(bodies) // 5)}

    async def one(client: httpx2.AsyncClient, i: int, gate: asyncio.Semaphore) -> str | None:
        async with gate, client.stream("POST", "/generate_stream", json=bodies[i]) as response:
            assert response.status_code == 200
            n_read, last = 0, ""
            lines = response.aiter_lines()
            async for line in lines:
                if line:
                    n_read, last = n_read + 1, line
                if n_read == vanish.get(i):
                    return None
            text: str = json.loads(last.removeprefix("data:"))["generated_text"]
            return text

    async def all_at(n_clients: int, url: str) -> list[str | None]:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            gate = asyncio.Semaphore(n_clients)
            return await asyncio.gather(*(one(client, i, gate) for i in range(len(bodies))))

    with Server("--model", str(checkpoint)) as server:
        together = asyncio.run(all_at(64, server.url))
        survivors = [i for i in range(len(bodies)) if i not in vanish]
        assert len(survivors) >= len(bodies) * 4 // 5
        alone = {
            i: httpx2.post(f"{server.url}/generate", json=bodies[i], timeout=60).json()["generated_text"]
            for i in survivors[::4]
        }
        assert all(together[i] == text for i, text in alone.items())
        deadline = time.monotonic() + 60
        while "vllm:kv_cache_usage_perc{model_name=" not in (text := idle_metrics(server.url)):
            assert time.monotonic() < deadline, text
    assert " ERROR " not in server.log
    assert " WARNING " not in server.log


def idle_metrics(url: str) -> str:
    """The metrics' page, once no slot is taken and nothing waits; else only what is taken."""
    lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    taken = [
        line for line in lines if any(line.startswith(f"vllm:{name}") for name in names) and not line.endswith(" 0.0")
    ]
    return "\n".join(taken or lines)


def test_a_reader_that_stands_still_loses_its_text_and_nobody_else(checkpoint: Path) -> None:
    grammar = {"type": "regex", "value": "[a-z]{900000}"}
    body = {"inputs": "The fox", "parameters": {"max_new_tokens": 10**6, "grammar": grammar, "top_n_tokens": 20}}
    content = json.dumps(body).encode()
    with Server("--model", str(checkpoint), "--max-num-seqs", "1") as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as standing:
            head = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
            standing.sendall(f"{head}Connection: close\r\nContent-Type: application/json\r\n\r\n".encode() + content)
            assert standing.recv(100).startswith(b"HTTP/1.1 200")
            # Nobody reads on. The only slot must come free all the same.
            short = {"inputs": "The fox", "parameters": {"max_new_tokens": 2}}
            timing = asyncio.run(
                asyncio.wait_for(stream(address.hostname or "", address.port or 0, "/generate", short), timeout=60)
            )
            assert len(timing.arrivals) == 2
            received = b""
            while piece := standing.recv(2**16):
                received += piece
            assert b"The client left 4096 tokens of its stream unread." in received[-400:]


def test_a_reader_that_stands_still_does_not_keep_the_server_from_ending(checkpoint: Path) -> None:
    """Nor, once its text is complete, does it take a place in the queue."""
    body = {"prompt": "The fox and the bird. " * 1500, "echo": True, "logprobs": 20, "stream": True, "max_tokens": 2}
    content = json.dumps(body).encode()
    arguments = ["--model", str(checkpoint), "--max-num-seqs", "1", "--max-queue-length", "1", "--drain-timeout", "1"]
    with Server(*arguments) as server:
        address = urlsplit(server.url)
        standing = [socket.create_connection((address.hostname, address.port)) for _ in range(2)]
        for connection in standing:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        for _ in range(3):
            answer = httpx2.post(f"{server.url}/generate", json=ROUTES["/generate"], timeout=60)
            assert answer.status_code == 200, answer.text
        server.process.terminate()
        assert server.process.wait(timeout=60) == 0
        for connection in standing:
            connection.close()


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_body_that_never_ends_is_refused(path: str, checkpoint: Path) -> None:
    with Server("--model", str(checkpoint), "--max-body-size", "1") as server:

        def endless() -> Iterator[bytes]:
            yield from iter(lambda: b" " * 2**16, None)

        try:
            answer = httpx2.post(
                f"{server.url}{path}", content=endless(), headers={"content-type": "application/json"}, timeout=60
            )
            assert answer.status_code == 413
        except httpx2.TransportError:
            pass  # it wrote on after the server had answered and closed
        assert httpx2.get(f"{server.url}/ready", timeout=60).status_code == 200
