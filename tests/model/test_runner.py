from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.backends.native.compiler import library
from model.backends.native.matrices import FORMATS
from model.backends.native.runner import NativeRunner, PackedLinear
from model.config import Variant
from model.errors import ConfigError, ContextLengthError
from model.runner import CUDAGraphRunner, Quantization, TorchRunner, make_runner
from model.state import AFTState
from tests.conftest import VARIANTS, random_model, tiny_config
from tests.model.test_transformer import assert_states_close, token_ids

N_SLOTS = 3


@pytest.fixture
def _fresh_library() -> Iterator[None]:
    library.cache_clear()
    yield
    library.cache_clear()


def slots(model: torch.nn.Module) -> AFTState:
    return AFTState.concatenate([model.init_state(1)] * N_SLOTS)  # type: ignore[operator]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("position_embeddings", [False, True])
@torch.inference_mode()
def test_reading_and_stepping_equal_the_model(variant: Variant, position_embeddings: bool) -> None:
    """More keys than a kernel takes at a time, widths that are no multiple of a vector."""
    config = tiny_config(variant, d_model=90, n_head=3, d_ff=70, position_embeddings=position_embeddings)
    model = random_model(config, std=0.15)
    tokens = token_ids(N_SLOTS, 60)
    expected, expected_state = model(tokens)
    states = slots(model)
    for runner in (make_runner(model, states, 64), TorchRunner(model, slots(model))):
        hidden, state = runner.read(tokens[0].tolist(), None)
        torch.testing.assert_close(runner.model.logits(hidden), expected[0], rtol=1e-4, atol=1e-4)
        assert_states_close(state, expected_state.select(slice(0, 1)))
        for t in range(60):
            logits = runner.step_(tokens[:, t].tolist())
            torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-4)
    assert_states_close(states, expected_state)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_kernels_give_the_same_bits_in_any_batch_and_for_any_cut(variant: Variant) -> None:
    model = random_model(tiny_config(variant))
    states = slots(model)
    runner = make_runner(model, states, 64)
    assert runner.is_exact
    ids = token_ids(1, 50)[0].tolist()
    whole, after = runner.read(ids, None)
    whole = whole.clone()

    @settings(max_examples=10)
    @given(st.sets(st.integers(1, 49), max_size=4).map(sorted))
    def check(cuts: list[int]) -> None:
        state, outputs = None, []
        for start, end in zip([0, *cuts], [*cuts, 50], strict=True):
            hidden, state = runner.read(ids[start:end], state)
            outputs.append(hidden.clone())
        assert torch.equal(torch.cat(outputs), whole)
        assert state is not None
        assert all(map(torch.equal, state.tensors(), after.tensors()))

    check()
    expected = runner.model.logits(whole)
    for t, token_id in enumerate(ids):
        logits = runner.step_([7, token_id, 300] if t % 3 else [7, token_id])
        assert torch.equal(logits[1], expected[t])
    second = states.select(slice(1, 2))
    assert all(map(torch.equal, second.tensors(), after.tensors()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_give_the_same_bits_on_any_number_of_threads(variant: Variant) -> None:
    """More threads than cores, too, and passes of two models at a time."""
    model, before = random_model(tiny_config(variant, d_ff=77)), torch.get_num_threads()
    ids = token_ids(1, 60)[0].tolist()

    @torch.inference_mode()
    def outputs(n_threads: int) -> Tensor:
        torch.set_num_threads(n_threads)
        runner = make_runner(model, slots(model), 64)
        read = [runner.model.logits(runner.read(ids, None)[0]) for _ in range(20)]
        stepped = [runner.step_([token_id, 7]).clone() for token_id in ids]
        return torch.cat([*read, *stepped])

    try:
        expected = outputs(1)
        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(outputs, (2, 3, 7, 7)):
                assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_a_state_that_was_read_is_a_copy() -> None:
    model = random_model(tiny_config())
    runner = make_runner(model, slots(model), 8)
    _, state = runner.read([1, 2, 3], None)
    before = state.clone()
    runner.read([4, 5], state)
    assert all(map(torch.equal, state.tensors(), before.tensors()))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_a_quantised_model_predicts_nearly_the_same(variant: Variant) -> None:
    model = random_model(tiny_config(variant, d_model=64, d_ff=128), std=0.1)
    runner = make_runner(model, slots(model), 64, "int8")
    tokens = token_ids(1, 40)
    hidden, _ = runner.read(tokens[0].tolist(), None)
    expected, actual = model(tokens)[0][0].softmax(-1), runner.model.logits(hidden).softmax(-1)
    assert 0 < (expected - actual).abs().sum(-1).max() < 0.05


@torch.inference_mode()
def test_a_model_may_be_quantised_to_any_format() -> None:
    assert get_args(Quantization) == tuple(FORMATS)
    model = random_model(tiny_config(), std=0.1)
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):  # not the embedding, which is read row by row
            module.weight.data = module.weight.bfloat16().float()
    found, _ = make_runner(model, slots(model), 64, "bfloat16").read([1, 2, 3], None)
    expected, _ = make_runner(rounded, slots(model), 64, "float32").read([1, 2, 3], None)
    assert torch.equal(found, expected)
    assert not torch.equal(found, make_runner(model, slots(model), 64).read([1, 2, 3], None)[0])


@pytest.mark.parametrize("variant", ["local", "full"])
@torch.inference_mode()
def test_tokens_past_the_positions_are_refused(variant: Variant) -> None:
    model = random_model(tiny_config(variant, max_positions=10))
    runner = make_runner(model, slots(model), 64)
    with pytest.raises(ContextLengthError, match="11 tokens"):
        runner.read([1] * 11, None)
    for _ in range(10):
        runner.step_([1])
    with pytest.raises(ContextLengthError, match="11 tokens"):
        runner.step_([1])


@torch.inference_mode()
def test_bfloat16_checkpoints_are_computed_in_float32() -> None:
    """From half the bytes, and to the same bits."""
    model = random_model(tiny_config(dtype="bfloat16", d_ff=77))
    runner = make_runner(model, slots(model), 64)
    hidden, _ = runner.read([1, 2, 3], None)
    assert hidden.dtype == torch.float32
    matrices = [module.matrix for module in runner.model.modules() if isinstance(module, PackedLinear)]
    assert {matrix.panels.tensor.dtype for matrix in matrices} == {torch.bfloat16}
    assert runner.model.embedding.weight.dtype == torch.bfloat16
    found, _ = runner.model(torch.tensor([[1, 2, 3]]))
    in_float32 = make_runner(model.float(), slots(model), 64)
    assert torch.equal(in_float32.read([1, 2, 3], None)[0], hidden)
    torch.testing.assert_close(found, model(torch.tensor([[1, 2, 3]]))[0])


@pytest.mark.usefixtures("_fresh_library")
def test_without_a_compiler_pytorch_runs_the_model(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    model = random_model(tiny_config())
    with caplog.at_level(logging.WARNING):
        runner = make_runner(model, slots(model), 64)
    assert isinstance(runner, TorchRunner)
    assert "Decoding without compiled kernels" in caplog.text
    with pytest.raises(ConfigError, match="quantize needs the compiled kernels"):
        make_runner(model, slots(model), 64, "int8")


def test_a_model_on_another_device_is_left_to_pytorch() -> None:
    with torch.device("meta"):
        assert not NativeRunner.supports(random_model(tiny_config()))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_captured_steps_equal_the_model(variant: Variant) -> None:
    """Batches that come and go: each size has a graph of its own, and the states outlive them."""
    model = random_model(tiny_config(variant))
    tokens = token_ids(N_SLOTS, 40)
    expected, _ = model(tokens)
    on_cuda = model.cuda()
    runner = make_runner(on_cuda, slots(on_cuda), 64)
    assert isinstance(runner, CUDAGraphRunner)
    for t in range(40):
        n_rows = N_SLOTS if t < 20 else 1
        logits = runner.step_(tokens[:n_rows, t].tolist()).cpu()
        torch.testing.assert_close(logits, expected[:n_rows, t], rtol=1e-3, atol=1e-3)
