"""What a server that was stopped leaves to the next."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.conftest import Server
from tests.redis_server import RedisServer, needs_redis

BODY = {"prompt": "The fox and the bird sat by the sea. " * 40, "max_tokens": 20, "temperature": 0, "logprobs": 1}


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("redis", marks=needs_redis)])
def test_a_prompt_is_not_read_again_after_a_restart(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    with RedisServer(tmp_path) if kind == "redis" else nullcontext() as redis:
        store = redis.url if redis else str(tmp_path / "store.sqlite")
        answers: list[dict[str, Any]] = []
        for _ in range(2):
            with Server("--model", str(checkpoint), "--store", store, AFT_PREFIX_STORE="16") as server:
                answers.append(httpx2.post(f"{server.url}/v1/completions", json=BODY, timeout=60).json())
                metrics = httpx2.get(f"{server.url}/metrics", timeout=60).text
            assert " WARNING " not in server.log
    before, after = answers
    n_prompt = before["usage"]["prompt_tokens"]
    assert n_prompt > 300
    assert before["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt
    assert after["choices"] == before["choices"]  # log-probabilities included
    for name in ("external_prefix_cache_queries", "external_prefix_cache_hits", "prefix_cache_hits"):
        assert f'vllm:{name}_total{{model_name="{checkpoint.name}"}} {float(n_prompt)}' in metrics
    assert "aft:prefix_store_dropped_total" in metrics
