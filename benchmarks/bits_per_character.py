"""Held-out bits per character of checkpoints, and of the peer stories260K, on the same documents.

    python -m benchmarks.bits_per_character valid.txt --model weights/aft-conv-stories --peer DIR

Counted alike for all: every document is read alone from its start, its text is scored, its end is not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.stories260k import Llama2c, Llama2cTokenizer
from model import LanguageModel, State, load_checkpoint
from model.backends.choose import make_runner
from model.training.data import read_documents
from model.training.evaluate import CHUNK, bits_per_character


def main(
    text: Annotated[Path, typer.Argument(help="Text file, documents separated by a line <|endoftext|>.")],
    model: Annotated[list[Path] | None, typer.Option(help="Checkpoint folder. May be given again.")] = None,
    peer: Annotated[Path | None, typer.Option(help="Folder of stories260K.bin and tok512.bin.")] = None,
    quantize: Annotated[str | None, typer.Option(help="As the server runs them with that option.")] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Score the first N documents only.")] = None,
) -> None:
    texts = read_documents(text)[:documents]
    print(f"{text.name}: {len(texts)} documents, {sum(map(len, texts)):,} characters")
    for folder in model or []:
        network, tokenizer = load_checkpoint(folder)
        n_parameters = network.num_parameters
        scored = AsServed(network, quantize) if quantize else network
        bits = bits_per_character(scored, tokenizer, texts, batch_size=1 if quantize else 16)
        print(f"{folder.name}: {n_parameters:,} parameters, {bits:.4f} bits/character")
    if peer:
        print(f"stories260K: {peer_bits_per_character(peer, texts):.4f} bits/character")


class AsServed:
    """A model in another weight format, read by the kernels that a server runs."""

    def __init__(self, model: LanguageModel, quantize: str) -> None:
        self.device = model.device
        self._runner = make_runner(model, model.init_state(1), CHUNK, quantize=quantize)

    def __call__(self, token_ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        """token_ids [1, T] -> logits [1, T, V]"""
        logits, after = self._runner.read(token_ids[0].tolist(), state, token_ids.shape[1])
        return logits.unsqueeze(0), after


@torch.inference_mode()
def peer_bits_per_character(folder: Path, texts: list[str]) -> float:
    network = Llama2c(folder / "stories260K.bin")
    tokenizer = Llama2cTokenizer(folder / "tok512.bin", network.vocab_size)
    nats = sum(network.text_nats(tokenizer.encode(text)) for text in texts)
    return nats / math.log(2) / sum(map(len, texts))


if __name__ == "__main__":
    typer.run(main)
