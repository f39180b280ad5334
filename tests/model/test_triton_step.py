"""The mathematics of the GPU kernel, in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

from model import State
from model.recurrences.aft import AFT
from tests.conftest import VARIANTS, Variant, random_model, tiny_config
from tests.model.test_language_model import assert_states_close, token_ids

pytest.importorskip("triton")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with its kernel interpreted: which of the two it is, the decorator decides when it is loaded."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.find_spec("model.backends.triton_aft")
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
    recurrence = next(module for module in model.modules() if isinstance(module, AFT))
    d_key = 80 // recurrence.n_key
    _, first = model(token_ids(1, 3))
    _, second = model(token_ids(1, 9))
    state = State.concatenate([first, second])
    copy = state.clone()
    ours, theirs = state.layers[0], copy.layers[0]
    position, random = state.position.clone(), torch.Generator().manual_seed(0)
    for _ in range(12):
        query, key = torch.randn(2, 80, generator=random), torch.randn(2, recurrence.n_key, generator=random)
        key += jump * torch.randint(-1, 2, key.shape, generator=random)
        rows = [query, key, torch.randn(2, recurrence.n_key * d_key, generator=random)]
        expected = recurrence.step_(rows, ours, position)
        actual = interpreted.step_(recurrence, rows, theirs, position)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        position += 1
    assert_states_close(copy, state)
