"""Attention Free Transformers (Zhai et al. 2021) as recurrent language models."""

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
