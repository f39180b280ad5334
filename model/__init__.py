"""Attention Free Transformers (Zhai et al. 2021) and their descendants as recurrent language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.checkpoint import load_checkpoint, save_checkpoint
    from model.families.aft import AFTConfig, AFTForCausalLM
    from model.families.rwkv4 import RWKV4Config, RWKV4ForCausalLM
    from model.language_model import LanguageModel
    from model.state import State
    from model.tokenizer import SentencePieceTokenizer, Tokenizer

# Imported when they are asked for: the kernels are compiled, and errors are told, without the seconds of PyTorch.
_MODULES = {
    "AFTConfig": "model.families.aft",
    "AFTForCausalLM": "model.families.aft",
    "LanguageModel": "model.language_model",
    "RWKV4Config": "model.families.rwkv4",
    "RWKV4ForCausalLM": "model.families.rwkv4",
    "SentencePieceTokenizer": "model.tokenizer",
    "State": "model.state",
    "Tokenizer": "model.tokenizer",
    "load_checkpoint": "model.checkpoint",
    "save_checkpoint": "model.checkpoint",
}

__all__ = [
    "AFTConfig",
    "AFTForCausalLM",
    "LanguageModel",
    "RWKV4Config",
    "RWKV4ForCausalLM",
    "SentencePieceTokenizer",
    "State",
    "Tokenizer",
    "load_checkpoint",
    "save_checkpoint",
]

if not TYPE_CHECKING:  # to whom every name would be one of this module

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'model' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)
