"""The application in process, on a tiny model of random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from model import load_checkpoint
from server.api.app import create_app
from server.engine import LLMEngine


@pytest.fixture(scope="session")
def client(checkpoint: Path) -> Iterator[TestClient]:
    model, tokenizer = load_checkpoint(checkpoint)
    with TestClient(create_app(LLMEngine(model, tokenizer)), raise_server_exceptions=False) as client:
        yield client
