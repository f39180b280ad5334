"""Exactness: reference = forward = forward in any chunks = unrolled steps, for every variant and any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.backends.native.compiler import library
from model.families.aft import AFTConfig, ConvBias, FactorisedBias, position_bias
from model.families.rwkv4 import DecayBias
from model.kernel import Kernel, Rows
from model.recurrences import aft_functions as functions
from model.recurrences.aft import AFT
from model.recurrences.aft_functions import Sums, Window
from tests.conftest import VARIANTS, Variant
from tests.reference import aft_reference, reference_bias

Held = tuple[Sums, Window | None]


class FlatLayer(NamedTuple):
    reference: Tensor
    sums: Tensor
    compensation: Tensor
    keys: Tensor
    values: Tensor


class Calls:
    """A program for one sequence, run by one thread."""

    n_threads, one_sequence = 1, True

    def __init__(self, n_rows: int) -> None:
        self.n_rows, self.positions = n_rows, torch.arange(n_rows)
        self.calls: list[Kernel] = []

    def memory(self, *shape: int) -> Rows:
        return Rows(torch.zeros(shape))

    def add(self, kernel: Kernel) -> None:
        self.calls.append(kernel)


@dataclass
class Case:
    """One sequence for one layer; keys [1, T, H], values [1, T, H, D]."""

    bias: AFT
    keys: Tensor
    values: Tensor

    @property
    def n_window(self) -> int:
        return self.bias.window - 1

    def w(self, n_queries: int, n_keys: int, position: int) -> Tensor:
        w: Tensor = self.bias(n_queries, n_keys, torch.tensor([position]))
        return w

    def empty(self) -> Held:
        _, _, n_key, d_key = self.values.shape
        device = torch.device("cpu")
        window = Window.empty(1, n_key, d_key, self.n_window, device) if self.n_window else None
        return Sums.empty(1, n_key, d_key, device), window

    def forward(self, state: Held | None = None, start: int = 0, end: int | None = None) -> tuple[Tensor, Held]:
        """From the start without a state."""

        def bias(n_queries: int, n_keys: int, offset: int) -> Tensor:
            return self.w(n_queries, n_keys, start + offset)

        position = torch.tensor([start])
        keys, values = self.keys[:, start:end], self.values[:, start:end]
        running, window = state or (self.empty()[0], None)
        y, running, window = functions.forward(
            keys, values, bias, self.n_window, position, running, window, self.bias.decay
        )
        return y, (running, window if self.n_window else None)

    def chunks(self, cuts: list[int]) -> Tensor:
        outputs, state = [], None
        for start, end in zip([0, *cuts], [*cuts, self.keys.shape[1]], strict=True):
            y, state = self.forward(state, start, end)
            outputs.append(y)
        return torch.cat(outputs, 1)

    @torch.no_grad()
    def steps(self, start: int = 0) -> Tensor:
        """Unrolled steps for the tokens from `start`; those before it are read by one forward."""
        state = self.forward(None, 0, start)[1] if start else self.empty()
        outputs = []
        for t in range(start, self.values.shape[1]):
            position = torch.tensor([t])
            bias = self.bias.by_distance(position)
            outputs.append(functions.step_(self.keys[:, t], self.values[:, t], bias, position, *state, self.bias.decay))
        return torch.stack(outputs, 1)

    @torch.no_grad()
    def native(self) -> Tensor:
        """All tokens through the compiled kernels, as one sequence; the gate is open."""
        n_tokens, width = self.values.shape[1], self.values.shape[2] * self.values.shape[3]
        gate = torch.full((n_tokens, width), 40.0)
        qkv = torch.cat([gate, self.keys[0], self.values[0].flatten(1)], 1).detach()
        running, window = self.empty()
        layer = FlatLayer(*running, *(window or (torch.zeros(1, 0, 1),) * 2))
        program = Calls(n_tokens)
        out = self.bias.write(
            [Rows(row) for row in torch.split(qkv, [width, self.keys.shape[2], width], 1)], layer, program
        )
        kernels = library()
        assert kernels is not None
        kernels.tasks(program.calls).run(n_tokens, 1)
        return out.tensor.view_as(self.values)

    def reference(self) -> Tensor:
        return aft_reference(self.keys[0], self.values[0], reference_bias(self.bias)).unsqueeze(0)


def shape(variant: Variant, **fields: int) -> tuple[AFT, int]:
    """The recurrence of a variant, and how many keys a token has."""
    if variant == "rwkv4":
        return DecayBias(fields["d_model"]), fields["d_model"]
    config = AFTConfig.from_dict({"variant": variant, "vocab_size": 1, "n_layer": 1, **fields})
    return position_bias(config), config.n_key


def spread_out(bias: AFT, w_scale: float, seed: int) -> AFT:
    """With values that spread over about -w_scale .. w_scale."""
    random = torch.Generator().manual_seed(seed)
    if isinstance(bias, ConvBias):
        # Spread out: the gradient of values that are nearly equal is large, and so is its rounding.
        spread = torch.linspace(-1.5, 1.5, bias.window)
        for row in bias.weight.data:
            row.copy_(spread[torch.randperm(bias.window, generator=random)])
        bias.gamma.data.uniform_(-w_scale / 2, w_scale / 2, generator=random)
        bias.beta.data.uniform_(-w_scale / 2, w_scale / 2, generator=random)
    elif isinstance(bias, FactorisedBias):
        side = (w_scale / bias.query.shape[1]) ** 0.5
        bias.query.data.uniform_(-side, side, generator=random)
        bias.key.data.uniform_(-side, side, generator=random)
    elif isinstance(bias, DecayBias):
        bias.time_first.data.uniform_(-w_scale, w_scale, generator=random)
        bias.time_decay.data.uniform_(-12.0, math.log(w_scale / 24), generator=random)  # for cases of 24 tokens
    return bias


@st.composite
def cases(draw: st.DrawFn, variant: Variant, w_scale: float, jump: float) -> Case:
    n_tokens = draw(st.integers(1, 24), "tokens")
    n_head, d_key = draw(st.integers(1, 3), "heads"), draw(st.sampled_from([1, 2, 3, 20]), "features per head")
    bias, n_key = shape(
        variant,
        d_model=n_head * d_key,
        n_head=n_head,
        window=draw(st.integers(1, 26), "window"),
        d_bias=draw(st.integers(1, 4), "d_bias"),
        max_positions=draw(st.integers(26, 30), "max_positions"),
    )
    seed = draw(st.integers(0, 2**31), "seed")
    random = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, n_tokens, n_key, generator=random)
    if jump:
        keys += jump * torch.randint(-1, 2, keys.shape, generator=random)
    values = torch.randn(1, n_tokens, n_key, n_head * d_key // n_key, generator=random)
    return Case(spread_out(bias, w_scale, seed), keys, values)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert torch.isfinite(actual).all()
    scale = float(expected.abs().max())
    return float((actual.detach().double() - expected).abs().max()) / max(scale, 1e-30)


def exact(variant: Variant, w_scale: float, jump: float) -> Callable[[], None]:
    """The property, for hypothesis to run: all forms agree with the float64 reference."""

    @settings(max_examples=40)
    @given(case=cases(variant, w_scale, jump), block=st.sampled_from([1, 2, 5, 64]), data=st.data())
    def check(case: Case, block: int, data: st.DataObject) -> None:
        n_tokens = case.keys.shape[1]
        cuts = data.draw(st.lists(st.integers(1, max(1, n_tokens - 1)), unique=True, max_size=5).map(sorted), "cuts")
        cuts = [cut for cut in cuts if cut < n_tokens]
        with mock.patch.multiple(functions, BLOCK=block, DECAY_BLOCK=block):
            expected = case.reference().detach()
            assert relative_error(case.forward()[0], expected) < 1e-5
            assert relative_error(case.chunks(cuts), expected) < 1e-5
            assert relative_error(case.steps(), expected) < 1e-5
            assert relative_error(case.native(), expected) < 1e-5
            check_gradients(case, cuts)

    return check


def check_gradients(case: Case, cuts: list[int]) -> None:
    """Gradients of forward, whole and in chunks, against those of the reference."""
    inputs = [case.keys, case.values, *case.bias.parameters()]
    for tensor in inputs:
        tensor.requires_grad_()
    direction = torch.linspace(-1, 1, case.values.numel()).view_as(case.values)

    def gradients(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y * direction).sum(), inputs, allow_unused=True, materialize_grads=True))

    expected = gradients(case.reference())
    # The gradient of a key or bias is a difference of terms of the size of the values, and carries their rounding; that
    # of a parameter carries it as often as the parameter moves the bias.
    largest = float(case.values.detach().abs().max())
    moved = [1.0, 1.0, *(leverage(case.bias, name) for name, _ in case.bias.named_parameters())]
    for actual in (gradients(case.forward()[0]), gradients(case.chunks(cuts))):
        for a, e, by in zip(actual, expected, moved, strict=True):
            assert torch.isfinite(a).all()
            assert float((a - e).abs().max()) < 1e-5 * max(float(e.abs().max()), largest * by)


def leverage(bias: AFT, parameter: str) -> float:
    """By how much a bias changes at most with the parameter, or 1."""
    if isinstance(bias, ConvBias) and parameter == "weight":
        weight, gamma = bias.weight.detach(), bias.gamma.detach().squeeze(-1)
        return max(1.0, float((gamma.abs() / (weight.var(-1, correction=0) + 1e-5).sqrt()).max()))
    return 1.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_forms_equal_the_reference(variant: Variant) -> None:
    exact(variant, w_scale=2.0, jump=0.0)()


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_forms_survive_jumping_keys_and_extreme_biases(variant: Variant) -> None:
    exact(variant, w_scale=50.0, jump=200.0)()


LONG = 20_000
KEY_SEQUENCES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "random": lambda t, random: torch.randn(len(t), generator=random),
    "jumps of 200": lambda t, random: 200.0 * torch.randint(-1, 2, (len(t),), generator=random),
    # Adding e^-5 over and over to a sum near 100 loses up to 0.1% of each term in plain float32.
    "a large key, then equal small ones": lambda t, random: torch.where(t == 0, 5.0, 0.0).float(),
    # A reference that followed every new maximum would be rounded 20,000 times.
    "ever growing": lambda t, random: (t * 1e-4).float(),
    "ever falling": lambda t, random: (t * -1e-2).float(),
    # A decay that was taken from a reference of this size would be rounded at each token.
    "around 10,000": lambda t, random: 1e4 + torch.randn(len(t), generator=random),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_drift_over_20000_steps(variant: Variant) -> None:
    """Steps in a row against the formula; each key sequence is a head of its own.

    AFT-full keeps every token and sums nothing up, so there the last steps will do (each costs as much as all tokens).
    """
    decays = [1e-7, 1e-4, 0.3, 0.55, 1.3, 2.1, 30.0] if variant == "rwkv4" else [0.0]
    n_key = len(KEY_SEQUENCES) * len(decays)
    bias, _ = shape(variant, d_model=n_key, n_head=n_key, window=8, d_bias=2, max_positions=LONG)
    spread_out(bias, 50.0 if variant == "conv" else 3.0, seed=1).requires_grad_(False)
    if isinstance(bias, DecayBias):
        bias.time_decay.copy_(torch.tensor(decays).log().repeat_interleave(len(KEY_SEQUENCES)))
    random = torch.Generator().manual_seed(0)
    t = torch.arange(LONG)
    keys = torch.stack([sequence(t, random) for _ in decays for sequence in KEY_SEQUENCES.values()], -1).unsqueeze(0)
    values = torch.randn(1, LONG, n_key, 1, generator=random)
    values[:, 1:] += 1.0  # a mean that is not 0, or the relative error would be of noise
    start = LONG - 100 if variant == "full" else 0
    steps = Case(bias, keys, values).steps(start)
    forward, _ = Case(bias, keys, values).forward()
    native = None if variant == "full" else Case(bias, keys, values).native()
    assert torch.isfinite(steps).all()
    for row in (99, *range(4_990, 5_000), LONG - 1):
        expected = expected_row(bias, keys, values, row)
        assert relative_error(forward[0, row], expected) < 1e-5
        if native is not None:
            assert relative_error(native[0, row], expected) < 1e-5
        if row >= start:
            assert relative_error(steps[0, row - start], expected) < 1e-5


def expected_row(bias: AFT, keys: Tensor, values: Tensor, row: int) -> Tensor:
    """One row of the formula in float64; the sum over t' as a vector, for 20,000 terms are too many for a loop."""
    w = reference_bias(bias)
    first = max(0, row - min(bias.window, 8) + 1)
    n_key = keys.shape[2]
    logits = keys[0, : row + 1].double()
    if isinstance(bias, FactorisedBias) and bias.window > row:
        logits = logits + (bias.key[: row + 1].double() @ bias.query[row].double()).unsqueeze(-1)
    elif isinstance(bias, DecayBias):
        logits[:row] -= torch.arange(row - 1, -1, -1).unsqueeze(-1) * bias.time_decay.double().exp()
        logits[row] += bias.time_first.double()
    else:
        for s in range(first, row + 1):
            logits[s] += torch.stack([w(h, row, s) for h in range(n_key)])
    weights = torch.exp(logits - logits.amax(0))
    return (weights.unsqueeze(-1) * values[0, : row + 1].double()).sum(0) / weights.sum(0).unsqueeze(-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1e-38, 1e6, 3e38])
