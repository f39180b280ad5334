"""What the language models of all families share. Shapes: B sequences, T tokens, V vocabulary, C = d_model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.config import ModelConfig
from model.errors import CheckpointError
from model.ops import EagerOps, Matrix, Ops, X
from model.state import Layer, State


class _NoInitialisation(TorchFunctionMode):
    """There is nothing to initialise on the meta device, and PyTorch would import its compiler to do it: a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func is Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """One block of a family, described over the verbs of `Ops`."""

    def run(self, ops: Ops[X], x: X, layer: Any) -> tuple[X, Any]:
        """x and this block's layer of the state -> those after it."""
        raise NotImplementedError


class LanguageModel(nn.Module):
    """A decoder. A family adds its blocks, says what a layer's state is, and then calls `initialise`.

    `forward` reads any number of tokens from any state; `step` reads one. Both are the same function of the tokens.
    """

    config_class: ClassVar[type[ModelConfig]]
    state_version: ClassVar[int] = 1  # of the layers' tensors in files; another number makes older files unreadable
    residual: ClassVar[tuple[str, ...]] = ()  # ends of the names of projections into the residual stream
    foreign_type: ClassVar[str | None] = None  # "model_type" of the family's checkpoints in Hugging Face transformers

    blocks: nn.ModuleList

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        # The output projection, where it is not the embedding.
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    def initialise(self) -> None:
        """Normal with std 0.02; the projections into the residual stream are scaled down by its depth (GPT-2)."""
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=residual_std if name.endswith(self.residual) else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.to(getattr(torch, self.config.dtype))

    @classmethod
    def empty(cls, config: ModelConfig) -> Self:
        """A model on the meta device, without memory, whose tensors are to be assigned."""
        with torch.device("meta"), _NoInitialisation():
            return cls(config)

    # What a family says.

    def empty_layer(self, batch_size: int, device: torch.device) -> Layer:
        """The state of one layer before the first token."""
        raise NotImplementedError

    def embed(self, ops: Ops[X]) -> X:
        """What the first block gets."""
        return ops.embed(self.embedding)

    def run(self, ops: Ops[X], layers: Sequence[Layer]) -> tuple[X, tuple[Layer, ...]]:
        """Normalised outputs of the last block, and the layers after the tokens."""
        x, after = self.embed(ops), []
        for block, layer in zip(cast("Iterable[Block]", self.blocks), layers, strict=True):
            x, layer = block.run(ops, x, layer)
            after.append(layer)
        return ops.norm(x, self.norm), tuple(after)

    @classmethod
    def is_possible(cls, layer: Any, position: int) -> bool:
        """Whether `position` tokens of one text can have left this layer of a state, whose tensors have its shapes."""
        return all(bool(tensor.isfinite().all()) for tensor in layer)

    def is_fine(self, name: str) -> bool:
        """Whether the matrix of that name must keep all its digits, whatever the weights' format is."""
        return False

    @classmethod
    def older_config(cls, fields: Mapping[str, Any]) -> ModelConfig | None:
        """The configuration that a config.json holds, if an older version wrote it for this family."""
        return None

    @classmethod
    def has_author_names(cls, names: Collection[str]) -> bool:
        """Whether these are the tensors of a checkpoint of the family's author."""
        return False

    @classmethod
    def from_foreign(cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """Configuration, and tensors by our names, of a checkpoint of `foreign_type` or of the family's author.

        described: config.json, {} if there is none. May raise KeyError for a tensor that is missing.
        """
        raise CheckpointError(f"There are no checkpoints of {cls.config_class.family} to convert.")

    # What follows from it.

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def output(self) -> Matrix:
        """The matrix from the last block's outputs to logits."""
        return self.head or self.embedding

    def init_state(self, batch_size: int) -> State:
        """The state before the first token."""
        position = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        return State(position, tuple(self.empty_layer(batch_size, self.device) for _ in range(self.config.n_layer)))

    def forward(self, token_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """token_ids [B, T], T >= 1 -> logits [B, T, V] in float32, and the state after the last token.

        Raises ContextLengthError past `config.context_limit`.
        """
        hidden, state = self.hidden(token_ids, state)
        return self.logits(hidden), state

    def prefill(self, token_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As `forward`, but only the logits [B, V] after the last token."""
        hidden, state = self.hidden(token_ids, state)
        return self.logits(hidden[:, -1]), state

    def hidden(self, token_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """token_ids [B, T] -> normalised outputs of the last block [B, T, C], and the state."""
        if token_ids.ndim != 2 or token_ids.shape[1] < 1:
            raise ValueError(f"token_ids must be [batch, tokens] with at least one token, not {list(token_ids.shape)}.")
        batch_size, n_tokens = token_ids.shape
        before = state or self.init_state(1).expand(batch_size)
        self.config.check_context(before.position, n_tokens)
        ops = EagerOps(token_ids, before.position, starts=state is None)
        hidden, layers = self.run(ops, before.layers)
        return hidden, State(before.position + n_tokens, layers)

    def step(self, token_ids: Tensor, state: State) -> tuple[Tensor, State]:
        """token_ids [B], one per sequence -> logits [B, V] in float32, and the state after them."""
        state = state.clone()
        return self.step_(token_ids, state), state

    def step_(self, token_ids: Tensor, state: State) -> Tensor:
        """As `step`, but `state` itself becomes the state after the tokens."""
        if token_ids.shape != state.position.shape:
            raise ValueError(f"token_ids must be [{state.batch_size}] as the state, not {list(token_ids.shape)}.")
        self.config.check_context(state.position, 1)
        return self.advance_(token_ids, state)

    def advance_(self, token_ids: Tensor, state: State, ops: type[EagerOps] = EagerOps) -> Tensor:
        """`step_` without checks, which wait for the device."""
        hidden, _ = self.run(ops(token_ids.unsqueeze(1), state.position, in_place=True), state.layers)
        state.position.add_(1)
        return self.logits(hidden[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] -> logits [..., V] in float32."""
        return nn.functional.linear(hidden, self.output.weight).float()
