"""What clients without a key can do to connections: too much, too slowly, too many; and odd but honest clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import resource
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import httpx2
import pytest
import uvicorn

from model import LanguageModel, Tokenizer, load_checkpoint
from server.api.app import create_app
from server.api.config import APIConfig
from server.connections import MAX_FIELDS, MAX_HEAD, MAX_TARGET, Places, address_of, uvicorn_config
from server.engine import LLMEngine
from server.errors import ConfigurationError

BODY = b'{"inputs": "The fox", "parameters": {"max_new_tokens": 3}}'
READ_TIMEOUT = 2.0
LONG = 120.0  # seconds after which a test gives up


@contextmanager
def listening(model: LanguageModel, tokenizer: Tokenizer, **options: Any) -> Iterator[str]:
    """The address of the application, as `aft serve` serves it, in a thread."""
    config = APIConfig(**options)
    app = create_app(LLMEngine(model, tokenizer), config)
    server = uvicorn.Server(uvicorn_config(app, config, host="127.0.0.1", port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + LONG
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"{'https' if config.ssl_certfile else 'http'}://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(LONG)


@pytest.fixture(scope="module")
def closed(checkpoint: Path) -> Iterator[str]:
    """A server with keys, which clients here do not have."""
    options: dict[str, Any] = {"api_keys": ("key",), "read_timeout": READ_TIMEOUT, "max_connections": 100}
    with listening(*load_checkpoint(checkpoint), max_connections_per_address=100, **options) as url:
        yield url


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> Iterator[str]:
    with listening(*load_checkpoint(checkpoint), read_timeout=READ_TIMEOUT, write_timeout=READ_TIMEOUT) as url:
        yield url


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=LONG)


def received(connection: socket.socket) -> bytes:
    """All until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(2**16):
            found += piece
    return found


def answer_to(url: str, content: bytes) -> bytes:
    with connect(url) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(content)
        return received(connection)


def is_well(url: str) -> bool:
    return httpx2.get(f"{url}/health", timeout=LONG).status_code == 200


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2 * MAX_HEAD + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 50 * MAX_HEAD, 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * (MAX_FIELDS + 1) + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * MAX_HEAD, 431),
        (b"GET /health?" + b"a" * MAX_TARGET + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /health?" + b"a" * 50 * MAX_HEAD, 431),
        (b"\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
    ],
)
def test_what_is_no_request_or_too_much_of_one_is_refused(closed: str, content: bytes, status: int) -> None:
    answer = answer_to(closed, content)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
    assert answer.endswith(b"."), answer  # a sentence
    assert is_well(closed)


@pytest.mark.parametrize("rest", [b"0\r\n" + b"a: b\r\n" * MAX_HEAD, b"1;" + b"a" * 2 * MAX_HEAD, b"zz\r\n"])
def test_trailers_and_lines_of_chunks_have_bounds_too(opened: str, rest: bytes) -> None:
    """The body is being read, so a key is not what stops it."""
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = answer_to(opened, head + b"1\r\n{\r\n" + rest)
    assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")), answer


def test_a_body_in_chunks_of_one_byte_is_read(opened: str) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b" " * 5_000 + BODY)
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    answer = answer_to(opened, head + b"Connection: close\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 "), answer


def test_pipelined_requests_are_answered_in_order(opened: str) -> None:
    paths = [b"/health", b"/ready", b"/none", b"/info"] * 25
    requests = [b"GET %b HTTP/1.1\r\nHost: x\r\nX: %b\r\n\r\n" % (path, b"a" * 400) for path in paths]
    requests[-1] = requests[-1].replace(b"Host: x", b"Host: x\r\nConnection: close")
    answer = answer_to(opened, b"".join(requests))
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", answer)
    assert statuses == [b"200", b"200", b"404", b"200"] * 25


def test_silent_and_slow_clients_are_sent_away(closed: str) -> None:
    with connect(closed) as silent, connect(closed) as slow, connect(closed) as slow_body, connect(closed) as idle:
        slow_body.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
        deadline = time.monotonic() + LONG
        while not select.select([slow], [], [], 0.05)[0]:  # a byte now and then is no excuse
            slow.sendall(b"a")
            assert time.monotonic() < deadline
        assert received(slow).startswith(b"HTTP/1.1 408 ")
        assert received(silent) == b""
        assert received(slow_body).startswith(b"HTTP/1.1 401 ")
        assert received(idle).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_does_not_come_is_408(opened: str) -> None:
    for path, form in (("/generate", "error_type"), ("/v1/completions", "code"), ("/sessions/import", "error_type")):
        with connect(opened) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nContent-Type: application/json\r\n\r\n"
            connection.sendall(head.encode() + b"{")
            answer = received(connection)
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            assert form.encode() in answer
            assert b"too slowly" in answer


