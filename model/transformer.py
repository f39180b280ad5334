"""The AFT language model. Shapes: B sequences, T tokens, V vocabulary, C = d_model."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model.config import AFTConfig
from model.errors import ContextLengthError
from model.layers import Block
from model.rwkv4 import RWKV4Block
from model.state import AFTState


class _NoInitialisation(TorchFunctionMode):
    """There is nothing to initialise on the meta device, and PyTorch would import its compiler to do it: a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func is Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class AFTForCausalLM(nn.Module):
    """Decoder of AFT or RWKV-4 blocks.

    `forward` reads any number of tokens from any state; `step` reads one. Both are the same function of the tokens.
    """

    def __init__(self, config: AFTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = (
            nn.Embedding(config.max_positions, config.d_model) if config.position_embeddings else None
        )
        is_rwkv4 = config.variant == "rwkv4"
        self.embedding_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps) if is_rwkv4 else None
        self.blocks = nn.ModuleList(RWKV4Block(config) if is_rwkv4 else Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        # The output projection, where it is not the embedding or has another form.
        self.head: nn.Module | None = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._init_weights()
        self.to(getattr(torch, config.dtype))

    @classmethod
    def empty(cls, config: AFTConfig) -> Self:
        """A model on the meta device, without memory, whose tensors are to be assigned."""
        with torch.device("meta"), _NoInitialisation():
            return cls(config)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def init_state(self, batch_size: int) -> AFTState:
        """The state before the first token."""
        position = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        return AFTState(position, tuple(b.attention.init_state(batch_size, self.device) for b in self._blocks()))

    def forward(self, token_ids: Tensor, state: AFTState | None = None) -> tuple[Tensor, AFTState]:
        """token_ids [B, T], T >= 1 -> logits [B, T, V] in float32, and the state after the last token.

        Raises ContextLengthError past `config.context_limit`.
        """
        hidden, state = self.hidden(token_ids, state)
        return self.logits(hidden), state

    def prefill(self, token_ids: Tensor, state: AFTState | None = None) -> tuple[Tensor, AFTState]:
        """As `forward`, but only the logits [B, V] after the last token."""
        hidden, state = self.hidden(token_ids, state)
        return self.logits(hidden[:, -1]), state

    def hidden(self, token_ids: Tensor, state: AFTState | None = None) -> tuple[Tensor, AFTState]:
        """token_ids [B, T] -> normalised outputs of the last block [B, T, C], and the state."""
        if token_ids.ndim != 2 or token_ids.shape[1] < 1:
            raise ValueError(f"token_ids must be [batch, tokens] with at least one token, not {list(token_ids.shape)}.")
        n_tokens = token_ids.shape[1]
        position = state.position if state else torch.zeros(token_ids.shape[0], dtype=torch.long, device=self.device)
        self.check_context(position, n_tokens)
        positions = position[:, None] + torch.arange(n_tokens, device=self.device)
        x = self._embed(token_ids, positions)
        layers = []
        # From the start, every sequence is at position 0, and one bias serves the whole batch.
        bias_position = position if state else position[:1]
        for i, block in enumerate(self._blocks()):
            x, layer = block(x, bias_position, state.layers[i] if state else None)
            layers.append(layer)
        hidden: Tensor = self.norm(x)
        return hidden, AFTState(position + n_tokens, tuple(layers))

    def step(self, token_ids: Tensor, state: AFTState) -> tuple[Tensor, AFTState]:
        """token_ids [B], one per sequence -> logits [B, V] in float32, and the state after them."""
        state = state.clone()
        return self.step_(token_ids, state), state

    def step_(self, token_ids: Tensor, state: AFTState) -> Tensor:
        """As `step`, but `state` itself becomes the state after the tokens."""
        if token_ids.shape != state.position.shape:
            raise ValueError(f"token_ids must be [{state.batch_size}] as the state, not {list(token_ids.shape)}.")
        self.check_context(state.position, 1)
        return self.advance_(token_ids, state)

    def advance_(self, token_ids: Tensor, state: AFTState) -> Tensor:
        """`step_` without checks, which wait for the device."""
        x = self._embed(token_ids, state.position)
        for block, layer in zip(self._blocks(), state.layers, strict=True):
            x = block.step_(x, state.position, layer)
        state.position.add_(1)
        return self.logits(self.norm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> logits [..., V] in float32."""
        logits: Tensor = self.head(hidden) if self.head else F.linear(hidden, self.embedding.weight)
        return logits.float()

    def _blocks(self) -> list[Block | RWKV4Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def _embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.embedding(token_ids)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def check_context(self, position: Tensor, n_tokens: int) -> None:
        """Raises ContextLengthError if that many tokens from position [B] on are more than the model can read."""
        limit = self.config.context_limit
        if limit is None:
            return
        end = n_tokens + int(position.max())
        if end > limit:
            raise ContextLengthError(f"A sequence of {end} tokens exceeds the model's max_positions = {limit}.")

    def _init_weights(self) -> None:
        """Normal with std 0.02; the projections into the residual stream are scaled down by its depth (GPT-2)."""
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_residual = name.endswith(("attention.out", "feed_forward.down"))
                nn.init.normal_(module.weight, std=residual_std if is_residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
