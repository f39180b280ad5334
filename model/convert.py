"""Checkpoints of others: of Hugging Face transformers, a folder, and of their authors, a .pth file.

Nothing in them is executed: a .pth file is a pickle, of which only tensors are read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from model.checkpoint import check_source, check_tensors, load_tensors, save_checkpoint, write_whole
from model.config import Dtype
from model.errors import CheckpointError
from model.families import ELSEWHERE, FAMILIES
from model.language_model import LanguageModel
from model.tokenizer import Tokenizer, WorldTokenizer, load_tokenizer

Named = dict[str, Tensor]

DTYPES = {getattr(torch, name): name for name in get_args(Dtype)}

OTHER_MODELS = {".att.r_k": "RWKV-7", ".att.time_maa_": "RWKV-6", ".att.time_faaaa": "RWKV-5"}  # by their tensors

CHAT_TEMPLATE = (
    "{% set names = {'user': 'User', 'assistant': 'Assistant', 'system': 'System', 'developer': 'System'} %}"
    "{% for message in messages %}"  # an empty line ends a turn, so none may be within one
    "{{ names[message.role] }}: {{ message.content | trim | replace('\r\n', '\n') | replace('\n\n', '\n') }}"
    "\n\n{% endfor %}Assistant:"
)


def convert(source: Path, out: Path, tokenizer: Path | None = None) -> LanguageModel:
    """Write the checkpoint folder `out`; a World model also gets the roles of its chats.

    source: a folder as transformers writes it, or a .pth file; tokenizer: its file or folder, if not that of source.
    Raises CheckpointError and TokenizationError for anything that no family knows, and for an `out` that holds files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} must be a new folder or an empty one.")
    check_source(source)
    if source.is_dir():
        described = read_description(source)
        family = family_of_type(described.get("model_type"), source)
        tensors = read_tensors(source, described)
    else:
        described, tensors = {}, load_pickled(source)
        family = family_of_names(tensors, source)
    words = load_tokenizer(tokenizer or (source if source.is_dir() else source.parent))
    model = model_of(family, tensors, described, source)
    words.fit(model.config.vocab_size)
    template = _chat_template(source, words)
    save_checkpoint(out, model, words)  # once nothing can be wrong any more
    if template:
        name, content = template
        write_whole(out / name, content)
    return model


def read_description(folder: Path) -> dict[str, Any]:
    """The config.json of a folder of transformers."""
    try:
        described = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    return described if isinstance(described, dict) else {}


def family_of_type(name: object, source: Path) -> type[LanguageModel]:
    families = {family.foreign_type: family for family in FAMILIES.values() if family.foreign_type}
    known = " or ".join(f'"{known}"' for known in families)
    if not isinstance(name, str):
        raise CheckpointError(f'{source / "config.json"} must have "model_type": {known}, not {name!r}.')
    if name in FAMILIES:
        raise CheckpointError(f"{source} is a checkpoint of {name} already, and needs not be converted.")
    if name not in families:
        raise CheckpointError(f'{source}: this is a "{name}" model; only {known} can be converted: {ELSEWHERE}.')
    return families[name]


def family_of_names(tensors: Named, source: Path) -> type[LanguageModel]:
    """Of a .pth file, which does not say it."""
    for family in FAMILIES.values():
        if family.has_author_names(tensors):
            return family
    for part, other in OTHER_MODELS.items():
        if any(part in tensor for tensor in tensors):
            raise CheckpointError(f"{source}: this is a model of {other}; of RWKV only RWKV-4 can be converted.")
    raise CheckpointError(f"{source} holds no model of a family that can be converted.")


def read_tensors(folder: Path, described: dict[str, Any]) -> Named:
    """Of the weights of a folder of transformers, which may be in parts."""
    tied = described.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise CheckpointError(f"{folder / 'config.json'}: tie_word_embeddings must be true or false, not {tied!r}.")
    named: Named = {}
    if files := sorted(folder.glob("*.safetensors")):
        load = load_tensors
    elif files := sorted(folder.glob("pytorch_model*.bin")):
        load = load_pickled
    else:
        raise CheckpointError(f"{folder} has neither .safetensors files nor pytorch_model.bin.")
    for file in files:
        part = load(file)
        if twice := sorted(named.keys() & part.keys()):
            raise CheckpointError(f"{folder} has the tensor {twice[0]!r} in {file.name} and in another file.")
        named.update(part)
    if tied:
        named.pop("head.weight", None)
    return named


def load_pickled(path: Path) -> Named:
    """Tensors by their names. Nothing is executed; raises CheckpointError for a file that holds anything else."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # PyTorch answers damage with a dozen of them
        raise CheckpointError(f"{path} is not a file of tensors: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise CheckpointError(f"{path} must hold tensors by their names, and nothing else.")
    for name, tensor in loaded.items():
        if not _is_plain(tensor):
            raise CheckpointError(f"{path}: {name!r} must be a dense tensor with all its numbers in the file.")
    return loaded


def _is_plain(tensor: object) -> bool:
    """Whether it is as large in memory as its shape says: a view may claim any."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return math.prod(tensor.shape) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def model_of(family: type[LanguageModel], tensors: Named, described: dict[str, Any], source: Path) -> LanguageModel:
    """The model of foreign tensors. Raises CheckpointError."""
    what = family.config_class.family
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{source}: tensor {name!r} must be one of {', '.join(DTYPES.values())}, not {tensor.dtype}."
            )
    try:
        config, named = family.from_foreign(tensors, described)
        named = {name: tensor.to(getattr(torch, config.dtype)).contiguous() for name, tensor in named.items()}
    except KeyError as error:
        raise CheckpointError(f"{source} lacks the tensor {error.args[0]!r} of {what}.") from error
    except (ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{source} is not a model of {what}: {error}") from error
    model = family.empty(config)
    check_tensors(named, model.state_dict(), source)
    model.load_state_dict(named, assign=True)
    return model.eval().requires_grad_(False)


def _chat_template(source: Path, tokenizer: Tokenizer) -> tuple[str, bytes] | None:
    """Name and content of its file, from a folder that has one; World models were taught these roles."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (source / name).is_file() and (name.endswith(".jinja") or _has_chat_template(source / name)):
            return name, (source / name).read_bytes()
    return ("chat_template.jinja", CHAT_TEMPLATE.encode()) if isinstance(tokenizer, WorldTokenizer) else None


def _has_chat_template(path: Path) -> bool:
    try:
        described = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return isinstance(described, dict) and described.get("chat_template") is not None
