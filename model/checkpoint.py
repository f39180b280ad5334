"""Checkpoints: a folder of config.json, model.safetensors and a tokenizer's file. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError, TokenizationError
from model.families import config_from_dict, family_of
from model.language_model import LanguageModel
from model.tokenizer import SentencePieceTokenizer, Tokenizer, hugging_face_files, load_tokenizer

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def save_checkpoint(path: Path | str, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Write a checkpoint folder. Each file appears whole or not at all, also if the power fails."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model.config.family, **model.config.to_dict()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    write_whole(folder / tokenizer.file_name, tokenizer.content)
    if isinstance(tokenizer, SentencePieceTokenizer):
        write_for_hugging_face(folder, tokenizer)
    save_tensors(folder / WEIGHTS_FILE, tensors)


def write_for_hugging_face(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    """The same tokenizer for programs that load it with AutoTokenizer; nothing here reads it."""
    for name, content in hugging_face_files(tokenizer).items():
        if name != "tokenizer_config.json" or not (folder / name).exists():  # that may have a chat template by now
            write_whole(folder / name, content)


def load_checkpoint(path: Path | str, device: str | torch.device = "cpu") -> tuple[LanguageModel, Tokenizer]:
    """The model, in evaluation mode on `device`, and the tokenizer of a checkpoint folder.

    Raises CheckpointError, naming the file, field or tensor, for anything missing, extra, damaged or not finite.
    """
    folder = Path(path)
    check_source(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file, but a checkpoint is a folder: `aft convert` makes one of a .pth file."
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"Checkpoint folder {folder} has no file {name}.")
    config = load_config(folder / CONFIG_FILE)
    tokenizer = _load_tokenizer(folder, config)
    tensors = load_tensors(folder / WEIGHTS_FILE)
    model = family_of(config).empty(config)
    check_tensors(tensors, model.state_dict(), folder / WEIGHTS_FILE)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval().requires_grad_(False), tokenizer


def fingerprint(model: LanguageModel, quantization: str = "") -> bytes:
    """16 bytes that differ for models that compute different things: a digest of configuration and weights."""
    described = json.dumps(model.config.identity(), sort_keys=True) + quantization
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()


def check_source(path: Path) -> None:
    """Raises CheckpointError, saying what to do, for a path that is not there and for files of other programs."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                raise CheckpointError(f"{path} is a GGUF file, which llama.cpp runs; it cannot be read here.")
    elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        download = f"hf download {path} --local-dir {path.name}"
        raise CheckpointError(
            f"There is no {path} here. If it is a name on the Hugging Face Hub, run `{download}` first."
        )
    elif not path.exists():
        raise CheckpointError(f"There is no {path}.")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, put in place only when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata)
    temporary.chmod(0o644)  # save_file makes it private, and a server may run as another user
    _put_in_place(temporary, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError if the file is truncated or not a safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error


def write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    _put_in_place(temporary, path)


def _put_in_place(temporary: Path, path: Path) -> None:
    """The name goes to the new file only once that is on the disk."""
    _sync(temporary)
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_config(path: Path) -> ModelConfig:
    """Of a config.json. Raises CheckpointError."""
    try:
        fields: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must be a JSON object.")
    try:
        return config_from_dict(fields)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _load_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.fit(config.vocab_size)
    except TokenizationError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return tokenizer


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """Raises CheckpointError, naming the tensor, for any that is missing, extra, of another form or not finite."""
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(f"{path} lacks the tensor {missing[0]!r}.")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(f"{path} has a tensor {extra[0]!r} that the model does not know.")
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            found, wanted = f"{tensor.dtype} {list(tensor.shape)}", f"{want.dtype} {list(want.shape)}"
            raise CheckpointError(f"{path}: tensor {name!r} is {found}, but the configuration asks for {wanted}.")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: tensor {name!r} holds NaN or infinity.")
