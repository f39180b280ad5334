"""Settings of the engine."""

from __future__ import annotations

from dataclasses import dataclass

from model.runner import Quantization

from server.errors import ConfigurationError

DEFAULT_MAX_MODEL_LEN = 2**20


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Raises ConfigurationError, naming the field, for values out of range.

    max_model_len           tokens of a prompt and its text together at most; None is what the model can read, or
                            DEFAULT_MAX_MODEL_LEN if it can read any number
    max_num_seqs            texts decoded at a time
    state_memory            bytes for their states; if it is too small for max_num_seqs, fewer are decoded
    max_queue_length        requests that may wait; beyond them, OverloadedError
    chunk_size              tokens of a prompt read at a time; other texts wait that long for their next token
    max_num_batched_tokens  tokens of a step, decoded and read together; None is max_num_seqs + chunk_size
    prefix_cache_bytes      memory for states after prompts that may come again; 0 turns the cache off
    max_grammar_length      characters of a JSON schema or regular expression at most
    grammar_timeout         seconds in which it must compile
    batch_invariant         every request gives bitwise the same tokens and log-probabilities alone and in any batch,
                            with and without cached prefixes. The compiled kernels always do; where PyTorch runs the
                            model, the price is always decoding a full batch, and log-probabilities of vocabularies
                            over 32,768 tokens may differ in the last bit
    quantize                "int8" keeps matrices as whole numbers of 8 bits, a scale for each row; CPUs only
    """

    max_model_len: int | None = None
    max_num_seqs: int = 32
    state_memory: int = 2**30
    max_queue_length: int = 256
    chunk_size: int = 256
    max_num_batched_tokens: int | None = None
    prefix_cache_bytes: int = 2**28
    max_grammar_length: int = 2**16
    grammar_timeout: float = 5.0
    batch_invariant: bool = False
    quantize: Quantization | None = None

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigurationError(f"max_model_len must be at least 2, not {self.max_model_len}.")
        if not self.grammar_timeout > 0:
            raise ConfigurationError(f"grammar_timeout must be positive, not {self.grammar_timeout}.")
        for name in ("max_num_seqs", "state_memory", "chunk_size", "max_grammar_length"):
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
