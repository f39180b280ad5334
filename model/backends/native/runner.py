"""A pass through a packed model as one list of operations: nothing of Python or PyTorch runs between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from model import ops
from model.backends.native.activation import Activation
from model.backends.native.calls import AddGated, Embed, Norm
from model.backends.native.calls import TokenShift as TokenShiftCall
from model.backends.native.compiler import Library
from model.backends.native.matrices import Format, HugePages, PackedMatrix, stored_format
from model.kernel import Kernel
from model.layers import AFTAttention, Block, FactorisedBias
from model.recurrences.aft_calls import AFTCall, FactorisedBiasCall
from model.recurrences.limits import KEY_BLOCK
from model.rwkv4 import CHANNEL_MIX, TIME_MIX, ChannelMix, RWKV4Block, TimeMix, TokenShift
from model.state import AFTState, LayerState
from model.transformer import AFTForCausalLM


class NativeRunner:
    """A `Runner` for CPUs. Tokens and states are bitwise the same in any batch, and however a text is cut."""

    is_exact = True

    def __init__(
        self,
        model: AFTForCausalLM,
        states: AFTState,
        chunk_size: int,
        kernels: Library,
        weight_format: Format | None = None,
    ) -> None:
        """As of `make_runner`; weight_format: of matrices, None for what loses nothing."""
        self.model = pack(model, kernels, weight_format)
        n_threads = torch.get_num_threads()
        self._logits = torch.zeros(states.batch_size, model.config.vocab_size)
        self._decoding = _Pass(self.model, states, states.batch_size, kernels, n_threads, logits=self._logits)
        self._reading_state = AFTState.concatenate([self.model.init_state(1)])
        self._reading = _Pass(self.model, self._reading_state, chunk_size, kernels, n_threads, one_sequence=True)

    @staticmethod
    def supports(model: AFTForCausalLM) -> bool:
        known = (AFTAttention, TimeMix)
        return model.device.type == "cpu" and all(isinstance(block.attention, known) for block in model.blocks)

    def step_(self, token_ids: Sequence[int]) -> Tensor:
        self._decoding(token_ids)
        return self._logits[: len(token_ids)]

    def read(self, token_ids: Sequence[int], state: AFTState | None) -> tuple[Tensor, AFTState]:
        self._reading_state.copy_(state or self.model.init_state(1))
        hidden = self._reading(token_ids)
        return hidden, self._reading_state.clone()


class _Pass:
    """The list for one token of each of the first sequences of `states`, or for some tokens of its only one."""

    def __init__(
        self,
        model: AFTForCausalLM,
        states: AFTState,
        n_rows: int,
        kernels: Library,
        n_threads: int,
        *,
        one_sequence: bool = False,
        logits: Tensor | None = None,
    ) -> None:
        """n_rows: tokens at most; the tensors of states are contiguous; logits [n_rows, V]: where they are wanted."""
        self._model, self._states, self._one_sequence, self._logits = model, states, one_sequence, logits
        self._n_threads = n_threads
        config = model.config
        assert config.d_ff is not None
        width = config.d_model
        self._ids, self._positions = (torch.zeros(n_rows, dtype=torch.long) for _ in range(2))
        self._x, self._normed, self._averages = (torch.zeros(n_rows, width) for _ in range(3))
        self._qkv, self._inner = torch.zeros(n_rows, 2 * width + config.n_key), torch.zeros(n_rows, config.d_ff)
        self._mixed = torch.zeros(3 if config.variant == "rwkv4" else 0, n_rows, width)
        is_factorised = config.variant in ("local", "full")
        self._bias = torch.zeros(n_rows if is_factorised else 0, config.bias_window, 1)
        self._scratch = torch.zeros(n_threads, max(1, config.bias_window - 1), KEY_BLOCK)
        self._program = kernels.program(list(self._calls()))

    def __call__(self, token_ids: Sequence[int]) -> Tensor:
        """Normalised outputs of the last block [B, C], valid until the next call; the states become the next ones."""
        n_rows = len(token_ids)
        if self._one_sequence:
            before, n_tokens = self._states.position, n_rows
            self._positions[:n_rows] = before + torch.arange(n_rows)
        else:
            before, n_tokens = self._states.position[:n_rows], 1
            self._positions[:n_rows] = before
        self._model.check_context(before, n_tokens)
        self._ids[:n_rows] = torch.tensor(token_ids)
        self._program.run(n_rows, self._n_threads)
        before += n_tokens
        return self._normed[:n_rows]

    def _calls(self) -> Iterator[Kernel]:
        model, x, normed = self._model, self._x, self._normed
        added = model.position_embedding.weight if model.position_embedding is not None else None
        yield Embed(self._ids, model.embedding.weight, self._positions, added, x)
        if model.embedding_norm is not None:
            yield self._norm(model.embedding_norm, x)
        for block, layer in zip(model.blocks, self._states.layers, strict=True):
            assert isinstance(block, Block | RWKV4Block)
            yield self._norm(block.attention_norm, normed)
            if isinstance(block, RWKV4Block):
                yield from self._time_mix(block.attention, layer)
            else:
                yield from self._attention(block.attention, layer)
            yield self._norm(block.feed_forward_norm, normed)
            if isinstance(block, RWKV4Block):
                yield from self._channel_mix(block.feed_forward, layer)
            else:
                yield _packed(block.feed_forward.up).call(normed, self._inner, activation=Activation.GELU)
                yield _packed(block.feed_forward.down).call(self._inner, x, adds=True)
        yield self._norm(model.norm, normed)
        if self._logits is not None:
            assert model.head is not None
            yield _packed(model.head).call(normed, self._logits)

    def _attention(self, attention: AFTAttention, layer: LayerState) -> Iterator[Kernel]:
        yield _packed(attention.qkv).call(self._normed, self._qkv)
        bias, positions = attention.bias, self._positions
        if isinstance(bias, FactorisedBias):  # differs from position to position: computed in each pass
            by_distance = self._bias
            yield FactorisedBiasCall(positions, bias.query, bias.key, by_distance.squeeze(2))
        else:
            by_distance = bias.by_distance(torch.zeros(1, dtype=torch.long)).contiguous()
        query, key, value = torch.split(self._qkv, attention.widths, 1)
        yield self._aft(query, key, value, by_distance, None, layer)
        yield _packed(attention.out).call(self._averages, self._x, adds=True)

    def _time_mix(self, mix: TimeMix, layer: LayerState) -> Iterator[Kernel]:
        yield self._token_shift(mix.shift, layer, TIME_MIX)
        width = self._x.shape[1]
        for_key, for_value, for_receptance = self._mixed
        receptance, key, value = torch.split(self._qkv, width, 1)
        yield _packed(mix.receptance).call(for_receptance, receptance)
        yield _packed(mix.key).call(for_key, key)
        yield _packed(mix.value).call(for_value, value)
        bias = mix.bias.by_distance(self._positions).contiguous()
        yield self._aft(receptance, key, value, bias, ops.decay_factors(mix.bias.decay), layer)
        yield _packed(mix.out).call(self._averages, self._x, adds=True)

    def _channel_mix(self, mix: ChannelMix, layer: LayerState) -> Iterator[Kernel]:
        yield self._token_shift(mix.shift, layer, CHANNEL_MIX)
        for_key, for_receptance, product = self._mixed
        yield _packed(mix.up).call(for_key, self._inner, activation=Activation.RELU_SQUARED)
        yield _packed(mix.down).call(self._inner, product)
        yield _packed(mix.receptance).call(for_receptance, self._averages)
        yield AddGated(self._averages, product, self._x)

    def _aft(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, decay_factors: Tensor | None, layer: LayerState
    ) -> Kernel:
        return AFTCall(
            query,
            key,
            value,
            self._positions,
            bias,
            decay_factors,
            reference=layer.running.reference,
            sums=layer.running.sums,
            compensation=layer.running.compensation,
            keys=layer.keys,
            values=layer.values,
            scratch=self._scratch,
            out=self._averages,
            one_sequence=self._one_sequence,
        )

    def _token_shift(self, shift: TokenShift, layer: LayerState, part: int) -> Kernel:
        mixed, last = self._mixed[: len(shift.mix)], layer.shifted[:, part]
        return TokenShiftCall(self._normed, shift.mix, last, mixed, one_sequence=self._one_sequence)

    def _norm(self, norm: nn.LayerNorm, output: Tensor) -> Kernel:
        return Norm(self._x, norm.weight, norm.bias, norm.eps, output)


class PackedLinear(nn.Module):
    """A packed matrix in the place of an `nn.Linear`."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32 -> [..., N]"""
        return self.matrix.multiply(x)


