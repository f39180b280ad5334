"""The peer stories260K (karpathy, llama2.c): a Llama of 260 thousand parameters trained on all of TinyStories.

Reads the llama2.c "version 0" files: a flat float32 model and a table of scored tokens.
Shapes: T tokens, C = dim, N heads, M key-value heads, D = C / N.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

BOS = 1
FIRST_BYTE = 3  # token ids 3 .. 258 are the bytes


class Llama2cTokenizer:
    """Byte-pair merges by score, as llama2.c's `encode`."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        data, offset = path.read_bytes(), 4
        self.pieces: list[str] = []
        self.scores: list[float] = []
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, offset)
            self.pieces.append(data[offset + 8 : offset + 8 + length].decode())
            self.scores.append(score)
            offset += 8 + length
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for character in f" {text}":  # llama2.c puts a space before every text
            known = self.ids.get(character)
            ids += [known] if known is not None else [FIRST_BYTE + byte for byte in character.encode()]
        while True:
            merges = [
                (self.scores[merged], -i, merged)
                for i in range(len(ids) - 1)
                if (merged := self.ids.get(self.pieces[ids[i]] + self.pieces[ids[i + 1]])) is not None
            ]
            if not merges:
                return ids
            _, negative, merged = max(merges)
            ids[-negative : -negative + 2] = [merged]


class Llama2c:
    """The network, one sequence at a time."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.dim, hidden, self.n_layers, self.n_heads, self.n_kv_heads, self.vocab_size, self.seq_len = struct.unpack(
            "<7i", data[:28]
        )
        flat = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
        used = 0

        def take(*shape: int) -> Tensor:
            nonlocal used
            size = torch.Size(shape).numel()
            used += size
            return flat[used - size : used].view(shape)

        n, d = self.n_layers, self.dim
        d_kv = d * self.n_kv_heads // self.n_heads
        self.embedding = take(self.vocab_size, d)
        self.attention_norm = take(n, d)
        self.wq, self.wk, self.wv, self.wo = take(n, d, d), take(n, d_kv, d), take(n, d_kv, d), take(n, d, d)
        self.feed_forward_norm = take(n, d)
        self.w1, self.w2, self.w3 = take(n, hidden, d), take(n, d, hidden), take(n, hidden, d)
        self.norm = take(d)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [T] -> logits [T, V]"""
        x = self.embedding[tokens]
        n_tokens, d_head = len(tokens), self.dim // self.n_heads
        frequencies = 10000.0 ** (-torch.arange(0, d_head, 2) / d_head)
        angles = torch.outer(torch.arange(n_tokens), frequencies)
        rotation = torch.polar(torch.ones_like(angles), angles)  # [T, D/2]
        for i in range(self.n_layers):
            h = _rms_norm(x, self.attention_norm[i])
            q = _rotate((h @ self.wq[i].T).view(n_tokens, self.n_heads, d_head), rotation)
            k = _rotate((h @ self.wk[i].T).view(n_tokens, self.n_kv_heads, d_head), rotation)
            v = (h @ self.wv[i].T).view(n_tokens, self.n_kv_heads, d_head)
            heads = [part.transpose(0, 1).unsqueeze(0) for part in (q, k, v)]
            y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True, enable_gqa=True)
            x = x + y[0].transpose(0, 1).reshape(n_tokens, self.dim) @ self.wo[i].T
            h = _rms_norm(x, self.feed_forward_norm[i])
            x = x + (F.silu(h @ self.w1[i].T) * (h @ self.w3[i].T)) @ self.w2[i].T
        return _rms_norm(x, self.norm) @ self.embedding.T

    def text_nats(self, ids: list[int]) -> float:
        """Nats for `ids` after BOS. Beyond the trained length, each half window is read after the half before it."""
        tokens = torch.tensor([BOS, *ids])
        nats, scored = 0.0, 0
        for start in range(0, len(ids), self.seq_len // 2):
            window = tokens[start : start + self.seq_len + 1]
            losses = F.cross_entropy(self.logits(window[:-1]), window[1:], reduction="none")
            nats += float(losses[scored - start :].sum())
            scored = start + len(losses)
            if scored == len(ids):
                break
        return nats


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs; x [T, heads, D]."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * rotation.unsqueeze(1)).flatten(-2)
