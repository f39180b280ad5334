"""Settings of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Raises ConfigurationError, naming the field, for values out of range.

    max_num_seqs            texts decoded at a time
    state_memory            bytes for their states; if it is too small for max_num_seqs, fewer are decoded
    max_queue_length        requests that may wait; beyond them, OverloadedError
    chunk_size              tokens of a prompt read at a time; other texts wait that long for their next token
    max_num_batched_tokens  tokens of a step, decoded and read together; None is max_num_seqs + chunk_size
    prefix_cache_bytes      memory for states after prompts that may come again; 0 turns the cache off
    batch_invariant         every request gives bitwise the same tokens and log-probabilities alone and in any batch,
                            with and without cached prefixes, at the price of always decoding a full batch (measured
                            on CPUs; log-probabilities of vocabularies over 32,768 tokens may differ in the last bit)
    """

    max_num_seqs: int = 32
    state_memory: int = 2**30
    max_queue_length: int = 256
    chunk_size: int = 256
    max_num_batched_tokens: int | None = None
    prefix_cache_bytes: int = 2**28
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "state_memory", "chunk_size"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("max_queue_length", "prefix_cache_bytes"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} must be at least 0, not {getattr(self, name)}.")
        if self.batched_tokens < self.max_num_seqs + self.chunk_size:
            least = self.max_num_seqs + self.chunk_size
            raise ConfigurationError(
                f"max_num_batched_tokens must be at least max_num_seqs + chunk_size = {least}, so prompts are read "
                f"while a full batch is decoded, not {self.max_num_batched_tokens}."
            )

    @property
    def batched_tokens(self) -> int:
        given = self.max_num_batched_tokens
        return self.max_num_seqs + self.chunk_size if given is None else given
