"""What version 0.2 wrote is read: checkpoint folders, files of sessions, and stores of sessions and prefixes.

version_0_2/ has a tiny model of either family (RWKV-4 was a variant of AFT then), a session of one turn as a file and
in a store, the prompt of that turn in the prefix store, and the text that version 0.2 went on with.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from model import load_checkpoint
from model.checkpoint import fingerprint
from model.errors import ConfigError
from model.families import config_from_dict
from server.api.app import create_app
from server.engine import EngineConfig, LLMEngine
from server.stores import open_prefix_store, open_store

WRITTEN = Path(__file__).parent / "version_0_2"
PARAMETERS = {"max_new_tokens": 6, "details": True}


@pytest.fixture(params=["conv", "rwkv4"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(WRITTEN / request.param, tmp_path / "written"))


@pytest.fixture
def expected(written: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((written / "expected.json").read_text())
    return fields


@pytest.fixture
def client(written: Path) -> TestClient:
    engine = LLMEngine(*load_checkpoint(written), EngineConfig(chunk_size=16))
    store = str(written / "store.sqlite")
    app = create_app(engine, store=open_store(store), prefix_store=open_prefix_store(store, 10**6))
    return TestClient(app, raise_server_exceptions=False)


def test_a_model_is_the_same_one(written: Path, expected: dict[str, Any]) -> None:
    assert LLMEngine(*load_checkpoint(written)).fingerprint.hex() == expected["fingerprint"]


def test_fields_without_effect_are_still_part_of_a_models_name() -> None:
    """`aft train --variant rwkv4` wrote 16 heads."""
    folder = WRITTEN / "rwkv4"
    fields = json.loads((folder / "config.json").read_text())
    model, _ = load_checkpoint(folder)
    model.config = config_from_dict({**fields, "n_head": 16})
    assert fingerprint(model).hex() == json.loads((folder / "expected.json").read_text())["fingerprint_of_16_heads"]
    assert model.config == config_from_dict(fields)
    with pytest.raises(ConfigError, match="n_head must be a whole number, at least 1, not 'x'"):
        config_from_dict({**fields, "n_head": "x"})


def test_a_stored_session_goes_on(client: TestClient, expected: dict[str, Any]) -> None:
    with client:
        body = {"inputs": " and a bird", "parameters": PARAMETERS, "session_id": expected["session_id"]}
        answer = client.post("/generate", json=body)
        assert answer.json()["generated_text"] == expected["next_text"]
        assert client.get(f"/sessions/{expected['session_id']}").json()["turns"] == 2


def test_the_file_of_a_session_goes_on(client: TestClient, written: Path, expected: dict[str, Any]) -> None:
    with client:
        file = (written / "session.safetensors").read_bytes()
        name = client.post("/sessions/import", content=file).json()["session_id"]
        body = {"inputs": " and a bird", "parameters": PARAMETERS, "session_id": name}
        assert client.post("/generate", json=body).json()["generated_text"] == expected["next_text"]


def test_a_stored_prefix_is_found(client: TestClient) -> None:
    with client:
        body = {"inputs": "Once upon a time there was a red fox", "parameters": {**PARAMETERS, "max_new_tokens": 1}}
        details = client.post("/generate", json={**body, "stream": False}).json()["details"]
        n_prompt = client.post("/tokenize", json={"prompt": body["inputs"]}).json()["count"]
        assert details["cached_tokens"] == n_prompt
