"""`aft train`: text files in, checkpoint folder out."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Self

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_checkpoint, save_checkpoint
from model.errors import ConfigError
from model.families import architectures, config_of, family_of, fields_to_choose
from model.language_model import LanguageModel
from model.tokenizer import FILE_NAMES as TOKENIZER_FILES
from model.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from model.training.config import TrainingConfig
from model.training.data import PackedBatches, Source, encode_documents, read_documents
from model.training.evaluate import bits_per_character
from model.training.progress import ProgressReport, plot_history
from model.training.trainer import (
    STATE_FILE,
    Trainer,
    init_processes,
    process_count,
    process_rank,
    stored_step,
    write_history,
)
from server.config import ServerConfig
from server.device import find_device
from server.options import option, option_of, options_of
from server.settings import settings_of
from server.threads import use_threads

LOSS_CURVE_FILE, HISTORY_FILE = "loss.png", "training_log.jsonl"
# Of a checkpoint's folder: those that a run writes, and those that would describe another model.
FILES = (
    *(STATE_FILE, CONFIG_FILE, WEIGHTS_FILE, LOSS_CURVE_FILE, HISTORY_FILE, *TOKENIZER_FILES),
    *("chat_template.jinja", "tokenizer_config.json"),
)
DEFAULTS = {"d_model": 256, "n_layer": 6, "n_head": 16}  # of an architecture, where it has them
ARCHITECTURE = [
    option("variant", str, "conv", "Architecture.", tuple(architectures())),
    *(option(name, *of) for name, of in fields_to_choose(DEFAULTS).items()),
]


THREADS = settings_of(ServerConfig)["threads"]


@options_of(TrainingConfig, more=[*ARCHITECTURE, option_of(THREADS, int | None, None)])
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
    overwrite: Annotated[bool, typer.Option(help="Replace the checkpoint that lies in the folder.")] = False,
    threads: int | None,
    **settings: Any,
) -> None:
    """Train a language model. Documents are separated by a line <|endoftext|>.

    Under torchrun, the processes share each batch.
    """
    if threads is not None:
        THREADS.check(threads)
    check_out(out, resume=resume, overwrite=overwrite)
    target = choose_device(device)
    use_threads(threads)
    init_processes(target)
    shape = {name: value for name in fields_to_choose() if (value := settings.pop(name)) is not None}
    if init and (given := [*shape, *(["tokenizer"] if tokenizer else [])]):
        raise ConfigError(f"{given[0]} is that of the checkpoint with init; leave it out.")
    config = TrainingConfig(data=tuple(Source.parse(text) for text in data), compile=compile_loss, **settings)
    console = Console(quiet=process_rank() > 0)
    documents = [texts_of(source.path) for source in config.data]
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

    check_memory(config, model)
    trainer = Trainer(model, batches, config, out)
    if resume:
        trainer.resume()
    held_out = texts_of(config.validation) if config.validation else []
    check_lengths(held_out, words, model)

    def validate() -> float:
        last = trainer.step + 1 == config.steps
        return bits_per_character(model, words, held_out if last else held_out[: config.validation_documents])

    has_picture = True

    def write_checkpoint() -> None:
        nonlocal has_picture
        if overwrite:
            remove_others(out, {CONFIG_FILE, WEIGHTS_FILE, words.file_name})
        save_checkpoint(out, model, words)
        has_picture = plot_history(out / LOSS_CURVE_FILE, trainer.history)
        write_history(out / HISTORY_FILE, trainer.history)

    out.mkdir(parents=True, exist_ok=True)  # where that is not possible, now rather than after hours
    with ProgressReport(config.steps, trainer.step, console) as progress, Interruption(console) as interruption:
        trainer.run(
            validate if held_out else None, progress, on_save=write_checkpoint, should_stop=interruption.has_come
        )
    if dist.is_initialized():
        dist.barrier()  # a process that leaves first breaks the connections of those still saving
        dist.destroy_process_group()
    if not has_picture:
        console.print(f"There is no {LOSS_CURVE_FILE}: it needs matplotlib.")
    if trainer.step < config.steps:
        console.print(
            f"stopped at step {trainer.step} of {config.steps}; its checkpoint is in {out}, and the same command with "
            "--resume goes on",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(interruption.status)


class Interruption:
    """A context in which the first Ctrl-C or SIGTERM is remembered, so that the step ends; the next ends the process.

    status: what the process is to end with.
    """

    def __init__(self, console: Console) -> None:
        self._console, self.status = console, 0
        self._before: dict[int, Any] = {}

    def has_come(self) -> bool:
        return self.status > 0

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.status = 128 + number
        self.__exit__()
        self._console.print("stopping after this step; once more ends the run at once")


def check_out(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises ConfigError for a folder that holds what the run would write, unless that was asked for."""
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out must be a folder, which {out} is not.")
    if out.exists() and not os.access(out, os.W_OK):
        raise ConfigError(f"out must be a folder that can be written to, which {out} is not.")
    found = [name for name in FILES if (out / name).exists()]
    if not found or resume or overwrite:
        return
    step = stored_step(out)
    if step is None:
        raise ConfigError(f"{out} holds {found[0]}; another --out, or --overwrite.")
    raise ConfigError(f"{out} holds a checkpoint of step {step}; --resume, another --out, or --overwrite.")


def remove_others(out: Path, kept: Collection[str]) -> None:
    """What the run that is overwritten left and this one need not have: it would describe another model."""
    for name in FILES:
        if name not in kept:
            (out / name).unlink(missing_ok=True)


def check_memory(config: TrainingConfig, model: LanguageModel) -> None:
    """Raises ConfigError where the logits of a step alone are more than the machine has: it would be ended unasked."""
    n_bytes = 4 * config.batch_size // process_count() * config.context * model.config.vocab_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if n_bytes > memory:
        raise ConfigError(
            f"batch_size and context must be less than {config.batch_size} and {config.context}, whose logits are "
            f"{n_bytes / 2**30:,.0f} GiB: this machine has {memory / 2**30:,.0f}."
        )


def texts_of(path: Path) -> list[str]:
    """At least one. Raises ConfigError."""
    documents = read_documents(path)
    if not documents:
        raise ConfigError(f"{path} holds no text.")
    return documents


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
