"""A family of one file, this one, goes through all of the house: its state is a matrix, and only PyTorch runs it.

Linear attention (Katharopoulos et al. 2020): y_t = f(q_t) S_t / f(q_t) z_t with f = elu + 1, S the sum of the outer
products of keys and values [H, D, D], z the sum of the keys [H, D].
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from model import Tokenizer, load_checkpoint, save_checkpoint
from model.activation import Activation
from model.backends.choose import make_runner
from model.backends.eager import EagerRunner
from model.config import ModelConfig, about
from model.errors import ConfigError
from model.families import FAMILIES, config_from_dict, config_of
from model.generate import generate
from model.language_model import Block, LanguageModel
from model.ops import Ops, Recurrence, X
from model.sampling import SamplingParams
from server.api.app import create_app
from server.engine import EngineConfig, LLMEngine, Request
from tests.conftest import random_model


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ModelConfig):
    family = "linear"

    n_head: int = about("Heads.", 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("n_head")


class LinearLayer(NamedTuple):
    """sums [B, H, D, D], keys [B, H, D]"""

    sums: Tensor
    keys: Tensor


class LinearAttention(Recurrence):
    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head

    def parallel(self, rows: Sequence[Tensor], layer: Any, position: Tensor, starts: bool) -> tuple[Tensor, Any]:
        query, key, value = (row.view(*row.shape[:2], self.n_head, -1).transpose(1, 2) for row in rows)
        query, key = F.elu(query) + 1, F.elu(key) + 1
        weights = (query @ key.transpose(-1, -2)).tril()
        numerator = weights @ value + query @ layer.sums
        denominator = weights.sum(-1, keepdim=True) + query @ layer.keys.unsqueeze(-1)
        after = LinearLayer(layer.sums + key.transpose(-1, -2) @ value, layer.keys + key.sum(2))
        return (numerator / denominator).transpose(1, 2).flatten(2), after

    def step_(self, rows: Sequence[Tensor], layer: Any, position: Tensor) -> Tensor:
        y, after = self.parallel([row.unsqueeze(1) for row in rows], layer, position, False)
        for old, new in zip(layer, after, strict=True):
            old.copy_(new)
        return y.squeeze(1)


class LinearBlock(Block):
    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        width = config.d_model
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.recurrence = LinearAttention(config.n_head)

    def run(self, ops: Ops[X], x: X, layer: Any) -> tuple[X, Any]:
        first, second = self.norms
        assert isinstance(first, nn.LayerNorm)
        assert isinstance(second, nn.LayerNorm)
        rows = ops.split(ops.linear(ops.norm(x, first), self.qkv), [self.out.in_features] * 3)
        y, layer = ops.recur(self.recurrence, *rows, layer=layer)
        x = ops.linear(y, self.out, adds_to=x)
        return ops.linear(ops.linear(ops.norm(x, second), self.up, Activation.GELU), self.down, adds_to=x), layer


class LinearForCausalLM(LanguageModel):
    config_class = LinearConfig
    config: LinearConfig

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(LinearBlock(config) for _ in range(config.n_layer))
        self.initialise()

    def empty_layer(self, batch_size: int, device: torch.device) -> LinearLayer:
        n_head = self.config.n_head
        d_head = self.config.d_model // n_head
        sums = torch.zeros(batch_size, n_head, d_head, d_head, device=device)
        return LinearLayer(sums, torch.zeros(batch_size, n_head, d_head, device=device))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a family of the house has elsewhere."""
    monkeypatch.setitem(FAMILIES, "linear", LinearForCausalLM)


@pytest.fixture
def model(_registered: None) -> LanguageModel:
    return random_model(LinearConfig(vocab_size=400, d_model=16, n_layer=2))


@pytest.fixture
def folder(model: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, model, tokenizer)
    return tmp_path


IDS = torch.randint(400, (3, 60), generator=torch.Generator().manual_seed(0))