def test_any_finite_key_gives_finite_averages(variant: Variant, scale: float) -> None:
    """Keys up to the ends of float32. The average stays within the values it averages."""
    bias, n_key = shape(variant, d_model=4, n_head=2, window=3, d_bias=2, max_positions=99)
    random = torch.Generator().manual_seed(0)
    keys = scale * (2 * torch.rand(1, 99, n_key, generator=random) - 1)
    values = torch.rand(1, 99, n_key, 4 // n_key, generator=random)
    case = Case(spread_out(bias, 1.0, seed=0), keys, values)
    for y in (case.forward()[0], case.chunks([1, 40]), case.steps(), case.native()):
        assert torch.isfinite(y).all()
        assert y.min() >= values.min() - 1e-5
        assert y.max() <= values.max() + 1e-5


@pytest.mark.parametrize("jump", [0.0, 200.0])
def test_the_direct_form_stands_in_only_where_it_must(jump: float) -> None:
    """The factorised form must answer ordinary keys, or the parallel form of three variants would be slow."""
    keys = torch.randn(1, 64, 4) + jump * (torch.arange(64) > 32).view(1, 64, 1)
    case = Case(shape("simple", d_model=4)[0], keys, torch.randn(1, 64, 4, 1))
    with mock.patch.object(functions, "average_direct", wraps=functions.average_direct) as direct:
        case.forward()
    assert direct.called == (jump > 0)