def test_who_owes_nothing_has_time(opened: str) -> None:
    """A text that takes longer than the time-outs is not cut off, read as it comes."""
    grammar = {"type": "regex", "value": "[a-z]{900000}"}
    body = {"inputs": "The fox", "parameters": {"max_new_tokens": 10**6, "grammar": grammar}}
    with httpx2.stream("POST", f"{opened}/generate_stream", json=body, timeout=LONG) as response:
        started = time.monotonic()
        for line in response.iter_lines():
            if time.monotonic() - started > READ_TIMEOUT + 2:
                assert line == "" or "error" not in json.loads(line.removeprefix("data:"))
                return
    raise AssertionError("the stream has ended")


def test_who_does_not_read_loses_the_connection(opened: str) -> None:
    with connect(opened) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
        poll = select.poll()
        poll.register(connection, 0)  # errors only, nothing is read
        assert poll.poll(1000 * LONG)


def test_connections_that_wait_make_room_for_new_ones(closed: str) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(closed)) for _ in range(300)]
        for connection in held[::2]:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        for _ in range(5):
            assert is_well(closed)


def test_connections_are_bounded_by_the_files_that_may_be_open() -> None:
    with mock.patch.object(resource, "getrlimit", return_value=(400, 400)):
        assert Places.of(APIConfig()).most == 200
        assert Places.of(APIConfig(max_connections=200)).most_of_address == 100
        with pytest.raises(ConfigurationError, match="max_connections must be at most 200, half of the files"):
            Places.of(APIConfig(max_connections=201))


def test_an_address_is_one_user() -> None:
    assert address_of(("10.0.0.1", 5)) == address_of(("::ffff:10.0.0.1", 7)) == "10.0.0.1"
    assert address_of(("2001:db8::1", 5)) == address_of(("2001:db8::ffff:2", 5)) == "2001:db8::"
    assert address_of(("2001:db8:0:1::1", 5)) == "2001:db8:0:1::"
    assert address_of(("fe80::1%eth0", 5)) == "fe80::"
    assert address_of(None) == ""


@pytest.mark.parametrize("size", [5_000_000, 60_000_000])
def test_413_reaches_a_client_that_still_sends(opened: str, size: int) -> None:
    """urllib sends all of the body before it reads anything, and says Connection: close."""
    headers = {"Content-Type": "application/json"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{opened}/v1/completions", b" " * size, headers), timeout=LONG)
    assert refused.value.code == 413
    assert "at most 4194304 bytes" in json.load(refused.value)["error"]["message"]
    refused.value.close()


def test_an_answer_before_the_body_leaves_the_connection_as_it_is(closed: str) -> None:
    with connect(closed) as connection:
        for _ in range(3):
            connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
            head = b""
            while b"error_type" not in head:
                head += connection.recv(2**16)
            assert head.startswith(b"HTTP/1.1 401 ")
            connection.sendall(b"0123456789")


def test_an_offer_to_upgrade_is_ignored(opened: str) -> None:
    """As every client on the JDK makes it, and curl with --http2; RFC 9110, 7.8."""
    address = urlsplit(opened)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=LONG)
    for offer in ("h2c", "websocket"):
        for _ in range(2):
            connection.request(
                "POST",
                "/generate",
                BODY,
                {
                    "Content-Type": "application/json",
                    "Connection": "Upgrade, HTTP2-Settings",
                    "Upgrade": offer,
                    "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
                },
            )
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            assert "generated_text" in json.load(answer)
    connection.close()


@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java 11 or newer")
def test_the_client_of_the_jdk(opened: str, tmp_path: Path) -> None:
    program = tmp_path / "Client.java"
    program.write_text(JAVA)
    command = ["java", "-XX:TieredStopAtLevel=1", str(program), opened]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["200", "true", "200", "true", "200", "true"]


JAVA = """
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

public class Client {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        String body = "{\\"inputs\\": \\"The fox\\", \\"parameters\\": {\\"max_new_tokens\\": 3}}";
        for (String path : new String[] {"/generate", "/generate", "/generate_stream"}) {
            HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0] + path))
                .header("Content-Type", "application/json")
                .POST(HttpRequest.BodyPublishers.ofString(body)).build();
            HttpResponse<String> answer = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.statusCode() + " " + answer.body().contains("generated_text"));
        }
    }
}
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_tls(checkpoint: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    for_an_address = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-out",
        f"{certificate}",
        "-keyout",
        f"{key}",
    ]
    subprocess.run([*command, *for_an_address], check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=str(certificate))
    with listening(*load_checkpoint(checkpoint), ssl_certfile=certificate, ssl_keyfile=key) as url:
        headers = {"Content-Type": "application/json"}
        for content, status in ((BODY, 200), (b" " * 5_000_000, 413)):
            answer = httpx2.post(f"{url}/generate", content=content, headers=headers, verify=trusted, timeout=LONG)
            assert answer.status_code == status


def test_tls_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "damaged.pem").write_text("x")
    for name in ("none.pem", "damaged.pem"):
        with pytest.raises(ConfigurationError, match="ssl_certfile and ssl_keyfile cannot be read"):
            uvicorn_config(None, APIConfig(ssl_certfile=tmp_path / name))
    with pytest.raises(ConfigurationError, match="ssl_keyfile needs ssl_certfile"):
        APIConfig(ssl_keyfile=tmp_path / "key.pem")
