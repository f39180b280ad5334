"""Small models and tokenizers that tests share."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, settings

from model import AFTConfig, LanguageModel, RWKV4Config, SentencePieceTokenizer, Tokenizer, save_checkpoint
from model.config import ModelConfig
from model.families import family_of
from model.tokenizer import END_OF_TEXT

# Tiny tensors gain nothing from a second thread, and waiting for it makes tests on two cores several times slower.
torch.set_num_threads(1)

# Shells start what is in the background with it ignored, and so would be every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes, or takes to make, says more about the machine than about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="how often tests/e2e/test_crashes.py kills, for each store")


STORIES = [
    "Once upon a time there was a red fox. It lived in a small house by the sea.\n\nOne day it met a blue bird.",
    "The bird said, “Good morning, fox!” The fox said, “Good morning, bird!”\n\nThey were friends for ever.",
    "Ann had 3 cats and 12 dogs. The cats slept in the sun. The dogs ran to the park and played with a ball.",
]
Variant = str
VARIANTS: list[Variant] = ["simple", "conv", "local", "full", "rwkv4"]  # of AFT, and other families
ONLY_AFT = {"n_head": 4, "window": 6, "d_bias": 3, "max_positions": 256}


@dataclass(frozen=True)
class Ids:
    """A vocabulary of tokens without bytes."""

    vocab_size: int
    end_of_text_id: int

    @property
    def token_bytes(self) -> list[bytes]:
        return [b""] * self.vocab_size


def tiny_config(variant: Variant = "conv", **changes: object) -> ModelConfig:
    fields: dict[str, object] = {"vocab_size": 400, "d_model": 16, "n_layer": 2, "d_ff": 32}
    if variant == "rwkv4":
        return RWKV4Config.from_dict(fields | {k: v for k, v in changes.items() if k not in ONLY_AFT})
    return AFTConfig.from_dict(fields | ONLY_AFT | {"variant": variant} | changes)


def new_model(config: ModelConfig) -> LanguageModel:
    return family_of(config)(config)


def random_model(config: ModelConfig, seed: int = 0, std: float = 0.3) -> LanguageModel:
    """Parameters far larger than at the start of training, so that positions, keys and biases all matter."""
    torch.manual_seed(seed)
    model = new_model(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval().requires_grad_(False)


def byte_level_tokenizer(vocab_size: int, *special_tokens: str) -> tokenizers.Tokenizer:
    """As GPT-2's: BPE on bytes. The end-of-text token is the first."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special_tokens],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(STORIES * 3, trainer)
    return words


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Stories to train on."""
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES * 10))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer.train(STORIES * 3, vocab_size=400)


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny conv model of random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, random_model(tiny_config()), tokenizer)
    return folder
