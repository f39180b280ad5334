"""The HTTP contract, against the application in process."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import ValidationError

from model import LanguageModel, Tokenizer
from model.generate import generate
from model.sampling import SamplingParams
from model.sampling.watermark import z_score
from server.api.app import create_app
from server.api.tgi.protocol import GenerateParameters, GenerateRequest, StreamEvent
from server.api.validation import validation_sentence
from server.engine import EngineConfig, LLMEngine


def post(client: TestClient, path: str = "/generate", **body: Any) -> httpx2.Response:
    response: httpx2.Response = client.post(path, json=body)
    return response


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.text.isascii()
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data:{") for part in parts)
    return [json.loads(part.removeprefix("data:")) for part in parts]


def greedy_ids(model: LanguageModel, tokenizer: Tokenizer, text: str, n: int) -> list[int]:
    prompt_ids = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    return list(generate(model, prompt_ids, SamplingParams(temperature=0, max_tokens=n), tokenizer))


def test_greedy_text_is_the_models(client: TestClient, network: LanguageModel, tokenizer: Tokenizer) -> None:
    response = post(client, inputs="The fox", parameters={"max_new_tokens": 12})
    assert response.status_code == 200
    expected = tokenizer.decode(greedy_ids(network, tokenizer, "The fox", 12))
    assert response.json() == {"generated_text": expected}


def test_details(client: TestClient, network: LanguageModel, tokenizer: Tokenizer) -> None:
    body = post(client, inputs="The fox", parameters={"max_new_tokens": 12, "details": True}).json()
    details = body["details"]
    assert {key: details[key] for key in details if key != "tokens"} == {
        "finish_reason": "length",
        "generated_tokens": 12,
        "seed": None,
        "cached_tokens": details["cached_tokens"],
        "prefill": [],
        "top_tokens": None,
        "best_of_sequences": None,
    }
    assert [token["id"] for token in details["tokens"]] == greedy_ids(network, tokenizer, "The fox", 12)
    assert "".join(token["text"] for token in details["tokens"]) == body["generated_text"]
    assert all(token["logprob"] < 0 and token["special"] is False for token in details["tokens"])


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_stream(path: str, client: TestClient) -> None:
    parameters = {"max_new_tokens": 9, "details": True, "temperature": 0.7, "seed": 3}
    whole = post(client, inputs="The fox", parameters=parameters).json()
    response = post(client, path, inputs="The fox", parameters=parameters, stream=True)
    stream = events(response)
    assert [event["index"] for event in stream] == list(range(1, 10))
    assert [event["token"] for event in stream] == whole["details"]["tokens"]
    assert all(event["generated_text"] is None and event["details"] is None for event in stream[:-1])
    assert stream[-1]["generated_text"] == whole["generated_text"]
    details = stream[-1]["details"]
    assert details.pop("input_length") == details.pop("cached_tokens") > 2  # the same inputs were read just before
    assert details == {"finish_reason": "length", "generated_tokens": 9, "seed": 3}


def test_stream_without_details(client: TestClient) -> None:
    last = events(post(client, inputs="The fox", parameters={"max_new_tokens": 3}, stream=True))[-1]
    assert last["details"] is None
    assert last["generated_text"] is not None


def test_root_answers_a_list(client: TestClient) -> None:
    parameters = {"max_new_tokens": 3}
    whole = post(client, inputs="The fox", parameters=parameters).json()
    assert post(client, "/", inputs="The fox", parameters=parameters).json() == [whole]


def test_explicit_nulls_are_defaults(client: TestClient) -> None:
    nulls = dict.fromkeys(GenerateParameters.model_fields)
    response = post(client, inputs="The fox", parameters={**nulls, "max_new_tokens": 5}, stream=None)
    assert response.json() == post(client, inputs="The fox", parameters={"max_new_tokens": 5}).json()


def test_defaults_that_clients_send_are_accepted(client: TestClient) -> None:
    parameters = {"best_of": 1, "repetition_penalty": 1.0, "watermark": False, "decoder_input_details": False}
    assert post(client, inputs="The fox", parameters={**parameters, "max_new_tokens": 2}).status_code == 200


def seed_of(response: httpx2.Response) -> Any:
    return response.json()["details"]["seed"]


@pytest.mark.parametrize("parameters", [{"do_sample": True}, {"temperature": 0.9}, {"top_k": 5}, {"top_p": 0.5}])
def test_sampling_is_asked_for_by_any_of_its_parameters(parameters: dict[str, Any], client: TestClient) -> None:
    """The seed that was drawn is told, and gives the same text again."""
    parameters = {**parameters, "max_new_tokens": 20, "details": True}
    post(client, inputs="The fox")  # how much of the prompt was cached is told, too
    first = post(client, inputs="The fox", parameters=parameters)
    assert isinstance(seed_of(first), int)
    again = post(client, inputs="The fox", parameters={**parameters, "seed": seed_of(first)})
    assert again.json() == first.json()


def test_without_parameters_it_samples(client: TestClient) -> None:
    texts = {post(client, inputs="The fox").json()["generated_text"] for _ in range(8)}
    assert len(texts) > 1  # two may be alike by chance: empty ones, say


def test_a_seed_alone_does_not_ask_for_sampling(client: TestClient) -> None:
    parameters = {"max_new_tokens": 5, "details": True}
    assert seed_of(post(client, inputs="The fox", parameters={**parameters, "seed": 1})) is None


def test_stop_full_text_and_truncate(client: TestClient) -> None:
    text = post(client, inputs="The fox", parameters={"max_new_tokens": 30}).json()["generated_text"]
    stop = text[8:11]
    parameters = {"max_new_tokens": 30, "stop": [stop], "return_full_text": True, "details": True}
    body = post(client, inputs="The fox", parameters=parameters).json()
    assert body["generated_text"] == "The fox" + text[: text.index(stop)]
    assert body["details"]["finish_reason"] == "stop_sequence"

    truncated = post(client, inputs="A house by the fox", parameters={"max_new_tokens": 9, "truncate": 2})
    assert truncated.json() == post(client, inputs=" fox", parameters={"max_new_tokens": 9}).json()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "inputs: Field required"),
        ({"inputs": ""}, "inputs must not be empty"),
        ({"inputs": 3}, "inputs: Input should be a valid string, not 3."),
        ({"inputs": "a", "input": "b"}, "input is not a known parameter."),
        ({"input": "a"}, "input is not a known parameter; did you mean inputs?"),
        (
            {"inputs": "a", "parameters": {"max_tokens": 3}},
            "parameters.max_tokens is not a known parameter; did you mean max_new_tokens?",
        ),
        ({"inputs": "a", "parameters": {"temperature": 0}}, "parameters.temperature: Input should be greater than 0"),
        ({"inputs": "a", "parameters": {"top_p": 1.0}}, "parameters.top_p: Input should be less than 1"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, "parameters.top_k: Input should be greater than or equal to 1"),
        ({"inputs": "a", "parameters": {"top_k": 1.5}}, "parameters.top_k: Input should be a valid integer, not 1.5."),
        ({"inputs": "a", "parameters": {"max_new_tokens": True}}, "parameters.max_new_tokens: Input should be"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0}}, "parameters.max_new_tokens: Input should be"),
        ({"inputs": "a", "parameters": {"seed": -1}}, "parameters.seed: Input should be greater than or equal to 0"),
        ({"inputs": "a", "parameters": {"seed": 2**64}}, "parameters.seed: Input should be less than"),
        ({"inputs": "a", "parameters": {"stop": ["x"] * 17}}, "parameters.stop: List should have at most 16"),
        ({"inputs": "a", "parameters": {"stop": [""]}}, "parameters.stop.0: String should have at least 1"),
        ({"inputs": "a", "parameters": {"best_of": 2}}, "parameters: best_of above 1 needs sampling: set do_sample."),
        (
            {"inputs": "a", "parameters": {"adapter_id": "x"}},
            "parameters.adapter_id is not supported: this server has no adapters; leave it out, or send null.",
        ),
        ({"inputs": "a", "parameters": {"typical_p": 1.0}}, "parameters.typical_p: Input should be less than 1"),
        ({"inputs": "a", "parameters": {"repetition_penalty": 0}}, "parameters.repetition_penalty: Input should be"),
        ({"inputs": "a", "parameters": {"frequency_penalty": 2.5}}, "parameters.frequency_penalty: Input should be"),
        ({"inputs": "a", "parameters": {"grammar": {"type": "regex"}}}, "parameters.grammar.value: Field required"),
        (
            {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": {}}}},
            "parameters.grammar: grammar.value must be a string",
        ),
        (
            {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "("}}},
            "parameters.grammar.value cannot be followed: unclosed group.",
        ),
        (
            {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": "{"}}},
            "parameters.grammar.value cannot be followed: Expecting property name",
        ),
        ({"inputs": "a", "parameters": {"best_of": 2, "seed": 1}}, "parameters: best_of above 1 and seed exclude"),
        (
            {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": {"type": "poem"}}}},
            "parameters.grammar.value cannot be followed: Invalid type: poem.",
        ),
    ],
)
def test_bad_bodies_are_refused_with_the_field_named(body: dict[str, Any], sentence: str, client: TestClient) -> None:
    for path in ("/generate", "/generate_stream", "/"):
        response = client.post(path, json=body)
        assert response.status_code == 422
        assert response.json()["error_type"] == "validation"
        assert response.json()["error"].startswith(sentence)


@pytest.mark.parametrize("parameters", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}])
def test_what_needs_the_whole_text_is_refused_in_streams(parameters: dict[str, Any], client: TestClient) -> None:
    for path, stream in (("/generate", True), ("/generate_stream", None), ("/", True)):
        response = post(client, path, inputs="a", parameters=parameters, stream=stream)
        assert response.status_code == 422
        assert "is not possible in a stream" in response.json()["error"]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe"),
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "\xff"}',
        b'{"inputs": "a", "parameters": {"top_p": NaN}}',
    ],
)
def test_malformed_bodies_are_refused(content: bytes, client: TestClient) -> None:
    response = client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422, response.text
    assert response.json()["error_type"] == "validation"
    assert response.json()["error"].endswith(".")


def test_unknown_paths_and_methods_answer_in_the_same_shape(client: TestClient) -> None:
    for response, status in ((client.get("/nowhere"), 404), (client.get("/generate"), 405)):
        assert response.status_code == status
        assert set(response.json()) == {"error", "error_type"}


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"type": "regex", "value": "(red|blue) fox(, [a-z]{3})*"}, r"(red|blue) fox(, [a-z]{3})*"),
        ({"type": "json", "value": {"type": "array", "items": {"enum": ["é", 2]}, "maxItems": 3}}, r"\[.*\]"),
        # as text-generation-inference's guide has it, without a type, and its form for json_schema
        ({"type": "json", "value": {"properties": {"a": {"enum": [2]}}, "required": ["a"]}}, r'\{"a": 2\}'),
        ({"type": "json_schema", "value": {"name": "x", "schema": {"enum": ["é", 2]}}}, r'"é"|2'),
        ({"type": "json_schema", "value": {"enum": ["é", 2]}}, r'"é"|2'),
    ],
)
def test_grammar(grammar: dict[str, Any], pattern: str, client: TestClient) -> None:
    parameters = {"max_new_tokens": 200, "grammar": grammar, "temperature": 2.0, "seed": 4, "details": True}
    body = post(client, inputs="The fox", parameters=parameters).json()
    assert body["details"]["finish_reason"] == "eos_token"
    assert re.fullmatch(pattern, body["generated_text"])
    if "items" in grammar["value"]:
        assert set(json.loads(body["generated_text"])) <= {"é", 2}


def test_top_tokens_are_told(client: TestClient, tokenizer: Tokenizer) -> None:
    parameters = {"max_new_tokens": 5, "details": True, "top_n_tokens": 3}
    body = post(client, inputs="The fox", parameters=parameters).json()
    stream = events(post(client, inputs="The fox", parameters=parameters, stream=True))
    for token, top, event in zip(body["details"]["tokens"], body["details"]["top_tokens"], stream, strict=True):
        assert len(top) == 3
        assert (top[0]["id"], top[0]["logprob"]) == (token["id"], token["logprob"])  # greedy
        assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)
        assert event["top_tokens"] == top
        StreamEvent.model_validate(event)
        assert all(t["text"] == tokenizer.token_text(t["id"]) for t in top)


def test_the_inputs_tokens_are_told(client: TestClient, network: LanguageModel, tokenizer: Tokenizer) -> None:
    parameters = {"max_new_tokens": 1, "details": True, "decoder_input_details": True}
    prefill = post(client, inputs="The fox", parameters=parameters).json()["details"]["prefill"]
    ids = tokenizer.encode_text("The fox")
    assert [token["id"] for token in prefill] == ids
    scores = network(torch.tensor([ids]))[0][0].log_softmax(-1)
    assert prefill[0]["logprob"] is None
    for i in range(1, len(ids)):
        assert prefill[i]["logprob"] == pytest.approx(float(scores[i - 1, ids[i]]), abs=1e-5)


def test_the_best_of_several_texts_is_returned_and_the_others_told(client: TestClient) -> None:
    parameters = {"max_new_tokens": 8, "details": True, "do_sample": True, "best_of": 4, "return_full_text": True}
    body = post(client, inputs="The fox", parameters=parameters).json()
    details = body["details"]
    others = details["best_of_sequences"]

    def mean(sequence: dict[str, Any]) -> float:
        return float(sum(token["logprob"] for token in sequence["tokens"]) / sequence["generated_tokens"])

    assert len(others) == 3
    assert mean(details) >= max(map(mean, others))
    assert all(text.startswith("The fox") for text in (body["generated_text"], *(o["generated_text"] for o in others)))
    again = {"max_new_tokens": 8, "do_sample": True, "return_full_text": True, "seed": details["seed"]}
    assert post(client, inputs="The fox", parameters=again).json()["generated_text"] == body["generated_text"]


def test_a_watermark_can_be_found(client: TestClient) -> None:
    parameters = {"max_new_tokens": 200, "details": True, "do_sample": True, "seed": 2}
    scores = []
    for watermark in (False, True):
        body = post(client, inputs="The fox", parameters={**parameters, "watermark": watermark}).json()
        scores.append(z_score([token["id"] for token in body["details"]["tokens"]], 400))
    assert scores[0] < 3
    assert scores[1] > 4


def test_info(client: TestClient) -> None:
    info = client.get("/info").json()
    assert info["model_id"] == "aft"
    assert info["max_total_tokens"] == 2**20
    assert info["validation_workers"] >= 1
    assert info["sha"] is info["docker_label"] is None
    assert info["max_best_of"] == 32
    assert info["state_bytes"] == client.app.state.context.engine._engine.pool.nbytes / 32  # type: ignore[attr-defined]
    assert info["max_concurrent_requests"] == client.app.state.context.engine.info.capacity == 32 + 256  # type: ignore[attr-defined]


def test_health(client: TestClient) -> None:
    for path in ("/health", "/ping"):
        assert client.get(path).status_code == 200


def test_sagemaker_finds_its_route(client: TestClient) -> None:
    body = {"inputs": "The fox", "parameters": {"max_new_tokens": 3}}
    assert post(client, "/invocations", **body).json() == post(client, "/", **body).json()


def test_a_path_that_is_nearly_one_names_it(client: TestClient) -> None:
    answer = post(client, "/chat/completions", messages=[])
    assert (answer.status_code, answer.json()["error"]) == (404, "Not Found; did you mean /v1/chat/completions?")
    assert client.get("/nowhere").json()["error"] == "Not Found."


def test_a_full_queue_answers_429_with_retry_after(network: LanguageModel, tokenizer: Tokenizer) -> None:
    app = create_app(LLMEngine(network, tokenizer, EngineConfig(max_num_seqs=1, max_queue_length=0)))
    with TestClient(app) as client:
        assert post(client, inputs="The fox").status_code == 200
        assert client.portal is not None
        occupied = client.portal.call(
            app.state.context.engine.submit, "The fox", SamplingParams(max_tokens=10**6, ignore_eos=True)
        )
        for stream in (False, True):
            response = post(client, inputs="The fox", stream=stream)
            assert response.status_code == 429
            assert response.json()["error_type"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1
        occupied.close()
        assert post(client, inputs="The fox").status_code == 200


def test_fields_of_peers_that_ask_for_nothing_are_taken(client: TestClient) -> None:
    parameters = {"num_beams": 1, "num_return_sequences": 1, "adapter_id": None, "unheard_of": None}
    body: dict[str, Any] = {
        "options": {"use_cache": False},
        "max_retries": 2,
        "whatever": None,
        "parameters": parameters,
    }
    assert post(client, inputs="The fox", **body).status_code == 200
    refused = post(client, inputs="The fox", parameters={"num_beams": 4}).json()["error"]
    assert refused.startswith("parameters.num_beams is not supported: this server has no such thing; leave it out, or")


def test_a_length_can_be_asked_for_whatever_the_model_says(client: TestClient, tokenizer: Tokenizer) -> None:
    """vLLM's benchmark of servers with this contract does."""
    parameters = {
        "max_new_tokens": 30,
        "details": True,
        "ignore_eos_token": True,
        "temperature": 3.0,
        "do_sample": True,
    }
    for seed in range(5):
        details = post(client, inputs="The fox", parameters={**parameters, "seed": seed}).json()["details"]
        assert (details["finish_reason"], details["generated_tokens"]) == ("length", 30)


@pytest.mark.parametrize(
    "body",
    [
        {str(i): 0 for i in range(100_000)},
        {"inputs": "a", "parameters": {str(i): 0 for i in range(100_000)}},
        {"inputs": "a", "parameters": {"stop": [0] * 100_000}},
        {"inputs": {str(i): 0 for i in range(100_000)}},
    ],
)
def test_validation_ends_at_the_first_error(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        GenerateRequest.model_validate(body)
    assert raised.value.error_count() == 1
    assert len(validation_sentence(raised.value.errors())) < 200
