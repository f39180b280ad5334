"""The image, built from the Dockerfile, and its containers: by docker, or the engine that CONTAINER_ENGINE names."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
ENGINE = os.environ.get("CONTAINER_ENGINE", "docker")
TAG = "localhost/aft-server:test"


def engine(*arguments: str) -> str:
    environment = os.environ | {"BUILDAH_FORMAT": "docker"}  # podman's own format has no HEALTHCHECK
    return subprocess.run([ENGINE, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def download_wheels(folder: Path) -> None:
    """All that the image installs, so that the build needs no index."""
    lock = (ROOT / "requirements.lock").read_text().replace("\\\n", "")
    lock = re.sub(r" ; python_full_version < '3\.11\.\d+'", "", lock)  # for any 3.11 that the image may have
    options = ["--quiet", "--no-deps", "--require-hashes", "--python-version", "3.11", "--only-binary", ":all:"]
    torch_index = ["--index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1"]
    for index, is_there in (([], False), (torch_index, True)):
        lines = [line for line in lock.splitlines() if line.startswith("torch==") == is_there]
        file = folder / "requirements.txt"
        file.write_text("\n".join(lines))
        command = [sys.executable, "-m", "pip", "download", *options, *index, "--dest", str(folder)]
        subprocess.run([*command, "--requirement", str(file)], check=True)


class Container:
    """The image's server with a read-only root, ready on entry; gone after the exit.

    options: of `docker run`; variables: of the server. status: the server's exit status, after `stop`.
    """

    def __init__(self, *options: str, **variables: str) -> None:
        port = variables.get("AFT_PORT", "8000")
        pairs = (f"--env={name}={value}" for name, value in {"AFT_THREADS": "1", **variables}.items())
        self._options = ["--read-only", "--tmpfs=/tmp", f"--publish=127.0.0.1::{port}", *pairs, *options]
        self._port = port

    def __enter__(self) -> Self:
        self.name = engine("run", "--detach", *self._options, TAG).strip()
        self.url = "http://" + engine("port", self.name, self._port).split()[0]
        deadline = time.monotonic() + 120
        while not self.is_ready():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.2)
        return self

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/ready", timeout=60).status_code == 200
        except httpx2.TransportError:
            return False

    def __exit__(self, *_: object) -> None:
        engine("rm", "--force", "--volumes", self.name)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        engine("stop", "--time", "60", self.name)
        return int(engine("inspect", "--format", "{{.State.ExitCode}}", self.name))

    def execute(self, *command: str) -> str:
        """Raises CalledProcessError if its status is not 0."""
        return engine("exec", self.name, *command)

    def log(self) -> str:
        command = [ENGINE, "logs", self.name]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the engine tells about the CPU variant. Takes minutes."""
    if shutil.which(ENGINE) is None or subprocess.run([ENGINE, "info"], capture_output=True).returncode != 0:
        pytest.skip(f"needs {ENGINE}, and its daemon if it has one")
    wheels = tmp_path_factory.mktemp("wheels")
    download_wheels(wheels)
    engine("build", f"--build-context=wheels={wheels}", "--build-arg=PIP_NO_INDEX=1", f"--tag={TAG}", str(ROOT))
    shutil.rmtree(wheels)
    yield json.loads(engine("image", "inspect", TAG))[0]
    engine("image", "rm", TAG)


@pytest.fixture
def volume(image: dict[str, Any]) -> Iterator[str]:
    name = engine("volume", "create").strip()
    yield name
    engine("volume", "rm", name)


@pytest.fixture(scope="module")
def server(image: dict[str, Any]) -> Iterator[Container]:
    """As a user starts it, on the bundled weights."""
    with Container() as container:
        yield container
