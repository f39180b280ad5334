"""Clients that know nothing of this server, against a real process."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from tests.e2e.conftest import Server

# A text that the model cannot end.
ENDLESS = {"max_new_tokens": 10**6, "grammar": {"type": "regex", "value": "[a-z]{900000}"}}
README = Path(__file__).parent.parent.parent / "README.md"


def test_huggingface_hub_streams_the_bundled_model(bundled_url: str) -> None:
    client = InferenceClient(bundled_url)  # kept: it closes its streams when it is collected
    stream = list(client.text_generation("Once upon a time", stream=True, details=True))
    text = "".join(event.token.text for event in stream if not event.token.special)
    assert stream[-1].generated_text == text
    assert stream[-1].details is not None
    assert stream[-1].details.generated_tokens == len(stream)
    assert stream[-1].details.finish_reason in ("length", "eos_token")
    assert all(event.generated_text is None for event in stream[:-1])
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 30
    assert {"was", "the", "a", "and"} & set(words), text  # a story, not noise


def test_huggingface_hub_reads_whole_texts(url: str) -> None:
    client = InferenceClient(url)
    text = client.text_generation("The fox", max_new_tokens=8)
    assert isinstance(text, str)
    details = client.text_generation("The fox", max_new_tokens=8, details=True, stop=["zzz"], seed=1, temperature=0.5)
    assert details.details is not None
    assert details.details.generated_tokens == 8
    assert details.details.seed == 1
    plain = client.text_generation("The fox", max_new_tokens=8, stream=True)
    assert "".join(plain) == text


def test_huggingface_hub_understands_refusals(url: str) -> None:
    with pytest.raises(ValidationError, match="best_of above 1 and seed exclude each other"):
        InferenceClient(url).text_generation("The fox", best_of=2, do_sample=True, seed=1)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_readmes_curl_streams(bundled_url: str) -> None:
    """The command printed in the README, word for word but for the address."""
    command = re.search(r"^curl .*?(?=\n```)", README.read_text(), re.MULTILINE | re.DOTALL)
    assert command is not None
    script = command[0].replace("http://127.0.0.1:8000", bundled_url)
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300, check=True).stdout
    events = [json.loads(line.removeprefix("data:")) for line in output.splitlines() if line]
    assert events[-1]["generated_text"]
    assert (
        "".join(event["token"]["text"] for event in events if not event["token"]["special"])
        == (events[-1]["generated_text"])
    )


def test_parallel_requests_get_their_own_texts(url: str) -> None:
    """Requests that share batches get what they get alone."""
    bodies: list[dict[str, object]] = [
        {"inputs": "The fox" + " and" * i, "parameters": {"max_new_tokens": 20 + i}} for i in range(16)
    ]

    def text(body: dict[str, object]) -> str:
        response = httpx2.post(f"{url}/generate", json=body, timeout=60)
        response.raise_for_status()
        generated: str = response.json()["generated_text"]
        return generated

    alone = [text(body) for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(text, bodies)) == alone


def test_a_client_that_leaves_frees_its_place(url: str) -> None:
    """33 endless streams are opened and left: one more than the places of a batch."""
    body = {"inputs": "The fox", "parameters": ENDLESS, "stream": True}
    for _ in range(33):
        with httpx2.stream("POST", f"{url}/generate", json=body, timeout=60) as response:
            assert next(response.iter_lines()).startswith("data:")
    answer = httpx2.post(f"{url}/generate", json={"inputs": "The fox", "parameters": {"max_new_tokens": 2}}, timeout=60)
    assert answer.status_code == 200


def test_a_client_that_leaves_the_queue_leaves_no_request_there(checkpoint: Path) -> None:
    """One place, taken; streams that wait for it are given up. The queue of 1 has room again each time."""
    content = json.dumps({"inputs": "The fox", "parameters": ENDLESS}).encode()
    head = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    sent = f"{head}Content-Type: application/json\r\n\r\n".encode() + content
    with Server("--model", str(checkpoint), "--max-num-seqs", "1", "--max-queue-length", "1") as server:
        address = urlsplit(server.url)

        def post() -> socket.socket:
            connection = socket.create_connection((address.hostname, address.port), timeout=60)
            connection.sendall(sent)
            return connection

        with post() as running:
            assert running.recv(100).startswith(b"HTTP/1.1 200")
            reading = threading.Thread(target=lambda: all(iter(lambda: running.recv(2**16), b"")))
            reading.start()
            for _ in range(5):
                with post():
                    wait_for_queue(server.url, 1)
                wait_for_queue(server.url, 0)
            assert reading.is_alive()
            running.shutdown(socket.SHUT_RDWR)
            reading.join()


def wait_for_queue(url: str, n_waiting: int) -> None:
    """Until that many requests wait."""
    deadline = time.monotonic() + 60
    pattern = rf"^vllm:num_requests_waiting\{{.*\}} {n_waiting}\.0$"
    while not re.search(pattern, text := httpx2.get(f"{url}/metrics", timeout=60).text, re.MULTILINE):
        assert time.monotonic() < deadline, text


def test_a_request_past_its_time_ends(checkpoint: Path) -> None:
    body = {"inputs": "The fox", "parameters": ENDLESS}
    with Server("--model", str(checkpoint), "--request-timeout", "0.3") as server:
        answer = httpx2.post(f"{server.url}/generate", json=body, timeout=60)
        assert answer.status_code == 504
        stream = httpx2.post(f"{server.url}/generate", json={**body, "stream": True}, timeout=60)
        assert stream.status_code in (200, 504)  # 504 where not even the first token came in time
        last = json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data:"))
        assert last == {"error": "The request was not done by its deadline.", "error_type": "generation"}


def test_a_client_that_leaves_before_the_answer_frees_its_place(url: str) -> None:
    body = {"inputs": "The fox", "parameters": ENDLESS}
    for _ in range(33):
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/generate", json=body, timeout=httpx2.Timeout(60, read=0.02))
    answer = httpx2.post(f"{url}/generate", json={"inputs": "The fox", "parameters": {"max_new_tokens": 2}}, timeout=60)
    assert answer.status_code == 200
