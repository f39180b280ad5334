from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import LanguageModel, State
from model.errors import ContextLengthError
from tests.conftest import VARIANTS, Variant, new_model, random_model, tiny_config

# RWKV-4 has no position embeddings.
WITH_AND_WITHOUT_POSITIONS = [(v, p) for v in VARIANTS for p in (False, True) if not (p and v == "rwkv4")]


def token_ids(batch_size: int, n_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(400, (batch_size, n_tokens), generator=torch.Generator().manual_seed(seed))


def unrolled(model: LanguageModel, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    outputs = []
    for t in range(tokens.shape[1]):
        logits, state = model.step(tokens[:, t], state)
        outputs.append(logits)
    return torch.stack(outputs, 1), state


def assert_states_close(actual: State, expected: State) -> None:
    """Equal as functions of what follows: the reference of the sums is free, only sums * exp(reference) counts."""
    assert torch.equal(actual.position, expected.position)
    for a_layer, e_layer in zip(actual.layers, expected.layers, strict=True):
        for a, e in zip(meaning(a_layer), meaning(e_layer), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def meaning(layer: Any) -> tuple[Tensor, ...]:
    """The average over tokens outside the window, the log of its denominator, and what else there is."""
    reference, sums, compensation, *others = layer
    numerator, denominator = (sums + compensation)[..., :-1], (sums + compensation)[..., -1]
    average = numerator / denominator.clamp(min=1e-30).unsqueeze(-1)
    return average, reference + denominator.log(), *others


@pytest.mark.parametrize(("variant", "position_embeddings"), WITH_AND_WITHOUT_POSITIONS)
def test_forward_chunks_and_steps_agree(variant: Variant, position_embeddings: bool) -> None:
    model = random_model(tiny_config(variant, **({"position_embeddings": True} if position_embeddings else {})))
    tokens = token_ids(3, 150)
    whole, state = model(tokens)

    @settings(max_examples=15)
    @given(st.sets(st.integers(1, 149), max_size=4).map(sorted))
    def check(cuts: list[int]) -> None:
        chunk_state, outputs = model.init_state(3), []
        for start, end in zip([0, *cuts], [*cuts, 150], strict=True):
            logits, chunk_state = model(tokens[:, start:end], chunk_state)
            outputs.append(logits)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-4)
        assert_states_close(chunk_state, state)

    check()
    stepped, step_state = unrolled(model, tokens, model.init_state(3))
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-4)
    assert_states_close(step_state, state)
    torch.testing.assert_close(model.prefill(tokens)[0], whole[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_of_a_model_learns(variant: Variant) -> None:
    """Each parameter gets a gradient, the position biases included."""
    has_positions = {} if variant == "rwkv4" else {"position_embeddings": True}
    model = random_model(tiny_config(variant, **has_positions)).requires_grad_(True)
    model(token_ids(2, 256))[0].logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_mixes_sequences_of_different_lengths(variant: Variant) -> None:
    """Sequences at different positions share a step, and a fork leaves its origin as it was."""
    model = random_model(tiny_config(variant))
    prompts = [token_ids(1, n, seed=n) for n in (1, 5, 40, 130)]
    states = [model.prefill(prompt)[1] for prompt in prompts]
    together = State.concatenate(states)
    next_ids = token_ids(1, 4, seed=9)[0]
    batched, after = model.step(next_ids, together)
    for i, state in enumerate(states):
        alone, alone_after = model.step(next_ids[i : i + 1], state)
        torch.testing.assert_close(batched[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        assert_states_close(after.select(slice(i, i + 1)), alone_after)
    chunk = token_ids(4, 70, seed=8)
    batched, _ = model(chunk, together)
    for i, prompt in enumerate(prompts):
        expected = model(torch.cat([prompt, chunk[i : i + 1]], 1))[0][:, prompt.shape[1] :]
        torch.testing.assert_close(batched[i : i + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["simple", "conv", "local"])
def test_state_has_as_many_bytes_after_100000_tokens_as_after_10(variant: Variant) -> None:
    config = tiny_config(variant, d_model=4, n_layer=1, n_head=2, max_positions=100_001)
    model = random_model(config)
    tokens = token_ids(1, 100_001)
    _, state = model.prefill(tokens[:, :10])
    nbytes_at_10 = state.nbytes
    assert nbytes_at_10 == expected_nbytes(variant)
    _, state = model.prefill(tokens[:, 10:100_000], state)
    assert int(state.position) == 100_000
    assert state.nbytes == nbytes_at_10
    _, state = model.step(tokens[:, -1], state)
    assert state.nbytes == nbytes_at_10 == model.init_state(1).nbytes


def expected_nbytes(variant: Variant) -> int:
    """position; reference H; numerator C and denominator H, twice for compensation; window - 1 = 5 keys and values."""
    n_key, d_model, n_window = {"simple": (4, 4, 0), "conv": (2, 4, 5), "local": (4, 4, 5)}[variant]
    return 8 + 4 * (n_key + 2 * (d_model + n_key) + n_window * (n_key + d_model))


def test_state_is_float32_whatever_the_weights_are() -> None:
    model = random_model(tiny_config(dtype="bfloat16"))
    assert model.embedding.weight.dtype is torch.bfloat16
    logits, state = model(token_ids(2, 70))
    stepped, state = model.step(token_ids(1, 2)[0], state)
    assert logits.dtype is stepped.dtype is torch.float32
    assert {tensor.dtype for layer in state.layers for tensor in layer} == {torch.float32}


@pytest.mark.parametrize("changes", [{"variant": "local"}, {"variant": "full"}, {"position_embeddings": True}])
def test_a_sequence_past_the_positions_is_refused(changes: dict[str, object]) -> None:
    model = random_model(tiny_config(**changes))  # type: ignore[arg-type]
    _, state = model(token_ids(1, 256))
    with pytest.raises(ContextLengthError, match="257 tokens exceeds the model's max_positions = 256"):
        model.step(token_ids(1, 1)[0], state)
    with pytest.raises(ContextLengthError, match="260 tokens"):
        model(token_ids(1, 4), state)


def test_wrong_shapes_are_refused() -> None:
    model = random_model(tiny_config())
    with pytest.raises(ValueError, match=r"at least one token, not \[2, 0\]"):
        model(torch.empty(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must be \[2\] as the state, not \[3\]"):
        model.step(torch.zeros(3, dtype=torch.long), model.init_state(2))


def test_a_new_model_predicts_almost_uniformly() -> None:
    torch.manual_seed(0)
    model = new_model(tiny_config(d_model=64))
    tokens = token_ids(4, 101)
    logits = model(tokens[:, :-1])[0].detach()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(float(nats) - math.log(400)) < 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own modules
def test_compiled_forward_equals_eager() -> None:
    model = random_model(tiny_config())
    tokens = token_ids(2, 100)
    compiled = torch.compile(lambda ids: model(ids)[0])
    torch.testing.assert_close(compiled(tokens), model(tokens)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_equals_cpu(variant: Variant) -> None:
    model = random_model(tiny_config(variant))
    tokens = token_ids(2, 150)
    expected, _ = model(tokens)
    on_cuda = model.cuda()
    logits, _ = on_cuda(tokens.cuda())
    stepped, _ = unrolled(on_cuda, tokens.cuda(), on_cuda.init_state(2))
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stepped.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_copied_state_is_equal_and_shares_nothing(variant: Variant) -> None:
    model = random_model(tiny_config(variant))
    _, state = model(token_ids(2, 70))  # its window is a view into a larger block
    copy = state.clone()
    for original, copied in zip(state.tensors(), copy.tensors(), strict=True):
        assert torch.equal(original, copied)
        original.fill_(7)
        assert not (copied == 7).any()
    assert copy.nbytes == state.nbytes
    assert len({tensor.untyped_storage().data_ptr() for tensor in copy.tensors() if tensor.numel()}) == 2
