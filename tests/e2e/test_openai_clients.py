"""Clients of OpenAI's contract, and of both, unmodified, against a real process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from huggingface_hub import AsyncInferenceClient, InferenceClient
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from model import load_checkpoint
from server import BUNDLED_MODEL
from tests.e2e.conftest import Server

TEXT_GENERATION = Path(sys.prefix) / "text-generation" / "bin" / "python"
KEY = "a-key"


@pytest.fixture(scope="module")
def keyed_url(checkpoint: Path) -> Iterator[str]:
    """A server that wants a key, which it has from its environment."""
    with Server("--model", str(checkpoint), AFT_API_KEYS=f"other {KEY}", AFT_SERVED_MODEL_NAME="tiny") as server:
        yield server.url


@pytest.fixture
def client(keyed_url: str) -> Any:  # its overloads want messages and options spelled out as types
    return openai.OpenAI(base_url=f"{keyed_url}/v1", api_key=KEY, max_retries=0)


def test_openai_completions(client: Any) -> None:
    whole = client.completions.create(model="tiny", prompt="The fox", max_tokens=9, temperature=0, logprobs=2)
    choice = whole.choices[0]
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens or []) == 9
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 9
    options = {"include_usage": True}
    with client.completions.create(
        model="tiny", prompt="The fox", max_tokens=9, temperature=0, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == choice.text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_openai_chat(client: Any) -> None:
    messages = [{"role": "user", "content": "The fox"}]
    whole = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, seed=4, n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].logprob < 0
    with client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, seed=4, stream=True
    ) as stream:
        text = "".join(chunk.choices[0].delta.content for chunk in stream)
    assert text == whole.choices[0].message.content


def test_openai_errors(client: Any, keyed_url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature: Input should be less than or equal to 2"):
        client.completions.create(model="tiny", prompt="a", temperature=3)
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4' here"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.AuthenticationError, match="needs an API key"):
        openai.OpenAI(base_url=f"{keyed_url}/v1", api_key="wrong").models.list()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_openai_async_streams_at_once(keyed_url: str) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{keyed_url}/v1", api_key=KEY) as client:

            async def text(i: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt="The fox" + " and" * i, max_tokens=20, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            at_once = await asyncio.gather(*(text(i) for i in range(8)))
            assert list(at_once) == [await text(i) for i in range(8)]

    asyncio.run(main())


def test_langchain(keyed_url: str) -> None:
    base_url, key = f"{keyed_url}/v1", SecretStr(KEY)
    chat = ChatOpenAI(model="tiny", base_url=base_url, api_key=key, max_tokens=9, temperature=0)
    answer = chat.invoke("The fox")
    assert answer.content == "".join(str(chunk.content) for chunk in chat.stream("The fox"))
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 9
    completion = OpenAI(model="tiny", base_url=base_url, api_key=key, max_tokens=9, temperature=0)
    assert completion.invoke("The fox") == "".join(completion.stream("The fox")) == answer.content


def test_huggingface_hub_sync_and_async(keyed_url: str) -> None:
    client: Any = InferenceClient(keyed_url, token=KEY)
    parameters = {"max_new_tokens": 8, "details": True, "decoder_input_details": True, "top_n_tokens": 2}
    details = client.text_generation("The fox", best_of=3, do_sample=True, **parameters)
    assert len(details.details.best_of_sequences) == 2
    assert details.details.prefill[0].logprob is None
    assert details.details.prefill[1].logprob < 0
    assert [len(top) for top in details.details.top_tokens] == [2] * 8
    answer = client.chat_completion([{"role": "user", "content": "The fox"}], max_tokens=8, temperature=0)
    text = answer.choices[0].message.content
    stream = client.chat_completion([{"role": "user", "content": "The fox"}], max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text

    async def main() -> None:
        async with AsyncInferenceClient(keyed_url, token=KEY) as client:
            pieces = [piece async for piece in await client.text_generation("The fox", max_new_tokens=8, stream=True)]
            assert "".join(pieces) == text
            assert await client.text_generation("The fox", max_new_tokens=8) == text

    asyncio.run(main())


@pytest.mark.skipif(not TEXT_GENERATION.exists(), reason=f"needs {TEXT_GENERATION} with the text-generation package")
def test_text_generation(url: str) -> None:
    """It needs an older huggingface_hub, so it has an environment of its own."""
    script = """
import asyncio, json, sys
from text_generation import AsyncClient, Client
url = sys.argv[1]
client = Client(url)
whole = client.generate("The fox", max_new_tokens=8, decoder_input_details=True, top_n_tokens=2)
stream = list(client.generate_stream("The fox", max_new_tokens=8))
chat = client.chat([{"role": "user", "content": "The fox"}], max_tokens=8, temperature=0.0)
best = client.generate("The fox", max_new_tokens=8, do_sample=True, best_of=2, watermark=True)
async def again():
    return (await AsyncClient(url).generate("The fox", max_new_tokens=8)).generated_text
print(json.dumps({
    "whole": whole.generated_text, "tokens": len(whole.details.tokens), "prefill": len(whole.details.prefill),
    "stream": "".join(event.token.text for event in stream), "last": stream[-1].generated_text,
    "chat": chat.choices[0].message.content, "async": asyncio.run(again()), "best": best.generated_text}))
"""
    command = [str(TEXT_GENERATION), "-c", script, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["whole"] == told["stream"] == told["last"] == told["chat"] == told["async"]
    assert told["tokens"] == 8
    assert told["prefill"] >= 2
    assert told["best"]


TASK = """
task: stories
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = [
    ("Once upon a time there was a little", ["girl", "engine"]),
    ("The fox lived in the", ["forest", "seven"]),
    ("One day, Tim and his mom went to the", ["park", "purple"]),
    ("Lily was sad because she lost her", ["favorite toy", "favorite Wednesday"]),
]


def test_lm_eval_scores_as_the_model_does(bundled_url: str, tmp_path: Path) -> None:
    questions = [{"question": text, "choices": choices, "label": 0} for text, choices in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "stories.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    model_args = f"base_url={bundled_url}/v1/completions,model=aft-conv-stories,num_concurrent=4,max_retries=1"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model_args]
    command += ["--tasks", "stories", "--include_path", str(tmp_path), "--log_samples", "--output_path", str(tmp_path)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == len(QUESTIONS)
    model, tokenizer = load_checkpoint(BUNDLED_MODEL)
    for sample in samples:
        for choice, ((told, is_greedy),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            context = tokenizer.encode(sample["doc"]["question"])
            ids = tokenizer.encode(f"{sample['doc']['question']} {choice}")
            assert ids[: len(context)] == context
            with torch.inference_mode():
                scores = model(torch.tensor([ids]))[0][0].log_softmax(-1)
            expected = sum(float(scores[i - 1, ids[i]]) for i in range(len(context), len(ids)))
            assert float(told) == pytest.approx(expected, abs=1e-4)
            greedy = all(int(scores[i - 1].argmax()) == ids[i] for i in range(len(context), len(ids)))
            assert is_greedy == str(greedy)
        assert sample["acc"] == 1.0
