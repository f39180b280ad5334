"""OpenAI's contract, against the application in process."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from typing import Any

import httpx2
import pytest
import torch
from fastapi.testclient import TestClient
from openai.types.chat import ChatCompletion

from model import LanguageModel, Tokenizer
from server.api import streaming
from server.api.app import create_app
from server.api.chat_template import ChatTemplate
from server.api.openai import completions
from server.api.openai.protocol import (
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
)
from server.api.openai.serving import token_name
from server.engine import EngineConfig, LLMEngine, SamplingParams

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "The fox"}]


def post(client: TestClient, path: str = COMPLETIONS, **body: Any) -> httpx2.Response:
    response: httpx2.Response = client.post(path, json=body)
    return response


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    response = post(client, **{"prompt": "The fox", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    CompletionResponse.model_validate(content)
    return content


def chat(client: TestClient, **body: Any) -> dict[str, Any]:
    response = post(client, CHAT, **{"messages": MESSAGES, "temperature": 0, "max_tokens": 9, **body})
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    ChatCompletionResponse.model_validate(content)
    return content


def chunks(response: httpx2.Response, kind: type[CompletionResponse] | type[ChatCompletionChunk]) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.isascii()
    *parts, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    found = [json.loads(part.removeprefix("data: ")) for part in parts]
    for chunk in found:
        kind.model_validate(chunk)
    return found


def generated(client: TestClient, **parameters: Any) -> dict[str, Any]:
    """What /generate says of the same."""
    body = {"inputs": "The fox", "parameters": {"details": True, **parameters}}
    content: dict[str, Any] = client.post("/generate", json=body).json()
    return content


def test_a_completion_is_what_generate_gives(client: TestClient, tokenizer: Tokenizer) -> None:
    content = complete(client, max_tokens=12, return_token_ids=True)
    same = generated(client, max_new_tokens=12)
    (choice,) = content["choices"]
    assert choice["text"] == same["generated_text"]
    assert choice["token_ids"] == [token["id"] for token in same["details"]["tokens"]]
    assert choice["prompt_token_ids"] == tokenizer.encode_text("The fox")
    assert choice["finish_reason"] == "length"
    n_prompt = len(tokenizer.encode_text("The fox"))
    usage = content["usage"]
    assert usage.pop("prompt_tokens_details")["cached_tokens"] <= n_prompt
    assert usage == {"prompt_tokens": n_prompt, "completion_tokens": 12, "total_tokens": n_prompt + 12}
    assert content["object"] == "text_completion"
    assert content["id"].startswith("cmpl-")
    assert len(complete(client)["choices"][0]["text"]) > 0


def test_the_default_is_sixteen_tokens_sampled(client: TestClient) -> None:
    texts = set()
    for _ in range(3):
        content = post(client, prompt="The fox", ignore_eos=True).json()
        assert content["usage"]["completion_tokens"] == 16
        texts.add(content["choices"][0]["text"])
    assert len(texts) == 3


def test_prompts_in_all_forms(client: TestClient, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode_text(text) for text in ("The fox", "A bird")]
    several = complete(client, prompt=["The fox", "A bird"], max_tokens=5)["choices"]
    assert [choice["index"] for choice in several] == [0, 1]
    texts = [choice["text"] for choice in several]
    assert [c["text"] for c in complete(client, prompt=ids, max_tokens=5)["choices"]] == texts
    assert complete(client, prompt=ids[0], max_tokens=5)["choices"][0]["text"] == texts[0]
    assert complete(client, prompt=None, max_tokens=5)["usage"]["prompt_tokens"] == 1
    bare = complete(client, prompt="The fox", add_special_tokens=False, max_tokens=1)
    assert bare["usage"]["prompt_tokens"] == len(ids[0]) - 1
    assert complete(client, prompt=ids[0], truncate_prompt_tokens=2, max_tokens=1)["usage"]["prompt_tokens"] == 2


def test_choices_of_several_prompts_are_numbered_through(client: TestClient) -> None:
    body: dict[str, Any] = {"prompt": ["The fox", "A bird"], "n": 3, "temperature": 1.5, "seed": 7, "max_tokens": 6}
    several = complete(client, **body)
    assert [choice["index"] for choice in several["choices"]] == list(range(6))
    second = complete(client, **{**body, "prompt": "A bird"})
    assert [c["text"] for c in several["choices"][3:]] == [c["text"] for c in second["choices"]]
    assert len({choice["text"] for choice in second["choices"]}) == 3
    streamed = chunks(post(client, **body, stream=True), CompletionResponse)
    for whole in several["choices"]:
        pieces = [c for chunk in streamed for c in chunk["choices"] if c["index"] == whole["index"]]
        assert "".join(piece["text"] for piece in pieces) == whole["text"]
        assert [p["finish_reason"] for p in pieces if p["finish_reason"]] == [whole["finish_reason"]]


def test_best_of_returns_the_likelier_texts(client: TestClient) -> None:
    body = {"temperature": 2.0, "seed": 3, "max_tokens": 8, "logprobs": 0}
    everything = complete(client, n=4, **body)["choices"]
    best = complete(client, n=2, best_of=4, **body)

    def mean(choice: dict[str, Any]) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return float(sum(logprobs) / len(logprobs))

    assert [choice["text"] for choice in best["choices"]] == [
        choice["text"] for choice in sorted(everything, key=mean, reverse=True)[:2]
    ]
    assert best["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in everything)


@pytest.mark.parametrize("prompt", ["The fox\u2019s été", [5, 300, 200, 17]])
def test_echo_scores_the_prompt(
    prompt: str | list[int], client: TestClient, network: LanguageModel, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt
    (choice,) = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=0)["choices"]
    assert choice["text"] == tokenizer.decode(ids)
    logprobs = choice["logprobs"]
    expected = network(torch.tensor([ids]))[0][0].log_softmax(-1)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for i in range(1, len(ids)):
        assert logprobs["token_logprobs"][i] == pytest.approx(float(expected[i - 1, ids[i]]), abs=1e-4)
        assert max(logprobs["top_logprobs"][i].values()) == pytest.approx(float(expected[i - 1].max()), abs=1e-4)
        assert logprobs["top_logprobs"][i][logprobs["tokens"][i]] == logprobs["token_logprobs"][i]
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets)
    for i, token_id in enumerate(ids):
        if not logprobs["tokens"][i].startswith("bytes:") and tokenizer.token_bytes[token_id]:
            assert choice["text"].startswith(logprobs["tokens"][i], offsets[i])

    longer = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=3)["choices"][0]
    assert longer["logprobs"]["token_logprobs"][: len(ids)] == pytest.approx(logprobs["token_logprobs"], abs=1e-5)
    assert len(longer["logprobs"]["tokens"]) == len(ids) + 3
    streamed = chunks(
        post(client, prompt=prompt, echo=True, logprobs=2, max_tokens=3, temperature=0, stream=True), CompletionResponse
    )
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == longer["text"]
    for name in ("tokens", "text_offset"):
        assert [x for chunk in streamed for x in chunk["choices"][0]["logprobs"][name]] == longer["logprobs"][name]
    assert complete(client, prompt=prompt, echo=True, max_tokens=0)["choices"][0]["text"] == choice["text"]


def test_stop_strings_and_tokens_are_told(client: TestClient) -> None:
    text = complete(client, max_tokens=30)["choices"][0]["text"]
    stop = text[8:11]
    (choice,) = complete(client, max_tokens=30, stop=stop)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    (kept,) = complete(client, max_tokens=30, stop=["nowhere", stop], include_stop_str_in_output=True)["choices"]
    assert kept["text"] == text[: text.index(stop) + len(stop)]
    first = complete(client, max_tokens=1, return_token_ids=True)["choices"][0]["token_ids"]
    (choice,) = complete(client, max_tokens=30, stop_token_ids=first)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", first[0])


def test_biases_and_allowed_tokens(client: TestClient) -> None:
    (choice,) = complete(client, max_tokens=4, logit_bias={"300": 100}, return_token_ids=True)["choices"]
    assert choice["token_ids"] == [300] * 4
    (choice,) = complete(
        client, max_tokens=9, allowed_token_ids=[301, 302], temperature=1, seed=-5, return_token_ids=True
    )["choices"]
    assert set(choice["token_ids"]) <= {301, 302}


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"structured_outputs": {"regex": "(red|blue) fox"}}, r"(red|blue) fox"),
        ({"structured_outputs": {"choice": ["a.b", "c|d"]}}, r"a\.b|c\|d"),
        ({"structured_outputs": {"json": {"enum": [1, 22]}}}, r"1|22"),
        ({"structured_outputs": {"json": '{"enum": [1, 22]}'}}, r"1|22"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 5}}}}, "5"),
        ({"response_format": {"type": "text"}}, r"(?s).*"),
        # of llama.cpp, Together and Fireworks
        ({"response_format": {"type": "json_object", "schema": {"const": 5}}}, "5"),
        ({"response_format": {"type": "json_schema", "schema": {"const": 5}}}, "5"),
        # of text-generation-inference
        ({"response_format": {"type": "json_object", "value": {"const": 5}}}, "5"),
        ({"response_format": {"type": "json", "value": '{"const": 5}'}}, "5"),
        ({"response_format": {"type": "json_schema", "value": {"name": "n", "schema": {"const": 5}}}}, "5"),
        ({"response_format": {"type": "json_schema", "value": {"const": 5}}}, "5"),
        ({"response_format": {"type": "regex", "value": "(red|blue) fox"}}, "(red|blue) fox"),
        # of sglang and vLLM
        ({"regex": "(red|blue) fox"}, "(red|blue) fox"),
        ({"ebnf": 'root ::= colour " fox"\ncolour ::= "red" | "blue"'}, "(red|blue) fox"),
        ({"structured_outputs": {"grammar": 'start: COLOUR " fox"\nCOLOUR: "red" | "blue"'}}, "(red|blue) fox"),
    ],
)
def test_structured_outputs(form: dict[str, Any], pattern: str, client: TestClient) -> None:
    body = {"temperature": 1.5, "seed": 1, "max_tokens": 60}
    text = complete(client, **body, **form)["choices"][0]["text"]
    assert re.fullmatch(pattern, text)
    message = chat(client, **body, **form)["choices"][0]["message"]
    assert re.fullmatch(pattern, message["content"])


def test_a_grammar_too_costly_to_follow_fails_in_a_sentence(client: TestClient) -> None:
    response = post(client, prompt="a", structured_outputs={"regex": "(a{1000}){1000}"})
    assert response.status_code == 424
    assert response.json()["error"]["message"] == "The grammar failed: lexer error: too many expressions constructed."


def test_a_json_object_may_be_any(client: TestClient) -> None:
    object_of = {"response_format": {"type": "json_object"}, "logit_bias": {}, "max_tokens": 40, "temperature": 1}
    assert complete(client, **object_of)["choices"][0]["text"].startswith("{")


def test_usage_in_streams(client: TestClient) -> None:
    body: dict[str, Any] = {"prompt": "The fox", "temperature": 0, "max_tokens": 5, "stream": True}
    plain = chunks(post(client, **body), CompletionResponse)
    assert all("usage" not in chunk for chunk in plain)
    told = chunks(post(client, **body, stream_options={"include_usage": True}), CompletionResponse)
    assert [chunk["usage"] for chunk in told[:-1]] == [None] * len(plain)
    assert told[-1]["choices"] == []
    assert told[-1]["usage"]["completion_tokens"] == 5
    options = {"include_usage": True, "continuous_usage_stats": True}
    always = chunks(post(client, **body, stream_options=options), CompletionResponse)
    assert always[0]["usage"]["completion_tokens"] >= 1
    assert always[-1]["usage"] == {
        **told[-1]["usage"],
        "prompt_tokens_details": always[-1]["usage"]["prompt_tokens_details"],
    }


def test_a_chat_without_a_template_goes_on_from_the_last_message(client: TestClient) -> None:
    content = chat(client)
    (choice,) = content["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == complete(client, max_tokens=9)["choices"][0]["text"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "The"}, {"type": "text", "text": " fox"}]}]
    assert chat(client, messages=parts)["choices"] == content["choices"]
    two = [{"role": "system", "content": "A story."}, {"role": "user", "content": "The fox", "name": "Ann"}]
    text = chat(client, messages=two, max_completion_tokens=7)["choices"][0]["message"]["content"]
    assert text == complete(client, prompt="A story.\n\nThe fox", max_tokens=7)["choices"][0]["text"]


def test_a_chat_streams(client: TestClient) -> None:
    body = {"messages": MESSAGES, "temperature": 1.2, "seed": 9, "max_tokens": 9, "n": 2, "logprobs": True}
    body |= {"top_logprobs": 3}
    whole = chat(client, **body)["choices"]
    streamed = chunks(post(client, CHAT, **body, stream=True), ChatCompletionChunk)
    for choice in whole:
        pieces = [c for chunk in streamed for c in chunk["choices"] if c["index"] == choice["index"]]
        assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"]["content"] for piece in pieces) == choice["message"]["content"]
        told = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        assert [entry["token"] for entry in told] == [entry["token"] for entry in choice["logprobs"]["content"]]
        assert all(len(entry["top_logprobs"]) == 3 for entry in told)
        said = b"".join(bytes(entry["bytes"]) for entry in told)
        assert said.decode(errors="replace") == choice["message"]["content"]


def test_explicit_nulls_are_defaults(client: TestClient) -> None:
    for model, path, needed in (
        (CompletionRequest, COMPLETIONS, {"prompt": "The fox"}),
        (ChatCompletionRequest, CHAT, {"messages": MESSAGES}),
    ):
        nulls = dict.fromkeys(model.model_fields)
        response = post(client, path, **{**nulls, **needed, "max_tokens": 2})
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", ["aft", "dummy", "tgi", "", None, "http://127.0.0.1:8000"])
def test_models_known_by_name(name: str | None, client: TestClient) -> None:
    assert complete(client, model=name, max_tokens=1)["model"] == "aft"


def test_an_answer_can_be_sent_back_as_openai_dumps_it(client: TestClient) -> None:
    answer = ChatCompletion.model_validate(chat(client)).choices[0].message.model_dump()
    assert chat(client, messages=[*MESSAGES, answer, *MESSAGES])["choices"]


def test_prompt_ids_in_streams(client: TestClient, tokenizer: Tokenizer) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True, "return_token_ids": True}
    first, *others = chunks(post(client, CHAT, **body), ChatCompletionChunk)
    assert first["prompt_token_ids"] == tokenizer.encode_text("The fox")
    assert not any("prompt_token_ids" in chunk for chunk in others)


def test_what_is_not_json_has_no_field(client: TestClient) -> None:
    response = client.post(COMPLETIONS, content=b'{"prompt"', headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] is None


def test_models(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == card["root"] == "aft"
    assert card["max_model_len"] == 2**20
    assert client.get("/v1/models/aft").json() == card
    for missing in (client.get("/v1/models/gpt"), post(client, prompt="a", model="gpt")):
        assert missing.status_code == 404
        error = missing.json()["error"]
        assert error["message"] == "There is no model 'gpt' here, only 'aft'."
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": 5}, "prompt: prompt must be a text, a list of texts"),
        ({"prompt": []}, "prompt: prompt must be a text"),
        ({"prompt": ["a", 5]}, "prompt: prompt must be a text"),
        ({"prompt": [True]}, "prompt: prompt must be a text"),
        ({"prompt": [-1]}, "prompt: prompt must be a text"),
        ({"prompt": "a", "structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex cannot be followed"),
        ({"prompt": [[]]}, "The prompt must have at least one token."),
        ({"prompt": [400]}, "The prompt must be of token ids from 0 to 399."),
        ({"prompt": ["a"] * 129}, "prompt must hold at most 128 texts, not 129."),
        ({"prompt": "a", "temperature": 2.1}, "temperature: Input should be less than or equal to 2, not 2.1."),
        ({"prompt": "a", "n": 33}, "n and best_of must be at most 32"),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of must be at least n."),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of above n is not possible in a stream."),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options needs stream to be true."),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 'logit_bias: "x" is not a token id.'),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias: the bias of token 5 must be a number from -100"),
        ({"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(2**16 + 1)), 1)}, "logit_bias: there must be at"),
        ({"prompt": "a", "logit_bias": {"400": 1}}, "logit_bias must hold token ids from 0 to 399, not 400."),
        ({"prompt": "a", "max_tokens": 2**20}, "This model's maximum context length is 1048576 tokens, but"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens must be from 0 to max_tokens = 16, not 17."),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported: this server continues texts only; leave it out, or"),
        ({"prompt": "a", "guided_regex": "b"}, "guided_regex is not a known parameter."),
        ({"prompt": "a", "stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        ({"prompt": "a", "stop": ""}, "stop.0: String should have at least 1 character"),
        ({"prompt": "a", "structured_outputs": {}}, "structured_outputs: structured_outputs must have exactly one"),
        (
            {"prompt": "a", "regex": "a", "response_format": {"type": "json_object"}},
            "response_format, structured_outputs, regex and ebnf exclude each other.",
        ),
        (
            {"prompt": "a", "response_format": {"type": "json_schema"}},
            "response_format.json_schema: response_format must have exactly one of json_schema, schema and value.",
        ),
        (
            {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.json_schema.schema: Field required",
        ),
        *(
            ({"prompt": "a", **form}, f"{field} cannot be followed: it has no word that constrains anything")
            for form, field in (
                (
                    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}},
                    "response_format.json_schema.schema",
                ),
                ({"response_format": {"type": "json_object", "schema": {"a": {}}}}, "response_format.schema"),
                ({"response_format": {"type": "json", "value": {"a": {}}}}, "response_format.value"),
                ({"response_format": {"type": "json", "value": {"schema": {}}}}, "response_format.value.schema"),
                ({"structured_outputs": {"json": {"name": "n", "schema": {}}}}, "structured_outputs.json"),
            )
        ),
        ({"prompt": "a", "regex": "("}, "regex cannot be followed: unclosed group."),
        ({"prompt": "a", "ebnf": "("}, "ebnf cannot be followed: "),
        ({"prompt": "a", "structured_outputs": {"grammar": "("}}, "structured_outputs.grammar cannot be followed: "),
        ({"prompt": "a", "response_format": {"type": "yaml"}}, "response_format: Input tag 'yaml'"),
        ({"prompt": "\ud800"}, "Text holds a lone surrogate at character 0."),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages.0.role: String should have at least 1 character"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages.0.tool_calls are not supported: this server calls none.",
        ),
        (
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message and add_generation_prompt exclude each other.",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content: content must be"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools is not supported: this server calls none;"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice is not supported: this server calls none;"),
        ({"messages": MESSAGES, "max_new_tokens": 5}, "max_new_tokens is not a known parameter; did you mean max_"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs needs logprobs to be true."),
    ],
)
def test_bad_bodies_are_refused_with_the_field_named(body: dict[str, Any], sentence: str, client: TestClient) -> None:
    response = client.post(
        CHAT if "messages" in body else COMPLETIONS,
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(sentence), error["message"]


def test_nothing_stays_when_one_of_several_prompts_is_refused(client: TestClient) -> None:
    engine = client.app.state.context.engine  # type: ignore[attr-defined]
    response = post(client, prompt=[[5], [400]], max_tokens=10**5)
    assert response.status_code == 400
    assert engine.num_requests == 0


def test_what_is_refused_at_the_door_costs_no_work(
    network: LanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(LLMEngine(network, tokenizer, EngineConfig(max_num_seqs=1, max_queue_length=1)))
    context = app.state.context

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    with TestClient(app, raise_server_exceptions=False) as client:
        session = client.post("/sessions").json()["session_id"]
        assert client.portal is not None
        occupied = [
            client.portal.call(context.engine.submit, [5], SamplingParams(max_tokens=10**6, ignore_eos=True))
            for _ in range(2)
        ]
        chats: dict[str, Any] = {"messages": MESSAGES}
        with monkeypatch.context() as patched:
            patched.setattr(context.chat_template, "render", work)
            patched.setattr(context.sessions.store, "load", work)
            patched.setattr(tokenizer, "encode", work)
            for path, body in (
                (CHAT, chats),
                (CHAT, {**chats, "session_id": session}),
                (COMPLETIONS, {"prompt": "The fox"}),
                (COMPLETIONS, {"prompt": "The fox", "session_id": session}),
                ("/generate", {"inputs": "The fox", "session_id": session}),
            ):
                assert post(client, path, **body).status_code == 429
            assert post(client, CHAT, **chats, model="another").status_code == 404
            occupied.pop().close()
            two = post(client, prompt=["a", "b"])  # all or none
            assert two.status_code == 429
            assert post(client, prompt=["a", "b", "c"]).json()["error"]["message"].startswith("There must be at most 2")
        occupied.pop().close()
        assert post(client, CHAT, **chats, session_id=session, max_tokens=2).status_code == 200


def test_what_fails_before_it_is_queued_leaves_its_place(network: LanguageModel, tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}a")
    app = create_app(
        LLMEngine(network, tokenizer, EngineConfig(max_num_seqs=1, max_queue_length=0)), chat_template=template
    )
    with TestClient(app, raise_server_exceptions=False) as client:
        for messages, status in ((MESSAGES * 2, 400), (MESSAGES, 200)):
            assert post(client, CHAT, messages=messages, max_tokens=2).status_code == status
        assert post(client, CHAT, messages=MESSAGES, session_id="0" * 32).status_code == 404
        assert post(client, CHAT, messages=MESSAGES, max_tokens=2).status_code == 200


def test_the_time_to_the_first_token_includes_the_template(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    template = client.app.state.context.chat_template  # type: ignore[attr-defined]
    render = template.render

    def slowly(*given: Any, **options: Any) -> Any:
        assert threading.current_thread().name.startswith("server.api.template_renderer"), "takes threads of others"
        time.sleep(0.05)
        return render(*given, **options)

    monkeypatch.setattr(template, "render", slowly)
    chat(client)
    (line,) = (vars(record) for record in caplog.records if record.message == "request")
    assert line["time_to_first_token"] >= line["queue_seconds"] >= 0.05


def test_a_request_id_comes_back(client: TestClient) -> None:
    response = post(client, prompt="The fox", max_tokens=1, request_id="mine-1")
    assert response.json()["id"] == "cmpl-mine-1"
    assert response.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize(
    ("path", "prompt", "field"),
    [(COMPLETIONS, {"prompt": "The fox"}, "prompt"), (CHAT, {"messages": MESSAGES}, "messages")],
)
def test_a_prompt_that_is_too_long_is_known_as_such(
    path: str, prompt: dict[str, Any], field: str, client: TestClient
) -> None:
    """litellm looks for the words, others for the code."""
    response = post(client, path, **prompt, max_tokens=2**20)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == field
    assert "this model's maximum context length is" in error["message"].lower()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a", "stream_options": {}}, "stream_options"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "a", "n": 33}, "n"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "a", "nonsense": 1}, "nonsense"),
        ({"prompt": "a", "stop": [5]}, "stop.0"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": MESSAGES, "tools": [{}]}, "tools"),
        ({"messages": []}, "messages"),
    ],
)
def test_errors_tell_their_field(body: dict[str, Any], field: str, client: TestClient) -> None:
    response = post(client, CHAT if "messages" in body else COMPLETIONS, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


EMPTY_VALUES = {"functions": [], "web_search_options": {}, "audio": {}, "prediction": {}, "reasoning_effort": ""}
EMPTY_VALUES |= {"verbosity": "", "function_call": "", "tool_choice": "", "tools": [], "modalities": []}
# What vLLM's own clients send of its fields, and text-generation, litellm's proxy and llama.cpp's page of theirs.
DEFAULTS: dict[str, Any] = {"use_beam_search": False, "skip_special_tokens": True, "length_penalty": 1.0}
DEFAULTS |= {"spaces_between_special_tokens": True, "prompt_logprobs": None, "bad_words": [], "max_retries": 2}
DEFAULTS |= {"cache_prompt": True, "dry_multiplier": 0.0, "no_stop_trim": False, "user": "me", "metadata": {"a": "b"}}
CHAT_DEFAULTS: dict[str, Any] = {"tool_prompt": None, "echo": False, "add_generation_prompt": True, "documents": None}
CHAT_DEFAULTS |= {"continue_final_message": False, "add_special_tokens": False, "chat_template_kwargs": None}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "The fox", **DEFAULTS, "suffix": "", "whatever_comes": None}),
        (CHAT, {"messages": MESSAGES, **DEFAULTS, **CHAT_DEFAULTS, **EMPTY_VALUES, "whatever_comes": None}),
        (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}], "tool_choice": "none"}),
        (CHAT, {"messages": MESSAGES, "functions": [{"name": "f"}], "function_call": "none"}),
    ],
)
def test_fields_of_peers_that_ask_for_nothing_are_taken(path: str, body: dict[str, Any], client: TestClient) -> None:
    response = post(client, path, **body, max_tokens=1)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", ["skip_special_tokens", "cache_prompt", "use_beam_search", "echo"])
def test_fields_of_peers_that_ask_for_something_are_refused(name: str, client: TestClient) -> None:
    response = post(client, CHAT, messages=MESSAGES, **{name: not {**DEFAULTS, **CHAT_DEFAULTS}[name]})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"{name} is not supported: this server has no such thing")


def test_a_chat_goes_on_from_its_last_message(network: LanguageModel, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}({{ m.mood }}): {{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    said = [{"role": "narrator", "content": "A story.", "mood": "calm"}, {"role": "assistant", "content": " The fox "}]
    with TestClient(create_app(LLMEngine(network, tokenizer), chat_template=template)) as client:

        def prompt(**options: Any) -> str:
            answer = chat(client, messages=said, return_token_ids=True, **options)
            ids = client.post("/tokenize", json={"messages": said, **options}).json()["tokens"]
            assert ids == answer["prompt_token_ids"]
            return tokenizer.decode(ids)

        whole = "narrator(calm): A story.\nassistant(): The fox\n"
        assert prompt() == f"{whole}assistant: "
        assert prompt(add_generation_prompt=False) == whole
        assert prompt(continue_final_message=True) == whole.rstrip()
        assert prompt(continue_final_message=True, add_generation_prompt=False) == whole.rstrip()
    silent = ChatTemplate("{{ messages[0].content }}")
    with TestClient(create_app(LLMEngine(network, tokenizer), chat_template=silent)) as client:
        refused = post(client, CHAT, messages=said, continue_final_message=True)
        assert refused.json()["error"]["message"].startswith("continue_final_message: the model's chat template does")


def test_keys_of_ids_are_there_also_if_they_were_not_asked_for(client: TestClient) -> None:
    assert complete(client, max_tokens=1)["choices"][0]["token_ids"] is None
    assert complete(client, max_tokens=1)["choices"][0]["prompt_token_ids"] is None
    assert chat(client)["choices"][0]["token_ids"] is None
    assert chat(client)["prompt_token_ids"] is None


@pytest.mark.parametrize("stream", [False, True])
def test_long_answers_are_put_together_in_threads(
    stream: bool, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they say is what short ones say, and the event loop has no part in it."""
    monkeypatch.setattr(streaming, "PIECE", 100)
    body: dict[str, Any] = {"prompt": "The fox", "echo": True, "logprobs": 3, "max_tokens": 9, "stream": stream}
    body["return_token_ids"] = True

    def texts() -> list[Any]:
        if not stream:
            return [choice | {"text": choice["text"]} for choice in complete(client, **body)["choices"]]
        return [chunk["choices"] for chunk in chunks(post(client, temperature=0, **body), CompletionResponse)]

    short = texts()
    named: list[bool] = []

    def named_in(*given: Any) -> str:
        named.append(threading.current_thread() is loop_thread)
        return token_name(*given)

    assert client.portal is not None
    loop_thread = client.portal.call(threading.current_thread)
    monkeypatch.setattr(completions, "token_name", named_in)
    monkeypatch.setattr(streaming, "LARGE_ANSWER", 0)
    assert texts() == short
    assert named
    assert not (named[0] if stream else any(named))


def test_what_text_generations_client_sends(client: TestClient) -> None:
    """Its `chat` of text-generation-inference's main branch: every field it knows, most of them null."""
    message = {"role": "user", "content": "The fox", "name": None, "tool_calls": None}
    nulls = ["repetition_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "n", "seed", "tools"]
    nulls += ["presence_penalty", "temperature", "top_p", "tool_prompt", "tool_choice", "stop", "response_format"]
    body = {"model": "tgi", "messages": [message], "max_tokens": 4, "stream": False, **dict.fromkeys(nulls)}
    assert post(client, CHAT, **body).json()["usage"]["completion_tokens"] <= 4
    assert chunks(post(client, CHAT, **{**body, "stream": True}), ChatCompletionChunk)
