"""The document that other people's generators read."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from model import LanguageModel, Tokenizer
from server.api.app import create_app
from server.api.config import APIConfig
from server.engine import LLMEngine


@pytest.fixture(scope="module")
def document(network: LanguageModel, tokenizer: Tokenizer) -> dict[str, Any]:
    return create_app(LLMEngine(network, tokenizer)).openapi()


def test_every_schema_is_there_and_used(document: dict[str, Any]) -> None:
    used = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))
    assert set(used) == set(document["components"]["schemas"])


@pytest.mark.parametrize(
    ("path", "event"),
    [
        ("/", "StreamEvent"),
        ("/generate", "StreamEvent"),
        ("/generate_stream", "StreamEvent"),
        ("/v1/completions", "CompletionResponse"),
        ("/v1/chat/completions", "ChatCompletionChunk"),
    ],
)
def test_the_events_of_streams_have_a_schema(path: str, event: str, document: dict[str, Any]) -> None:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    assert content["text/event-stream"]["schema"] == {"$ref": f"#/components/schemas/{event}"}


def test_keys_are_told_of_where_they_are_wanted(
    network: LanguageModel, tokenizer: Tokenizer, document: dict[str, Any]
) -> None:
    assert not {"security", "securitySchemes"} & {*document, *document["components"]}
    keyed = create_app(LLMEngine(network, tokenizer), APIConfig(api_keys=("key",))).openapi()
    assert keyed["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    assert keyed["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert keyed["paths"]["/health"]["get"]["security"] == []
    assert "security" not in keyed["paths"]["/generate"]["post"]


def test_it_is_valid(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(document)


def test_bodies_say_what_they_take_besides(client: TestClient, document: dict[str, Any]) -> None:
    body = document["components"]["schemas"]["CompletionRequest"]
    assert body["additionalProperties"] == {"type": "null"}
    assert body["properties"]["user"] == {"description": "Without effect"}
    given = {"prompt": "a", "max_tokens": 1, "user": "me", "anything": None}
    assert client.post("/v1/completions", json=given).status_code == 200
