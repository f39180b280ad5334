"""Tiny models of random weights, of both families: with a window and without, and the application in process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from model import LanguageModel, Tokenizer
from server.api.app import create_app
from server.engine import LLMEngine
from tests.conftest import random_model, tiny_config


@pytest.fixture(scope="session", params=["conv", "rwkv4"])
def network(request: pytest.FixtureRequest) -> LanguageModel:
    return random_model(tiny_config(request.param))


@pytest.fixture(scope="session")
def client(network: LanguageModel, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with TestClient(create_app(LLMEngine(network, tokenizer)), raise_server_exceptions=False) as client:
        yield client
