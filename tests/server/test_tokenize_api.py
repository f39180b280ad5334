from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from model import LanguageModel, SentencePieceTokenizer, Tokenizer
from model.sampling import SamplingParams
from model.tokenizer import END_OF_TEXT
from server.api import streaming
from server.api.app import create_app
from server.api.tokenize import placed
from server.engine import EngineConfig, LLMEngine
from server.engine.async_engine import LONG_PROMPT

TEXT = "The fox\u2019s 你 été"


def tokenize(client: TestClient, **body: Any) -> Any:
    response = client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_inputs_give_tokens_with_their_places(client: TestClient, tokenizer: Tokenizer) -> None:
    tokens = tokenize(client, inputs=TEXT)
    assert [token["id"] for token in tokens] == tokenizer.encode_text(TEXT)
    assert tokens[0] == {"id": tokenizer.end_of_text_id, "text": "", "start": 0, "stop": 0}
    for token in tokens:
        if "\ufffd" not in token["text"]:
            assert TEXT[token["start"] : token["stop"]] == token["text"]
    assert tokenize(client, inputs=TEXT, add_special_tokens=False) == tokens[1:]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_places_cover_the_text(text: str) -> None:
    tokenizer = _tokenizer()
    tokens = list(placed(tokenizer.encode(text), tokenizer))
    assert {i for token in tokens for i in range(token["start"], token["stop"])} == set(range(len(text)))
    assert all(token["start"] < token["stop"] for token in tokens)


def _tokenizer(made: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006 - hypothesis cannot take session fixtures
    if not made:
        made.append(SentencePieceTokenizer.train(["The fox and the bird were été friends."] * 9, vocab_size=300))
    return made[0]


def test_a_prompt_gives_ids_and_they_give_it_back(client: TestClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text(TEXT)
    answer = tokenize(client, prompt=TEXT, return_token_strs=True)
    assert answer["token_strs"][0] == END_OF_TEXT
    assert "".join(answer["token_strs"][1:3]).startswith("The\u2581")  # as vLLM tells them: pieces, not texts
    assert {k: v for k, v in answer.items() if k != "token_strs"} == {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": 2**20,
    }
    assert tokenize(client, prompt=TEXT, add_special_tokens=False)["tokens"] == ids[1:]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": TEXT}
    assert tokenize(client, prompt=END_OF_TEXT, add_special_tokens=False)["tokens"] == [tokenizer.end_of_text_id]


def test_messages_go_through_the_template(client: TestClient, tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "A story."}, {"role": "user", "content": "The fox"}]
    assert tokenize(client, messages=messages)["tokens"] == tokenizer.encode_text("A story.\n\nThe fox")


def test_a_chat_as_text_generation_inference_tells_it(client: TestClient, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "The fox"}]
    body = {"messages": messages, "model": "tgi", "max_tokens": 9, "tools": None, "temperature": 0.5}
    answer = client.post("/chat_tokenize", json=body).json()
    assert answer == {
        "templated_text": tokenizer.token_text(tokenizer.end_of_text_id) * tokenizer.starts_texts + "The fox",
        "tokenize_response": tokenize(client, inputs="The fox"),
    }


def test_refusals(client: TestClient) -> None:
    for path, body, sentence in (
        ("/tokenize", {}, "the body must have exactly one of inputs, prompt and messages."),
        ("/tokenize", {"inputs": "a", "prompt": "a"}, "the body must have exactly one of inputs, prompt and messages."),
        ("/tokenize", {"inputs": 5}, "inputs: Input should be a valid string, not 5."),
        ("/tokenize", {"prompt": "a", "other": 1}, "other is not a known parameter."),
        (
            "/tokenize",
            {"prompt": "a" * (2**20 + 1)},
            "The text must have at most 1048576 characters",
        ),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
            'tools is not supported: this server calls none; leave it out, or send null or "" or [] or {}.',
        ),
        ("/detokenize", {"tokens": [5] * (2**20 + 1)}, "tokens: List should have at most 1048576 items after validat"),
        ("/detokenize", {"tokens": [400]}, "Token id 400 is not in 0 .. 399."),
        ("/detokenize", {"tokens": [-1]}, "tokens.0: Input should be greater than or equal to 0, not -1."),
    ):
        response = client.post(path, json=body)
        assert response.status_code == 422
        assert response.json()["error_type"] == "validation"
        assert response.json()["error"].startswith(sentence)


def test_long_answers_come_in_pieces(client: TestClient, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT * 50
    short = tokenize(client, inputs=text), tokenize(client, prompt=text, return_token_strs=True)
    monkeypatch.setattr(streaming, "PIECE", 10)
    response = client.post("/tokenize", json={"inputs": text})
    assert "content-length" not in response.headers
    assert (response.json(), tokenize(client, prompt=text, return_token_strs=True)) == short
    ids = short[1]["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_it_takes_a_place_in_the_queue(network: LanguageModel, tokenizer: Tokenizer) -> None:
    app = create_app(LLMEngine(network, tokenizer, EngineConfig(max_num_seqs=1, max_queue_length=0)))
    with TestClient(app) as client:
        assert client.portal is not None
        occupied = client.portal.call(
            app.state.context.engine.submit, [5], SamplingParams(max_tokens=10**6, ignore_eos=True)
        )
        assert client.post("/tokenize", json={"inputs": "a"}).status_code == 429
        client.portal.call(occupied.close)
        assert client.post("/tokenize", json={"inputs": "a"}).status_code == 200


@pytest.mark.parametrize("path", ["/tokenize", "/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_long_text_to_tokenize_does_not_hold_up_others(path: str, client: TestClient, tokenizer: Tokenizer) -> None:
    """It is tokenised only once another request, sent after it, has been answered."""
    begun, answered, encode = threading.Event(), threading.Event(), tokenizer.encode

    def held_up(text: str) -> list[int]:
        begun.set()
        assert answered.wait(60), "nobody was answered"
        return encode(text)

    text = "x" * (LONG_PROMPT + 1)
    bodies: dict[str, Any] = {
        "/tokenize": {"inputs": text},
        "/generate": {"inputs": text, "parameters": {"max_new_tokens": 1}},
        "/v1/completions": {"prompt": text, "max_tokens": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
    }
    with mock.patch.object(tokenizer, "encode", held_up), ThreadPoolExecutor(1) as pool:
        long = pool.submit(client.post, path, json=bodies[path])
        assert begun.wait(60)
        assert client.get("/health").status_code == 200
        answered.set()
        assert long.result().status_code == 200


def test_tokenizer_info(client: TestClient) -> None:
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == info["bos_token"] == END_OF_TEXT
    assert info["vocab_size"] == 400
    assert "messages" in info["chat_template"]
