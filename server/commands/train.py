"""`aft train`: text files in, checkpoint folder out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from model.checkpoint import load_checkpoint, save_checkpoint
from model.errors import ConfigError
from model.families import architectures, config_of, family_of, fields_to_choose
from model.language_model import LanguageModel
from model.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from model.training.config import TrainingConfig
from model.training.data import PackedBatches, Source, encode_documents, read_documents
from model.training.evaluate import bits_per_character
from model.training.progress import ProgressReport, plot_history
from model.training.trainer import Record, Trainer, init_processes, process_rank, write_history
from server.device import find_device
from server.options import option, options_of

LOSS_CURVE_FILE, HISTORY_FILE = "loss.png", "training_log.jsonl"
DEFAULTS = {"d_model": 256, "n_layer": 6, "n_head": 16}  # of an architecture, where it has them
ARCHITECTURE = [
    option("variant", str, "conv", "Architecture.", tuple(architectures())),
    *(option(name, *of) for name, of in fields_to_choose(DEFAULTS).items()),
]


@options_of(TrainingConfig, more=ARCHITECTURE)
def train(
    data: Annotated[list[str], typer.Option(help="Text file to learn from, or FILE:REPEATS. May be given again.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; also keeps the resumable state.")],
    init: Annotated[
        Path | None, typer.Option(help="Checkpoint folder whose weights, shape and tokenizer the run starts from.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer's file, or its folder, to use instead of a new one.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Pieces of a new tokenizer.")] = 2048,
    *,
    variant: str,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    compile_loss: Annotated[bool, typer.Option("--compile", help="torch.compile; needs a C++ compiler.")] = False,
    resume: Annotated[bool, typer.Option(help="Continue the run whose state lies in the folder.")] = False,
    **settings: Any,
) -> None:
    """Train a language model. Documents are separated by a line <|endoftext|>.

    Under torchrun, the processes share each batch.
    """
    target = choose_device(device)
    init_processes(target)
    shape = {name: value for name in fields_to_choose() if (value := settings.pop(name)) is not None}
    if init and (given := [*shape, *(["tokenizer"] if tokenizer else [])]):
        raise ConfigError(f"{given[0]} is that of the checkpoint with init; leave it out.")
    config = TrainingConfig(data=tuple(Source.parse(text) for text in data), compile=compile_loss, **settings)
    console = Console(quiet=process_rank() > 0)
    documents = [read_documents(source.path) for source in config.data]
    torch.manual_seed(config.seed)
    if init:
        model, words = load_checkpoint(init, target)
        model.requires_grad_()
    else:
        words = prepare_tokenizer(out, tokenizer, config, documents, vocab_size, resume)
        architecture = config_of(variant, {**shape, "vocab_size": words.vocab_size}, DEFAULTS)
        model = family_of(architecture)(architecture).to(target)
    streams = [(encode_documents(d, words), s.repeats) for d, s in zip(documents, config.data, strict=True)]
    batches = PackedBatches(streams, batch_size=config.batch_size, context=config.context, seed=config.seed)
    console.print(f"{model.num_parameters:,} parameters on {target}", highlight=False)
    for source, (tokens, repeats) in zip(config.data, streams, strict=True):
        console.print(f"{source.path}: {len(tokens):,} tokens, {repeats:g} times a pass", highlight=False)

    trainer = Trainer(model, batches, config, out)
    if resume:
        trainer.resume()
    held_out = read_documents(config.validation) if config.validation else []
    check_lengths(held_out, words, model)

    def validate() -> float:
        last = trainer.step + 1 == config.steps
        return bits_per_character(model, words, held_out if last else held_out[: config.validation_documents])

    with ProgressReport(config.steps, trainer.step, console) as progress:

        def report(record: Record) -> None:
            progress(record)
            if process_rank() == 0 and (record.step % config.checkpoint_every == 0 or record.step == config.steps):
                save_checkpoint(out, model, words)
                plot_history(out / LOSS_CURVE_FILE, trainer.history)
                write_history(out / HISTORY_FILE, trainer.history)

        trainer.run(validate if held_out else None, report)
    if dist.is_initialized():
        dist.barrier()  # a process that leaves first breaks the connections of those still saving
        dist.destroy_process_group()


def prepare_tokenizer(
    out: Path, given: Path | None, config: TrainingConfig, documents: list[list[str]], vocab_size: int, resume: bool
) -> Tokenizer:
    """The given tokenizer, the one of the run to be resumed, or a new one learned from one pass over the data."""
    if resume or given:
        return load_tokenizer(given or out)

    def one_pass() -> Iterator[str]:
        for source, texts in zip(config.data, documents, strict=True):
            whole, part = divmod(source.repeats, 1)
            yield from texts * int(whole)
            yield from texts[: round(part * len(texts))]

    # Deterministic: every process of a group learns the same.
    return SentencePieceTokenizer.train(one_pass(), vocab_size)


def check_lengths(documents: list[str], tokenizer: Tokenizer, model: LanguageModel) -> None:
    """Before hours of training rather than after: can the model read what it will be validated on?"""
    limit = model.config.context_limit
    if limit is None:
        return
    longest = max((len(tokenizer.encode(document)) for document in documents), default=0)
    if longest > limit:
        raise ConfigError(f"max_positions must be at least the {longest} tokens of a validation document, not {limit}.")


def choose_device(name: str) -> torch.device:
    """ "auto" is an accelerator if there is one (under torchrun, the process's own), and the CPU otherwise.

    Raises ConfigurationError for one that is not here.
    """
    if name != "auto":
        return find_device(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0)))
