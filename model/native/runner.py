"""A pass through a packed model as one list of operations: nothing of Python or PyTorch runs between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.layers import AFTAttention, Block, FactorisedBias
from model.native import operations
from model.native.library import Library, Operation
from model.native.linear import PackedLinear, pack
from model.native.operations import BLOCK, Activation
from model.rwkv4 import CHANNEL_MIX, TIME_MIX, ChannelMix, RWKV4Block, TimeMix, TokenShift
from model.state import AFTState, LayerState
from model.transformer import AFTForCausalLM


class NativeRunner:
    """A `Runner` for CPUs. Tokens and states are bitwise the same in any batch, and however a text is cut."""

    is_exact = True

    def __init__(
        self, model: AFTForCausalLM, states: AFTState, chunk_size: int, kernels: Library, *, int8: bool = False
    ) -> None:
        """As of `make_runner`."""
        self.model = pack(model, kernels, int8=int8)
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
        self._kernels, self._n_threads = kernels, n_threads
        config = model.config
        assert config.d_ff is not None
        width = config.d_model
        self._ids, self._positions = (torch.zeros(n_rows, dtype=torch.long) for _ in range(2))
        self._x, self._normed, self._averages = (torch.zeros(n_rows, width) for _ in range(3))
        self._qkv, self._inner = torch.zeros(n_rows, 2 * width + config.n_key), torch.zeros(n_rows, config.d_ff)
        self._mixed = torch.zeros(3 if config.variant == "rwkv4" else 0, n_rows, width)
        is_factorised = config.variant in ("local", "full")
        self._bias = torch.zeros(n_rows if is_factorised else 0, config.bias_window, 1)
        self._scratch = torch.zeros(n_threads, max(1, config.bias_window - 1), BLOCK)
        listed = list(self._operations())
        self._keep = [operation.keep for operation in listed]
        self._listed = (Operation * len(listed))(*listed)

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
        self._kernels.run(self._listed, n_rows, self._n_threads)
        before += n_tokens
        return self._normed[:n_rows]

    def _operations(self) -> Iterator[Operation]:
        model, x, normed = self._model, self._x, self._normed
        added = model.position_embedding.weight if model.position_embedding is not None else None
        yield operations.embed(self._ids, model.embedding.weight, self._positions, added, x)
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
                yield _packed(block.feed_forward.up).operation(normed, self._inner, activation=Activation.GELU)
                yield _packed(block.feed_forward.down).operation(self._inner, x, adds=True)
        yield self._norm(model.norm, normed)
        if self._logits is not None:
            assert model.head is not None
            yield _packed(model.head).operation(normed, self._logits)

    def _attention(self, attention: AFTAttention, layer: LayerState) -> Iterator[Operation]:
        yield _packed(attention.qkv).operation(self._normed, self._qkv)
        bias, positions = attention.bias, self._positions
        if isinstance(bias, FactorisedBias):  # differs from position to position: computed in each pass
            by_distance = self._bias
            yield operations.factorised_bias(positions, bias.query, bias.key, by_distance.squeeze(2))
        else:
            by_distance = bias.by_distance(torch.zeros(1, dtype=torch.long)).contiguous()
        yield operations.aft(
            self._qkv, positions, by_distance, layer, self._scratch, self._averages, one_sequence=self._one_sequence
        )
        yield _packed(attention.out).operation(self._averages, self._x, adds=True)

    def _time_mix(self, mix: TimeMix, layer: LayerState) -> Iterator[Operation]:
        yield self._token_shift(mix.shift, layer, TIME_MIX)
        width = self._x.shape[1]
        for_key, for_value, for_receptance = self._mixed
        receptance, key, value = torch.split(self._qkv, width, 1)
        yield _packed(mix.receptance).operation(for_receptance, receptance)
        yield _packed(mix.key).operation(for_key, key)
        yield _packed(mix.value).operation(for_value, value)
        positions, bias = self._positions, mix.bias.by_distance(self._positions).contiguous()
        yield operations.aft(
            self._qkv,
            positions,
            bias,
            layer,
            self._scratch,
            self._averages,
            decay=mix.bias.decay,
            one_sequence=self._one_sequence,
        )
        yield _packed(mix.out).operation(self._averages, self._x, adds=True)

    def _channel_mix(self, mix: ChannelMix, layer: LayerState) -> Iterator[Operation]:
        yield self._token_shift(mix.shift, layer, CHANNEL_MIX)
        for_key, for_receptance, product = self._mixed
        yield _packed(mix.up).operation(for_key, self._inner, activation=Activation.RELU_SQUARED)
        yield _packed(mix.down).operation(self._inner, product)
        yield _packed(mix.receptance).operation(for_receptance, self._averages)
        yield operations.add_gated(self._averages, product, self._x)

    def _token_shift(self, shift: TokenShift, layer: LayerState, part: int) -> Operation:
        mixed = self._mixed[: len(shift.mix)]
        return operations.token_shift(self._normed, shift.mix, layer, part, mixed, one_sequence=self._one_sequence)

    def _norm(self, norm: torch.nn.LayerNorm, output: Tensor) -> Operation:
        return operations.norm(self._x, norm.weight, norm.bias, norm.eps, output)


def _packed(module: torch.nn.Module) -> PackedLinear:
    assert isinstance(module, PackedLinear)
    return module
