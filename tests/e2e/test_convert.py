"""From a model as Hugging Face has it to a server that speaks with it, by the commands of the README."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx2
import torch
from transformers import RwkvConfig, RwkvForCausalLM

from tests.conftest import byte_level_tokenizer
from tests.e2e.conftest import Server


def test_a_converted_model_is_served(tmp_path: Path) -> None:
    words = byte_level_tokenizer(400)
    torch.manual_seed(0)
    theirs = RwkvForCausalLM(RwkvConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, rescale_every=0))
    theirs.eval()  # type: ignore[no-untyped-call]
    theirs.save_pretrained(tmp_path / "theirs")
    words.save(str(tmp_path / "theirs" / "tokenizer.json"))
    command = [sys.executable, "-m", "server", "convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{theirs.num_parameters():,} parameters, float32" in done.stdout
    prompt = words.encode("The fox and the bird").ids
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0
    )
    with Server("--model", str(tmp_path / "ours"), "--quantize", "int8") as server:
        assert httpx2.get(f"{server.url}/ready", timeout=60).status_code == 200
    with Server("--model", str(tmp_path / "ours")) as server:
        body = {"prompt": "The fox and the bird", "max_tokens": 16, "temperature": 0, "return_token_ids": True}
        answer = httpx2.post(f"{server.url}/v1/completions", json={**body, "ignore_eos": True}, timeout=60).json()
        assert answer["choices"][0]["token_ids"] == expected[0, len(prompt) :].tolist()
        told = httpx2.post(f"{server.url}/tokenize", json={"prompt": "The fox and the bird"}, timeout=60).json()
        assert told["tokens"] == prompt
