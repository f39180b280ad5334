"""What the users of an engine may know of it and of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from model.tokenizer import Tokenizer
from server.engine.llm_engine import LLMEngine


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Nothing here changes while the engine lives.

    fingerprint    of the model's parameters, and of how they are kept
    variant        of the model's architecture
    parameters     how many the model has
    model_dtype    of the checkpoint's tensors, device_type where they are: "cpu", "cuda" ...
    max_model_len  tokens of a prompt and its text together at most
    n_slots        texts decoded at a time
    capacity       requests that are run or wait at a time: one for each slot, and the queue
    state_bytes    of one conversation in memory, at any length
    file_bytes     of one conversation as a file, at most
    kv_cache_bytes_per_token  what a Transformer of the same shape would add for each token
    """

    tokenizer: Tokenizer
    fingerprint: bytes
    variant: str
    parameters: int
    model_dtype: str
    device_type: str
    max_model_len: int
    n_slots: int
    capacity: int
    state_bytes: int
    file_bytes: int
    kv_cache_bytes_per_token: int

    @classmethod
    def of(cls, engine: LLMEngine) -> Self:
        config, n_slots = engine.model_config, engine.pool.n_slots
        state_bytes = engine.pool.nbytes // n_slots
        return cls(
            tokenizer=engine.tokenizer,
            fingerprint=engine.fingerprint,
            variant=config.architecture,
            parameters=engine.num_parameters,
            model_dtype=config.dtype,
            device_type=engine.device.type,
            max_model_len=engine.max_model_len,
            n_slots=n_slots,
            capacity=engine.config.capacity(state_bytes),
            state_bytes=state_bytes,
            file_bytes=engine.state_files.max_bytes,
            kv_cache_bytes_per_token=2 * config.n_layer * config.d_model * 4,
        )
