"""Models on CPUs in C: a pass through a model is one list of kernels, and nothing of Python runs between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.activation import Activation
from model.backends.native import calls
from model.backends.native.compiler import Library
from model.backends.native.matrices import Format, HugePages, PackedMatrix, stored_format
from model.kernel import Kernel, Rows
from model.language_model import LanguageModel
from model.ops import Matrix, Recurrence
from model.state import Layer, State


class NativeRunner:
    """A `Runner` for CPUs. Logits and states are bitwise the same in any batch, and however a text is cut."""

    is_batch_invariant = True

    def __init__(
        self,
        model: LanguageModel,
        states: State,
        chunk_size: int,
        kernels: Library,
        weight_format: Format | None = None,
    ) -> None:
        """states: of all slots, contiguous, stepped in place; weight_format: None leaves weights as they are."""
        self._config, self._states, self._empty = model.config, states, model.init_state(1)
        self._one_state = model.init_state(1)
        weights = Weights(model, kernels, weight_format)
        self._head = weights.matrix(model.output)
        self._decoding = Pass(model, states.layers, weights, states.batch_size, with_logits=True)
        self._reading = Pass(model, self._one_state.layers, weights, chunk_size, one_sequence=True)
        self.weight_bytes = weights.nbytes

    @staticmethod
    def supports(model: LanguageModel, kernels: Library) -> bool:
        """Whether there is a kernel for all that the model does, where its weights are."""
        recurrences = [module for module in model.modules() if isinstance(module, Recurrence)]
        written = all(r.functions and all(map(kernels.has, r.functions)) for r in recurrences)
        return model.device.type == "cpu" and written

    @property
    def n_kernels(self) -> int:
        """Kernels of a step."""
        return len(self._decoding.calls)

    def step_(self, token_ids: Sequence[int]) -> Tensor:
        position = self._states.position[: len(token_ids)]
        self._config.check_context(position, 1)
        logits = self._decoding.run(token_ids, position)
        position += 1
        return logits

    def read(self, token_ids: Sequence[int], state: State | None, n_logits: int = 0) -> tuple[Tensor, State]:
        n_tokens = len(token_ids)
        self._one_state.copy_(state or self._empty)
        self._config.check_context(self._one_state.position, n_tokens)
        hidden = self._reading.run(token_ids, self._one_state.position + torch.arange(n_tokens))
        self._one_state.position.add_(n_tokens)
        return self._head.multiply(hidden[n_tokens - n_logits :]), self._one_state.clone()


class Weights:
    """A model's parameters as kernels read them; each is made once, for all passes."""

    def __init__(self, model: LanguageModel, kernels: Library, weight_format: Format | None) -> None:
        self.kernels, self._format, self._memory = kernels, weight_format, HugePages()
        self._is_fine = {id(module): model.is_fine(name) for name, module in model.named_modules()}
        self._matrices: dict[int, PackedMatrix] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices."""
        return sum(matrix.nbytes for matrix in self._matrices.values())

    def matrix(self, matrix: Matrix) -> PackedMatrix:
        if id(matrix) not in self._matrices:
            weight, bias = matrix.weight, matrix.bias if isinstance(matrix, nn.Linear) else None
            given = None if self._is_fine[id(matrix)] else self._format
            chosen = given or stored_format(weight.dtype)
            self._matrices[id(matrix)] = PackedMatrix(weight, bias, self.kernels, chosen, self._memory)
        return self._matrices[id(matrix)]

    @staticmethod
    def table(embedding: nn.Embedding) -> Tensor:
        """bfloat16 stays, in half the bytes."""
        weight = embedding.weight.detach()
        return weight if weight.dtype == torch.bfloat16 else weight.float()


class Pass:
    """`Ops` that write a list of kernels, and the list: one token for each of the first sequences of a state, or, for
    one_sequence, successive tokens of the only one. A row does not depend on the others. Rows are [n_rows, ...].
    """

    def __init__(
        self,
        model: LanguageModel,
        layers: Sequence[Layer],
        weights: Weights,
        n_rows: int,
        *,
        one_sequence: bool = False,
        with_logits: bool = False,
    ) -> None:
        """layers: contiguous, stepped in place; n_rows: tokens at most."""
        self.n_rows, self.one_sequence, self._weights = n_rows, one_sequence, weights
        self.n_threads = torch.get_num_threads()
        self.positions, self._ids = (torch.zeros(n_rows, dtype=torch.long) for _ in range(2))
        self.calls: list[Kernel] = []
        self._free: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        hidden, _ = model.run(self, layers)
        self._result = self.linear(hidden, model.output) if with_logits else hidden
        self._tasks = weights.kernels.tasks(self.calls)
        del self._weights  # what the kernels need, they keep

    def run(self, token_ids: Sequence[int], positions: Tensor) -> Tensor:
        """Logits [B, V], or normalised outputs of the last block [B, C], valid until the next run; the layers become
        the next ones.
        """
        n_rows = len(token_ids)
        self._ids[:n_rows] = torch.tensor(token_ids)
        self.positions[:n_rows] = positions
        self._tasks.run(n_rows, self.n_threads)
        return self._result.tensor[:n_rows]

    # What recurrences write with.

    def memory(self, *shape: int) -> Rows:
        free = self._free[shape]
        return Rows(free.pop() if free else torch.zeros(shape), lambda tensor: self._free[shape].append(tensor))

    def add(self, kernel: Kernel) -> None:
        self.calls.append(kernel)

    # The verbs.

    def embed(self, table: nn.Embedding, positions: nn.Embedding | None = None) -> Rows:
        x = self.memory(self.n_rows, table.embedding_dim)
        added = None if positions is None else positions.weight.detach().float()
        self.add(calls.Embed(self._ids, self._weights.table(table), self.positions, added, x.tensor))
        return x

    def norm(self, x: Rows, norm: nn.LayerNorm) -> Rows:
        out = self.memory(*x.tensor.shape)
        weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
        self.add(calls.Norm(x.tensor, weight, bias, norm.eps, out.tensor))
        return out

    def linear(
        self, x: Rows, matrix: Matrix, activation: Activation = Activation.NONE, *, adds_to: Rows | None = None
    ) -> Rows:
        packed = self._weights.matrix(matrix)
        out = adds_to or self.memory(self.n_rows, packed.n_out)
        self.add(packed.call(x.tensor, out.tensor, activation=activation, adds=adds_to is not None))
        return out

    def split(self, x: Rows, widths: Sequence[int]) -> Sequence[Rows]:
        return [x.part(part) for part in torch.split(x.tensor, list(widths), 1)]

    def beside(self, *pairs: tuple[Rows, Matrix]) -> Sequence[Rows]:
        packed = [self._weights.matrix(matrix) for _, matrix in pairs]
        widths = [matrix.n_out for matrix in packed]
        parts = self.split(self.memory(self.n_rows, sum(widths)), widths)
        for (x, _), matrix, out in zip(pairs, packed, parts, strict=True):
            self.add(matrix.call(x.tensor, out.tensor))
        return parts

    def shift(self, x: Rows, mix: Tensor, shifted: Tensor, part: int) -> tuple[Sequence[Rows], Tensor]:
        out = self.memory(len(mix), *x.tensor.shape)
        last, mix = shifted[:, part], mix.detach().float()
        self.add(calls.TokenShift(x.tensor, mix, last, out.tensor, one_sequence=self.one_sequence))
        return [out.part(row) for row in out.tensor], shifted

    def add_gated(self, x: Rows, gate: Rows, y: Rows) -> Rows:
        self.add(calls.AddGated(gate.tensor, y.tensor, x.tensor))
        return x

    def recur(self, recurrence: Recurrence, *rows: Rows, layer: Any) -> tuple[Rows, Any]:
        return recurrence.write(rows, layer, self), layer
