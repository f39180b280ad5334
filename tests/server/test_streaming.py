from __future__ import annotations

from unittest import mock

import pytest
from fastapi.testclient import TestClient


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"max_tokens": 20_000, "logprobs": 20},
            "1 texts of 20000 tokens may have 420000 log-probabilities, but an answer in one piece at most 262144",
        ),
        (
            {"max_tokens": 600_000, "n": 2},
            "2 texts of 600000 tokens may have 1200000 tokens, but an answer in one piece at most 1048576",
        ),
        (
            {"prompt": [5] * 50_000, "max_tokens": 0, "logprobs": 20, "echo": True},
            "A prompt of 50000 tokens has 1050000 log-probabilities, but at most 1048576 are told",
        ),
    ],
)
def test_an_answer_in_one_piece_is_bounded(fields: dict[str, object], sentence: str, client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "a", **fields})
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


def test_a_large_answer_is_that_of_a_small_one(client: TestClient) -> None:
    body = {"prompt": "the fox", "max_tokens": 30, "logprobs": 3, "temperature": 0, "ignore_eos": True}
    small = client.post("/v1/completions", json=body).json()["choices"]
    with mock.patch("server.api.streaming.LARGE_ANSWER", 1):
        assert client.post("/v1/completions", json=body).json()["choices"] == small
