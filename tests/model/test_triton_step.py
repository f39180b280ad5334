"""The mathematics of the GPU kernel, in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

from model import ops
from model.config import Variant
from model.layers import AFTAttention
from model.rwkv4 import TimeMix
from model.state import AFTState
from tests.conftest import VARIANTS, random_model, tiny_config
from tests.model.test_language_model import assert_states_close, token_ids

pytest.importorskip("triton")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with its kernel interpreted: which of the two it is, the decorator decides when it is loaded."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("model.triton_step")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("jump", [0.0, 200.0])
def test_the_kernel_equals_the_recurrence(interpreted: ModuleType, variant: Variant, jump: float) -> None:
    """Keys that jump, too; sequences of different lengths; more features than a program takes."""
    config = tiny_config(variant, d_model=80, n_head=4, window=5, max_positions=64)
    model = random_model(config)
    attention = model.blocks[0].attention
    assert isinstance(attention, AFTAttention | TimeMix)
    n_key, d_key, decay = config.n_key, 80 // config.n_key, getattr(attention.bias, "decay", None)
    _, first = model(token_ids(1, 3))
    _, second = model(token_ids(1, 9))
    state = AFTState.concatenate([first, second])
    copy = state.clone()
    ours, theirs = state.layers[0], copy.layers[0]
    position, random = state.position.clone(), torch.Generator().manual_seed(0)
    for _ in range(12):
        query, key = torch.randn(2, 80, generator=random), torch.randn(2, n_key, generator=random)
        key += jump * torch.randint(-1, 2, key.shape, generator=random)
        value = torch.randn(2, n_key, d_key, generator=random)
        bias = attention.bias.by_distance(position)
        expected = torch.sigmoid(query) * ops.step_(key, value, bias, position, ours, decay).flatten(-2)
        actual = interpreted.gated_step_(query, key, value, bias, position, theirs, decay)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        position += 1
    assert_states_close(copy, state)
