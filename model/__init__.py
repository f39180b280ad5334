"""Attention Free Transformers (Zhai et al. 2021) as recurrent language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.checkpoint import load_checkpoint, save_checkpoint
    from model.config import AFTConfig
    from model.state import AFTState
    from model.tokenizer import SentencePieceTokenizer, Tokenizer
    from model.transformer import AFTForCausalLM

__all__ = [
    "AFTConfig",
    "AFTForCausalLM",
    "AFTState",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_checkpoint",
    "save_checkpoint",
]

MODULES = {
    "AFTConfig": "config",
    "AFTForCausalLM": "transformer",
    "AFTState": "state",
    "SentencePieceTokenizer": "tokenizer",
    "Tokenizer": "tokenizer",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> object:
    """Imported when it is asked for: modules of the package that need no PyTorch come without its seconds."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
