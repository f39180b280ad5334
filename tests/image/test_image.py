"""The Docker image. `make image-test` runs these: they are left out unless asked for."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.image.conftest import TAG, Container, engine

pytestmark = [pytest.mark.image, pytest.mark.usefixtures("image")]


def test_it_is_small(image: dict[str, Any], server: Container) -> None:
    sizes = server.execute("du", "-sm", "/opt/venv", "/usr/lib/gcc", "/models")
    print(f"{image['Size'] / 1e6:.0f} MB, of these\n{sizes}")
    assert image["Size"] < 1.5e9  # several times as large with CUDA


def test_it_generates(server: Container) -> None:
    assert httpx2.get(f"{server.url}/health", timeout=60).status_code == 200
    assert [model["id"] for model in httpx2.get(f"{server.url}/v1/models", timeout=60).json()["data"]] == [
        "aft-conv-stories"
    ]
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 20, "seed": 1}}
    answer = httpx2.post(f"{server.url}/generate", json=body, timeout=60).json()
    assert len(answer["generated_text"].split()) > 5


def test_kernels_are_compiled(server: Container) -> None:
    assert "kernels-" in server.execute("ls", "/data/.cache/aft")
    assert "compiled kernels" not in server.log()


def test_the_server_is_process_1_and_not_root(server: Container) -> None:
    assert server.execute("cat", "/proc/1/cmdline").split("\0")[1:3] == ["/opt/venv/bin/aft", "serve"]
    status = dict(line.split(":", 1) for line in server.execute("cat", "/proc/1/status").splitlines())
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"10001"}


def test_only_tmp_and_data_are_written(server: Container) -> None:
    for path in ("/tmp/file", "/data/file"):
        server.execute("touch", path)
    with pytest.raises(subprocess.CalledProcessError):
        server.execute("touch", "/models/file")


def test_the_health_check_follows_the_port(image: dict[str, Any]) -> None:
    config = image["Config"].get("Healthcheck") or image["Healthcheck"]  # docker's place, podman's place
    kind, *check = config["Test"]
    assert kind == "CMD"
    # A proxy that does not exist: the check must not use it.
    with Container(AFT_PORT="9000", http_proxy="http://127.0.0.1:9") as container:
        container.execute(*check)
        with pytest.raises(subprocess.CalledProcessError):
            container.execute("env", "AFT_PORT=9001", *check)


def test_weights_of_a_volume(checkpoint: Path) -> None:
    checkpoint.parent.chmod(0o755)
    checkpoint.chmod(0o755)
    with Container(f"--volume={checkpoint}:/models/mine:ro", AFT_MODEL="/models/mine") as container:
        models = httpx2.get(f"{container.url}/v1/models", timeout=60).json()["data"]
    assert [model["id"] for model in models] == ["mine"]


def test_other_commands() -> None:
    assert len(engine("run", "--rm", TAG, "generate", "Once upon a time", "--max-tokens", "10").split()) > 5


def test_sessions_outlive_the_container(volume: str) -> None:
    options = {"AFT_STORE": "/data/sessions.sqlite"}
    with Container(f"--volume={volume}:/data", **options) as container:
        session = httpx2.post(f"{container.url}/sessions", timeout=60).json()["session_id"]
        body = {"inputs": "Once", "parameters": {"max_new_tokens": 5}, "session_id": session}
        assert httpx2.post(f"{container.url}/generate", json=body, timeout=60).status_code == 200
        assert container.stop() == 0
    with Container(f"--volume={volume}:/data", **options) as container:
        assert httpx2.get(f"{container.url}/sessions/{session}", timeout=60).json()["turns"] == 1


def test_stopping_lets_a_stream_end() -> None:
    n_tokens = 3000
    parameters = {"max_new_tokens": n_tokens, "grammar": {"type": "regex", "value": "[a-z]{900000}"}}
    body = {"inputs": "Once", "parameters": parameters, "stream": True}
    with Container() as container, httpx2.stream("POST", f"{container.url}/generate", json=body, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        received = [next(lines)]
        statuses: list[int] = []
        stopping = threading.Thread(target=lambda: statuses.append(container.stop()))
        stopping.start()
        deadline = time.monotonic() + 60
        while container.is_ready():
            assert time.monotonic() < deadline
        received += lines
        stopping.join()
        log = container.log()
    events = [json.loads(line.removeprefix("data:")) for line in received]
    assert [event["index"] for event in events] == list(range(1, n_tokens + 1))
    assert events[-1]["generated_text"]
    assert statuses == [0]
    assert "Traceback" not in log