class WidenedEmbedding(nn.Embedding):
    """In bfloat16, half the bytes; the rows that are looked up are float32."""

    def forward(self, token_ids: Tensor) -> Tensor:
        return super().forward(token_ids).float()


def pack(model: AFTForCausalLM, kernels: Library, weight_format: Format | None = None) -> AFTForCausalLM:
    """The model with packed matrices, for reading only; it shares what is no matrix."""
    packed = AFTForCausalLM.empty(model.config)
    packed.load_state_dict(model.state_dict(), assign=True)
    packed.eval().requires_grad_(False)
    memory, embedding = HugePages(), model.embedding.weight

    def layer(weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return PackedLinear(PackedMatrix(weight, bias, kernels, weight_format or stored_format(weight.dtype), memory))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            packed.set_submodule(name, layer(module.weight, module.bias))
    if packed.head is None:
        packed.head = layer(embedding, None)
    if embedding.dtype == torch.bfloat16:
        packed.embedding = WidenedEmbedding(*embedding.shape, _weight=embedding)  # type: ignore[misc]
    for module in packed.modules():  # what is left is small, but for an embedding in float16
        if not isinstance(module, WidenedEmbedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return packed


def _packed(module: nn.Module) -> PackedMatrix:
    assert isinstance(module, PackedLinear)
    return module.matrix
