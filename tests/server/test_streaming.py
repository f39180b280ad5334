from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from unittest import mock

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from server.api.streaming import EventStream
from server.errors import SlowReaderError


def test_a_client_that_reads_nothing_does_not_keep_its_stream() -> None:
    stream = mock.Mock()

    async def events() -> AsyncIterator[bytes]:
        yield b"data: 1"
        raise AssertionError("nobody has read the first one")

    async def receive() -> Message:
        return await asyncio.Future()

    async def send(message: Message) -> None:
        if message.get("body"):
            await asyncio.Future()

    async def main() -> None:
        with pytest.raises(SlowReaderError, match=r"read nothing for 0\.01 seconds"):
            await EventStream(events(), [stream], write_timeout=0.01)({"type": "http"}, receive, send)

    asyncio.run(asyncio.wait_for(main(), timeout=60))
    stream.close.assert_called_once()


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
