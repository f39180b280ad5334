from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import LanguageModel, State
from model.backends.base import Runner
from model.backends.choose import make_runner
from model.backends.cuda import CUDARunner
from model.backends.eager import EagerRunner
from model.backends.native.compiler import library
from model.backends.native.matrices import FORMATS
from model.backends.native.program import NativeRunner
from model.errors import ConfigError, ContextLengthError
from model.families.aft import FactorisedBias
from tests.conftest import VARIANTS, Variant, random_model, tiny_config
from tests.model.test_language_model import WITH_AND_WITHOUT_POSITIONS, assert_states_close, token_ids

N_SLOTS = 3


@pytest.fixture
def _fresh_library() -> Iterator[None]:
    library.cache_clear()
    yield
    library.cache_clear()


def slots(model: LanguageModel) -> State:
    return model.init_state(N_SLOTS)


def read_all(runner: Runner, ids: list[int], state: State | None = None) -> tuple[Tensor, State]:
    """The logits after each token."""
    return runner.read(ids, state, len(ids))


def native(model: LanguageModel, states: State) -> Runner:
    kernels = library()
    assert kernels is not None
    return NativeRunner(model, states, 64, kernels)


def padded(model: LanguageModel, states: State) -> Runner:
    return EagerRunner(model, states, pads=True)


BACKENDS: dict[str, Callable[[LanguageModel, State], Runner]] = {
    "native": native,
    "eager": EagerRunner,
    "eager, padded": padded,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("variant", "position_embeddings"), WITH_AND_WITHOUT_POSITIONS)
