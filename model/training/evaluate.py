"""Bits per character of a model on held-out documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from model.state import State
from model.tokenizer import Tokenizer

CHUNK = 512


class Reader(Protocol):
    """A language model, or what stands for one."""

    @property
    def device(self) -> torch.device: ...

    def __call__(self, token_ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        """token_ids [B, T] -> logits [B, T, V], and the state after them."""


@torch.inference_mode()
def bits_per_character(model: Reader, tokenizer: Tokenizer, documents: Sequence[str], *, batch_size: int = 16) -> float:
    """Bits that the model needs for the text of `documents`, each read alone from its start, per character.

    The first token is predicted from the end-of-text token, whether or not the tokenizer's texts begin with it: else
    its characters would cost nothing. The cost of predicting the end itself is left out, since it is not text.
    """
    start = tokenizer.end_of_text_id
    encoded = sorted(([start, *tokenizer.encode(document)] for document in documents), key=len)
    nats = 0.0
    for first in range(0, len(encoded), batch_size):
        rows = encoded[first : first + batch_size]
        tokens = torch.full((len(rows), len(rows[-1])), -1)  # padded on the right, which a causal model cannot see
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        nats += _text_nats(model, tokens.to(model.device))
    return nats / math.log(2) / sum(map(len, documents))


def _text_nats(model: Reader, tokens: Tensor) -> float:
    """Total nats of tokens [B, T + 1], in chunks: the logits of a long text would not fit into memory."""
    nats, state = 0.0, None
    for start in range(0, tokens.shape[1] - 1, CHUNK):
        chunk = tokens[:, start : start + CHUNK + 1]
        logits, state = model(chunk[:, :-1].clamp(min=0), state)
        nats += float(total_nats(logits, chunk[:, 1:]))
    return nats


def total_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy in nats of tokens [B, T], summed; logits [B, T, V], -1 is padding."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten().long(), ignore_index=-1, reduction="sum")
