"""Clients that are made for other servers, unmodified, where they are installed: `make clients` does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Server

CLIENTS = Path(sys.prefix) / "clients"
PYTHON, NODE = CLIENTS / "bin" / "python", shutil.which("node")
INFERENCE = CLIENTS / "node_modules" / "@huggingface" / "inference"

needs_python = pytest.mark.skipif(not PYTHON.exists(), reason=f"needs {PYTHON} with instructor and litellm")


def run(*command: str | Path) -> Any:
    """What the program prints last, as JSON."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def short_url(checkpoint: Path) -> Iterator[str]:
    """A server that reads 64 tokens at most."""
    with Server("--model", str(checkpoint), "--max-model-len", "64") as server:
        yield server.url


@needs_python
def test_litellm_goes_on_with_another_model_when_a_prompt_is_too_long(url: str, short_url: str) -> None:
    script = """
import json, sys
import litellm
long = [{"role": "user", "content": "fox " * 100}]
def model(name, url):
    return {"model_name": name, "litellm_params": {"model": "openai/dummy", "api_base": url + "/v1", "api_key": "none"}}
for name in ("openai/dummy", "hosted_vllm/dummy"):
    try:
        litellm.completion(name, long, api_base=sys.argv[2] + "/v1", api_key="none")
    except litellm.ContextWindowExceededError as error:
        told = str(error)
router = litellm.Router(
    model_list=[model("short", sys.argv[2]), model("long", sys.argv[1])],
    context_window_fallbacks=[{"short": ["long"]}], num_retries=0)
answer = router.completion("short", long, max_tokens=4)
print(json.dumps({"told": told, "tokens": answer.usage.completion_tokens}))
"""
    told = run(PYTHON, "-c", script, url, short_url)
    assert "maximum context length is 64 tokens" in told["told"]
    assert told["tokens"] == 4


@needs_python
def test_instructor_reads_objects(url: str) -> None:
    script = """
import json, sys
from typing import Literal
import instructor, openai
from pydantic import BaseModel
class Animal(BaseModel):
    kind: Literal["fox", "bird"]
    is_red: bool
client = instructor.from_openai(
    openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none"), mode=instructor.Mode.JSON_SCHEMA)
animal = client.chat.completions.create(
    model="dummy", messages=[{"role": "user", "content": "The fox"}], response_model=Animal, max_retries=0)
print(animal.model_dump_json())
"""
    animal = run(PYTHON, "-c", script, url)
    assert animal["kind"] in ("fox", "bird")
    assert isinstance(animal["is_red"], bool)


@pytest.mark.skipif(NODE is None or not INFERENCE.exists(), reason=f"needs node and {INFERENCE}")
def test_hugging_faces_javascript(url: str) -> None:
    """Its text generation sends the server's address as the model."""
    script = """
import { InferenceClient } from "@huggingface/inference";
const client = new InferenceClient(undefined, { endpointUrl: process.argv[2] });
const parameters = { max_new_tokens: 8 };
const text = await client.textGeneration({ inputs: "The fox", parameters });
const messages = [{ role: "user", content: "The fox" }];
const chat = await client.chatCompletion({ messages, max_tokens: 8, temperature: 0 });
let streamed = "";
for await (const chunk of client.chatCompletionStream({ messages, max_tokens: 8, temperature: 0 }))
    streamed += chunk.choices[0]?.delta?.content ?? "";
console.log(JSON.stringify({ text: text.generated_text, chat: chat.choices[0].message.content, streamed }));
"""
    file = CLIENTS / "hugging-face.mjs"  # modules are looked for from where it is
    file.write_text(script)
    assert NODE is not None
    told = run(NODE, file, url)
    assert told["text"]
    assert told["chat"] == told["streamed"]