def test_whole_chunks_and_steps_agree(model: LanguageModel) -> None:
    whole, after = model(IDS)

    @settings(max_examples=15)
    @given(st.sets(st.integers(1, 59), max_size=4).map(sorted))
    def check(cuts: list[int]) -> None:
        outputs, state = [], None
        for start, end in zip([0, *cuts], [*cuts, 60], strict=True):
            logits, state = model(IDS[:, start:end], state)
            outputs.append(logits)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-4)

    check()
    state = model.init_state(3)
    for t in range(60):
        torch.testing.assert_close(model.step_(IDS[:, t], state), whole[:, t], rtol=1e-4, atol=1e-4)
    for stepped, read in zip(state.tensors(), after.tensors(), strict=True):
        torch.testing.assert_close(stepped, read, rtol=1e-4, atol=1e-4)


def test_every_parameter_learns(model: LanguageModel) -> None:
    model.requires_grad_(True)
    model(IDS)[0].logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@torch.inference_mode()
def test_pytorch_runs_what_has_no_kernel(model: LanguageModel) -> None:
    states = model.init_state(3)
    runner = make_runner(model, states, 64)
    assert isinstance(runner, EagerRunner)
    whole, _ = model(IDS)
    logits, _ = runner.read(IDS[0].tolist(), None, 60)
    torch.testing.assert_close(logits, whole[0], rtol=1e-4, atol=1e-4)
    for t in range(60):
        torch.testing.assert_close(runner.step_(IDS[:, t].tolist()), whole[:, t], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="quantize needs the compiled kernels"):
        make_runner(model, states, 64, quantize="int8")


def test_its_checkpoint_is_read_and_its_fields_are_its_own(folder: Path, model: LanguageModel) -> None:
    loaded, _ = load_checkpoint(folder)
    assert loaded.config == model.config
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    with pytest.raises(ConfigError, match="Unknown configuration field 'window'"):
        config_from_dict({**model.config.to_dict(), "model_type": "linear", "window": 4})
    chosen = config_of("linear", {"vocab_size": 9, "d_model": 8}, {"n_layer": 3, "window": 4})
    assert chosen == LinearConfig(vocab_size=9, d_model=8, n_layer=3)


def finish(engine: LLMEngine, request: Request) -> list[int]:
    engine.add_request(request)
    tokens = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            tokens += [output.token.token_id] if output.token else []
    return tokens


def test_the_engine_its_cache_and_its_pool(model: LanguageModel, tokenizer: Tokenizer) -> None:
    engine = LLMEngine(model, tokenizer, EngineConfig(chunk_size=16, max_num_seqs=3))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompt = [1, *range(20, 60)]
    expected = list(generate(model, prompt, params, tokenizer))
    assert finish(engine, Request("a", prompt, params)) == expected
    again = Request("b", prompt, params)
    assert finish(engine, again) == expected
    assert again.num_cached_tokens == len(prompt)
    several = dataclasses.replace(params, n=3, temperature=1.0, seed=5)
    texts = finish(engine, Request("c", [*prompt, 7], several))
    assert len(texts) == 36
    found = engine.prefix_cache.match(array("i", prompt), engine.beginning(again))
    assert found is not None
    again_read, _ = engine.state_files.read(engine.state_files.write(found.snapshot))
    assert all(map(torch.equal, again_read.state.tensors(), found.snapshot.state.tensors()))


def test_a_server_with_sessions_export_and_import(folder: Path) -> None:
    def serve() -> TestClient:
        return TestClient(create_app(LLMEngine(*load_checkpoint(folder))), raise_server_exceptions=False)

    body = {"inputs": "The fox", "parameters": {"max_new_tokens": 6, "details": True}}
    with serve() as client, serve() as elsewhere:
        assert client.get("/info").json()["variant"] == "linear"
        name = client.post("/sessions").json()["session_id"]
        assert client.post("/generate", json={**body, "session_id": name}).status_code == 200
        exported = client.get(f"/sessions/{name}/export").content
        there = elsewhere.post("/sessions/import", content=exported).json()["session_id"]
        forks = client.post(f"/sessions/{name}/fork", json={"n": 2}).json()["sessions"]
        turns = [
            server.post("/generate", json={**body, "inputs": " and", "session_id": session}).json()["generated_text"]
            for server, session in ((client, name), (elsewhere, there), (client, forks[1]["session_id"]))
        ]
        assert turns[0] == turns[1] == turns[2]
