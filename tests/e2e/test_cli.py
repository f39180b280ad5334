"""`aft`, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from server.config import ServerConfig
from server.engine import EngineConfig
from server.errors import ConfigurationError
from tests.e2e.conftest import Server


def aft(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_mistakes_are_a_sentence(tmp_path: Path, checkpoint: Path) -> None:
    for arguments, sentence in (
        (["--model", str(tmp_path)], f"Checkpoint folder {tmp_path} has no file config.json."),
        (["--model", str(checkpoint), "--max-num-seqs", "0"], "max_num_seqs must be from 1 to 65536, not 0."),
        (["--model", str(checkpoint), "--max-model-len", "1"], "max_model_len must be at least 2, not 1."),
        (["--model", str(checkpoint), "--api-key-file", str(tmp_path / "none")], "api_key_file cannot be read"),
        (["--model", str(checkpoint), "--api-key-file", os.devnull], "api_keys and api_key_file hold no key"),
        (["--ray", "--device", "cuda:1"], "device must be cpu or cuda with --ray"),
        (["--model", str(checkpoint), "--store", "redis://127.0.0.1:1"], "The store at 127.0.0.1 cannot be opened"),
        (["--model", str(checkpoint), "--prefix-store", "1"], "prefix_store needs store"),
    ):
        done = aft("serve", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {sentence}")


def test_a_prefix_store_that_could_not_be_used_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    for store, max_bytes, cache, sentence in (
        (None, 2**20, 2**20, "prefix_store needs store"),
        (path, -(2**20), 2**20, "prefix_store must be at least 0, not -1"),
        (path, 2**20, 0, "prefix_store keeps what leaves the prefix cache, so prefix_cache must be at least 1"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            ServerConfig(store=store, prefix_store=max_bytes, engine=EngineConfig(prefix_cache_bytes=cache))
    assert ServerConfig().prefix_store == 0


def test_help_lists_the_variable_of_every_option() -> None:
    text = aft("serve", "--help").stdout
    options = set(re.findall(r"^. (--[a-z-]+)", text, re.MULTILINE)) - {"--help"}
    assert len(options) > 20
    for option in options:
        assert f"AFT_{option.removeprefix('--').replace('-', '_').upper()}" in text


def test_settings_come_from_flags_variables_and_files(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\n two \n")
    variables = {"AFT_MODEL": str(checkpoint), "AFT_API_KEY_FILE": str(tmp_path / "keys"), "AFT_LOG_FORMAT": "json"}
    with Server("--max-model-len", "77", AFT_MAX_MODEL_LEN="66", AFT_SERVED_MODEL_NAME="tiny", **variables) as server:
        assert httpx2.get(f"{server.url}/info", timeout=60).status_code == 401
        info = httpx2.get(
            f"{server.url}/info", headers={"Authorization": "Bearer two", "x-request-id": "r"}, timeout=60
        ).json()
        assert (info["model_id"], info["max_total_tokens"]) == ("tiny", 77)  # a flag wins
    lines = [json.loads(line) for line in server.log.splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "r"]
    assert (line["message"], line["path"], line["status"]) == ("request", "/info", 200)


def test_generate_writes_what_the_server_would(checkpoint: Path, bundled_url: str) -> None:
    done = aft("generate", "Once upon a time", "--max-tokens", "30", "--seed", "3", "--temperature", "0.7")
    body = {"prompt": "Once upon a time", "max_tokens": 30, "seed": 3, "temperature": 0.7, "echo": True}
    answer = httpx2.post(f"{bundled_url}/v1/completions", json=body, timeout=60).json()
    assert done.stdout == answer["choices"][0]["text"] + "\n"
    refused = aft("generate", "a", "--top-p", "0", "--model", str(checkpoint))
    assert refused.stderr == "error: top_p must be above 0 and at most 1, not 0.0.\n"


def test_bench_measures_a_server(url: str) -> None:
    done = aft("bench", "--url", url, "--clients", "3", "--requests", "5", "--max-tokens", "10")
    assert done.returncode == 0, done.stderr
    assert re.search(r"5 streams, 3 at a time: \d+ tokens in .* tokens/s", done.stdout)
    assert "time to first token, ms" in done.stdout
