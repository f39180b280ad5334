"""Settings of the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.backends.native.matrices import FORMATS
from server.errors import ConfigurationError
from server.settings import LONGEST, MIB, check, setting

DEFAULT_MAX_MODEL_LEN = 2**20


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Raises ConfigurationError, naming the field, for values out of range. Sizes are in bytes.

    max_model_len that is left out is DEFAULT_MAX_MODEL_LEN for a model that can read any number. What batch_invariant
    makes the same are tokens and log-probabilities, with and without cached prefixes; the compiled kernels always do.
    Where PyTorch runs the model, the price is always decoding a full batch.
    """

    max_model_len: int | None = setting(
        None, "Tokens of a prompt and its text together; what the model can read if left out.", at_least=2
    )
    max_num_seqs: int = setting(32, "Texts that are decoded at a time.", at_least=1, at_most=2**16)
    state_memory: int = setting(2**30, "for their states; a bound on --max-num-seqs.", unit="MiB", positive=True)
    max_queue_length: int = setting(256, "Requests that may wait; beyond it, 429.", at_least=0)
    max_num_seqs_per_key: int | None = setting(
        None, "Of --max-num-seqs, those of one API key; three quarters if left out and there are several.", at_least=1
    )
    max_requests_per_key: int | None = setting(
        None, "Requests of one API key that run or wait; three quarters of all as above.", at_least=1
    )
    step_timeout: float = setting(
        30.0, "Seconds after which a step that has not ended shows in /health.", positive=True, at_most=LONGEST
    )
    chunk_size: int = setting(
        256, "Tokens of a prompt read at a time, between tokens of others.", at_least=1, at_most=2**16
    )
    prefix_cache_bytes: int = setting(
        2**28, "of states after prompts that may come again.", name="prefix_cache", unit="MiB", at_least=0
    )
    max_grammar_length: int = setting(2**16, "Characters of a JSON schema or regular expression.", at_least=1)
    grammar_timeout: float = setting(
        5.0, "Seconds of computing in which a grammar must compile.", positive=True, at_most=LONGEST
    )
    batch_invariant: bool = setting(False, "Bitwise the same text in any batch; slower where no compiled kernels run.")
    quantize: str | None = setting(
        None, "Format that matrices are kept in, if not as they are stored; CPUs only.", choices=tuple(FORMATS)
    )

    def __post_init__(self) -> None:
        check(self)

    def n_slots(self, state_bytes: int) -> int:
        """Texts that are decoded at a time, if the state of one has that many bytes.

        Raises ConfigurationError where there is no memory for one.
        """
        n_states = self.state_memory // state_bytes
        if n_states < 1:
            raise ConfigurationError(
                f"state_memory must be at least {math.ceil(state_bytes / MIB)} MiB, for the {state_bytes} bytes of one "
                f"state, not {self.state_memory / MIB:g} MiB."
            )
        return min(self.max_num_seqs, n_states)

    def capacity(self, state_bytes: int) -> int:
        """Requests of one text that an engine takes at a time, waiting ones included. Raises as `n_slots`."""
        return self.n_slots(state_bytes) + self.max_queue_length

    def share_of_one(self, configured: int | None, total: int, n_owners: int) -> int:
        """What one of several API keys may have of `total`: some is left for the others, whatever it asks for."""
        if configured is not None:
            return min(configured, total)
        return total if n_owners < 2 else max(1, total * 3 // 4)
