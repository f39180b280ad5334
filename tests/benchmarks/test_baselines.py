"""The baselines of the comparison are what they are called, and as large as what they are compared with."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.baselines import KINDS, Baseline, LinearAttention, MultiHeadAttention
from benchmarks.comparison import ROWS, build
from model import AFTConfig
from tests.conftest import tiny_config

ROWS_OF_TOKENS = [torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
START = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("row", ROWS)
def test_rows_have_as_many_parameters_and_one_function(row: str) -> None:
    model = build(row, vocab_size=300).eval().requires_grad_(False)
    assert abs(model.num_parameters / build("attention", vocab_size=300).num_parameters - 1) < 0.01
    ids = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
    whole, _ = model(ids)
    parts = [model(ids[:, :11])]
    parts.append(model(ids[:, 11:20], parts[-1][1]))
    logits, state = [part[0] for part in parts], parts[-1][1]
    for i in range(20, 30):
        step, state = model.step(ids[:, i], state)
        logits.append(step.unsqueeze(1))
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)


def test_attention_is_softmax_attention() -> None:
    layer = MultiHeadAttention(4, 4)
    y, cache = layer.parallel(ROWS_OF_TOKENS, layer.empty(2, START.device), START, True)
    query, keys, values = (layer.by_head(row) for row in ROWS_OF_TOKENS)
    scores = query @ keys.transpose(-1, -2) / 4**0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(y, (scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
    assert cache.keys.shape == (2, 4, 9, 4)


def test_linear_attention_is_its_sum() -> None:
    layer = LinearAttention(4, 4)
    y, _ = layer.parallel(ROWS_OF_TOKENS, layer.empty(2, START.device), START, True)
    query, keys, values = (layer.by_head(row) for row in ROWS_OF_TOKENS)
    query, keys = F.elu(query) + 1, F.elu(keys) + 1
    expected = torch.zeros_like(values)
    for t in range(9):
        weights = torch.einsum("bhd,bhsd->bhs", query[:, :, t], keys[:, :, : t + 1])
        expected[:, :, t] = torch.einsum("bhs,bhsd->bhd", weights, values[:, :, : t + 1]) / weights.sum(-1, True)
    torch.testing.assert_close(y, expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-6)


def test_the_cache_grows_and_the_linear_state_does_not() -> None:
    sizes = {}
    for kind in KINDS:
        config = tiny_config("simple")
        assert isinstance(config, AFTConfig)
        model = Baseline(config, kind, 4).eval()
        sizes[kind] = [model(torch.ones(1, n, dtype=torch.long))[1].nbytes for n in (10, 20)]
    per_token = 2 * 2 * 16 * 4  # keys and values of two layers, 16 features of 4 bytes
    assert sizes["attention"][1] - sizes["attention"][0] == 10 * per_token
    assert sizes["linear"][0] == sizes["linear"][1]