@torch.inference_mode()
def test_reading_and_stepping_equal_the_model(variant: Variant, position_embeddings: bool, backend: str) -> None:
    """More keys than a kernel takes at a time, widths that are no multiple of a vector."""
    positions = {"position_embeddings": True} if position_embeddings else {}
    config = tiny_config(variant, d_model=90, n_head=3, d_ff=70, **positions)
    model = random_model(config, std=0.15)
    tokens = token_ids(N_SLOTS, 60)
    expected, expected_state = model(tokens)
    states = slots(model)
    runner = BACKENDS[backend](model, states)
    logits, state = read_all(runner, tokens[0].tolist())
    torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
    last, _ = runner.read(tokens[0].tolist(), None, 1)
    assert torch.equal(last[0], logits[-1])
    assert runner.read([1, 2], None)[0].shape == (0, 400)
    assert_states_close(state, expected_state.select(slice(0, 1)))
    for t in range(60):
        logits = runner.step_(tokens[:, t].tolist())
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-4, atol=1e-4)
    assert_states_close(states, expected_state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_any_cut_and_any_batch_give_the_same(variant: Variant, backend: str) -> None:
    """In every bit, where a backend says so."""
    model = random_model(tiny_config(variant))
    states = slots(model)
    runner = BACKENDS[backend](model, states)
    assert runner.is_batch_invariant == (backend == "native")
    ids = token_ids(1, 50)[0].tolist()
    whole, after = read_all(runner, ids)

    def check_logits(found: Tensor, expected: Tensor) -> None:
        if runner.is_batch_invariant:
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def check_state(found: State) -> None:
        if runner.is_batch_invariant:
            assert all(map(torch.equal, found.tensors(), after.tensors()))
        else:
            assert_states_close(found, after)

    @settings(max_examples=10)
    @given(st.sets(st.integers(1, 49), max_size=4).map(sorted))
    def check(cuts: list[int]) -> None:
        state, outputs = None, []
        for start, end in zip([0, *cuts], [*cuts, 50], strict=True):
            logits, state = read_all(runner, ids[start:end], state)
            outputs.append(logits)
        assert state is not None
        check_logits(torch.cat(outputs), whole)
        check_state(state)

    check()
    for t, token_id in enumerate(ids):
        logits = runner.step_([7, token_id, 300] if t % 3 else [7, token_id])
        check_logits(logits[1], whole[t])
    check_state(states.select(slice(1, 2)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_give_the_same_bits_on_any_number_of_threads(variant: Variant) -> None:
    """More threads than cores, too, and passes of two models at a time."""
    model, before = random_model(tiny_config(variant, d_ff=77)), torch.get_num_threads()
    ids = token_ids(1, 60)[0].tolist()

    @torch.inference_mode()
    def outputs(n_threads: int) -> Tensor:
        torch.set_num_threads(n_threads)
        runner = make_runner(model, slots(model), 64)
        read = [read_all(runner, ids)[0] for _ in range(20)]
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
    runner = make_runner(model, slots(model), 64, quantize="int8")
    tokens = token_ids(1, 40)
    logits, _ = read_all(runner, tokens[0].tolist())
    expected, actual = model(tokens)[0][0].softmax(-1), logits.softmax(-1)
    assert 0 < (expected - actual).abs().sum(-1).max() < 0.05


@torch.inference_mode()
def test_a_model_may_be_quantised_to_any_format() -> None:
    model = random_model(tiny_config(tie_embeddings=False), std=0.1)
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):  # not the embedding, which is read row by row
            module.weight.data = module.weight.bfloat16().float()

    def logits(model: LanguageModel, quantize: str | None) -> Tensor:
        return read_all(make_runner(model, slots(model), 64, quantize=quantize), [1, 2, 3])[0]

    assert torch.equal(logits(model, "bfloat16"), logits(rounded, "float32"))
    assert not torch.equal(logits(model, "bfloat16"), logits(model, None))
    with pytest.raises(ConfigError, match=f"quantize must be one of {', '.join(FORMATS)}, not 'int3'"):
        logits(model, "int3")


@torch.inference_mode()
def test_matrices_that_a_family_calls_fine_keep_their_digits() -> None:
    model = random_model(tiny_config(tie_embeddings=False))
    plain, _ = read_all(make_runner(model, slots(model), 64), [1, 2, 3])
    with mock.patch.object(type(model), "is_fine", return_value=True):
        fine, _ = read_all(make_runner(model, slots(model), 64, quantize="int8"), [1, 2, 3])
    assert torch.equal(fine, plain)


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
    assert isinstance(runner, NativeRunner)
    logits, _ = read_all(runner, [1, 2, 3])
    assert logits.dtype == torch.float32
    in_bfloat16 = runner.weight_bytes
    model.float()
    runner = make_runner(model, slots(model), 64)
    assert isinstance(runner, NativeRunner)
    assert torch.equal(read_all(runner, [1, 2, 3])[0], logits)
    assert runner.weight_bytes == 2 * in_bfloat16
    torch.testing.assert_close(logits, model(torch.tensor([[1, 2, 3]]))[0][0])


@torch.inference_mode()
def test_a_runner_does_not_keep_the_matrices_that_it_packed() -> None:
    model = random_model(tiny_config(tie_embeddings=False))
    weights = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    runner = make_runner(model, slots(model), 64)
    del model
    gc.collect()
    assert not any(weight() for weight in weights)
    assert runner.step_([1]).shape == (1, 400)


@pytest.mark.usefixtures("_fresh_library")
def test_without_a_compiler_pytorch_runs_the_model(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    model = random_model(tiny_config())
    with caplog.at_level(logging.WARNING):
        runner = make_runner(model, slots(model), 64)
    assert isinstance(runner, EagerRunner)
    assert "Decoding without compiled kernels" in caplog.text
    with pytest.raises(ConfigError, match="quantize needs the compiled kernels"):
        make_runner(model, slots(model), 64, quantize="int8")


def test_a_model_on_another_device_is_left_to_pytorch() -> None:
    kernels = library()
    assert kernels is not None
    with torch.device("meta"):
        assert not NativeRunner.supports(random_model(tiny_config()), kernels)


def test_a_recurrence_without_a_kernel_is_left_to_pytorch() -> None:
    kernels, model = library(), random_model(tiny_config("local"))
    assert kernels is not None
    assert NativeRunner.supports(model, kernels)
    with mock.patch.object(FactorisedBias, "functions", ("aft", "unknown")):
        assert not NativeRunner.supports(model, kernels)
    with mock.patch.object(FactorisedBias, "functions", ()):
        assert isinstance(make_runner(model, slots(model), 64), EagerRunner)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_padded_steps_give_the_same_bits_in_any_batch(variant: Variant) -> None:
    """Free rows stay within reach of a model that knows so many positions only."""
    positions = {} if variant == "rwkv4" else {"position_embeddings": True, "max_positions": 12}
    model = random_model(tiny_config(variant, **positions))
    alone, together = (EagerRunner(model, slots(model), pads=True) for _ in range(2))
    for token_id in range(12):
        first, second = alone.step_([token_id]), together.step_([token_id, 7, 9])
        assert first.shape == (1, 400)
        assert torch.equal(first[0], second[0])


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
    assert isinstance(runner, CUDARunner)
    for t in range(40):
        n_rows = N_SLOTS if t < 20 else 1
        logits = runner.step_(tokens[:n_rows, t].tolist()).cpu()
        torch.testing.assert_close(logits, expected[:n_rows, t], rtol=1e-3, atol=1e-3)
