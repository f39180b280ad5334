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
from model.backends.native.runner import pack

from benchmarks.stories260k import Llama2c, Llama2cTokenizer
from model import load_checkpoint
from model.backends.native.compiler import library
from model.backends.native.matrices import FORMATS
from model.training.data import read_documents
from model.training.evaluate import bits_per_character


def main(
    text: Annotated[Path, typer.Argument(help="Text file, documents separated by a line <|endoftext|>.")],
    model: Annotated[list[Path] | None, typer.Option(help="Checkpoint folder. May be given again.")] = None,
    peer: Annotated[Path | None, typer.Option(help="Folder of stories260K.bin and tok512.bin.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="As --quantize int8 runs them.")] = False,
    documents: Annotated[int | None, typer.Option(min=1, help="Score the first N documents only.")] = None,
) -> None:
    texts = read_documents(text)[:documents]
    print(f"{text.name}: {len(texts)} documents, {sum(map(len, texts)):,} characters")
    for folder in model or []:
        network, tokenizer = load_checkpoint(folder)
        n_parameters = network.num_parameters
        if int8:
            kernels = library()
            if kernels is None:
                raise typer.BadParameter("--int8 needs a C compiler, such as gcc or clang.")
            network = pack(network, kernels, FORMATS["int8"])
        bits = bits_per_character(network, tokenizer, texts)
        print(f"{folder.name}: {n_parameters:,} parameters, {bits:.4f} bits/character")
    if peer:
        print(f"stories260K: {peer_bits_per_character(peer, texts):.4f} bits/character")


@torch.inference_mode()
def peer_bits_per_character(folder: Path, texts: list[str]) -> float:
    network = Llama2c(folder / "stories260K.bin")
    tokenizer = Llama2cTokenizer(folder / "tok512.bin", network.vocab_size)
    nats = sum(network.text_nats(tokenizer.encode(text)) for text in texts)
    return nats / math.log(2) / sum(map(len, texts))


if __name__ == "__main__":
    typer.run(main)
