"""A Transformer trained exactly as the bundled weights were: parameters, tokens, batches, schedule, both runs.

    python -m benchmarks.transformer DATA --out runs/transformer

DATA is the folder of tinystories_mini, storybooks_ccby and children_classics. Both models are scored on windows of the
context, each read alone, since the Transformer knows no position beyond it. Goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.baselines import Baseline
from benchmarks.comparison import CONTEXT, feed_forward_width, windowed_bits_per_character
from model import load_checkpoint
from model.families.aft import AFTConfig
from model.language_model import LanguageModel
from model.tokenizer import Tokenizer
from model.training.config import TrainingConfig
from model.training.data import PackedBatches, Source, encode_documents, read_documents
from model.training.trainer import Trainer

N_HEAD = 7


def like(aft: LanguageModel) -> Baseline:
    """An untrained Transformer of the width, depth and number of parameters of `aft`."""
    assert isinstance(aft.config, AFTConfig)
    config = dataclasses.replace(aft.config, variant="simple", position_embeddings=True, max_positions=CONTEXT)

    def transformer(d_ff: int) -> Baseline:
        return Baseline(dataclasses.replace(config, d_ff=d_ff), "attention", N_HEAD)

    return transformer(feed_forward_width(transformer, aft.num_parameters))


def runs(data: Path) -> list[TrainingConfig]:
    """The two runs of weights/aft-conv-stories, as its card gives them."""
    stories = data / "tinystories_mini/train.txt"
    picture_books, classics = data / "storybooks_ccby/train.txt", data / "children_classics/train.txt"
    return [
        TrainingConfig(
            data=(Source(stories, 4), Source(picture_books, 2), Source(classics, 0.4)),
            steps=4000,
            learning_rate=3e-3,
            warmup_steps=150,
            compile=True,
        ),
        TrainingConfig(
            data=(Source(stories),),
            steps=800,
            learning_rate=4e-4,
            final_learning_rate=1e-5,
            warmup_steps=50,
            compile=True,
        ),
    ]


def train(model: LanguageModel, tokenizer: Tokenizer, config: TrainingConfig, folder: Path) -> None:
    streams = [(encode_documents(read_documents(source.path), tokenizer), source.repeats) for source in config.data]
    batches = PackedBatches(streams, batch_size=config.batch_size, context=config.context, seed=config.seed)
    trainer = Trainer(model, batches, config, folder)
    if (folder / "training_state.safetensors").exists():
        trainer.resume()
    started, first = time.perf_counter(), trainer.step
    trainer.run(report=lambda record: print(vars(record), flush=True) if record.step % 100 == 0 else None)
    if steps := trainer.step - first:
        print(f"{steps * config.batch_size * config.context / (time.perf_counter() - started):,.0f} tokens/s")


def main(
    data: Annotated[Path, typer.Argument(help="Folder of the three sources.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs' states.")] = Path("runs/transformer"),
    weights: Annotated[Path, typer.Option(help="The AFT model.")] = Path("weights/aft-conv-stories"),
) -> None:
    aft, tokenizer = load_checkpoint(weights)
    torch.manual_seed(0)
    transformer = like(aft)
    for i, config in enumerate(runs(data)):
        train(transformer, tokenizer, config, out / str(i))
    for name in ("tinystories_mini", "children_classics"):
        held_out = encode_documents(read_documents(data / name / "valid.txt"), tokenizer)
        for label, model in (("AFT", aft), ("Transformer", transformer)):
            bits = windowed_bits_per_character(model.eval(), tokenizer, held_out)
            print(f"{name}/valid.txt, {label}, {model.num_parameters:,} parameters: {bits:.4f} bits per character")


if __name__ == "__main__":
    typer.run(main)
