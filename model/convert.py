"""RWKV-4 checkpoints of others: of Hugging Face transformers, a folder, and of its author, a .pth file.

Nothing in them is executed: a .pth file is a pickle, of which only tensors are read.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import check_tensors, load_tensors, save_checkpoint
from model.config import AFTConfig
from model.errors import CheckpointError, ConfigError
from model.tokenizer import Tokenizer, WorldTokenizer, load_tokenizer
from model.transformer import AFTForCausalLM

Named = dict[str, Tensor]

OURS_BY_AUTHOR = {
    "emb.weight": "embedding.weight",
    "blocks.0.ln0": "embedding_norm",
    "ln1": "attention_norm",
    "ln2": "feed_forward_norm",
    "ln_out": "norm",
    "att.key": "attention.key",
    "att.value": "attention.value",
    "att.receptance": "attention.receptance",
    "att.output": "attention.out",
    "att.time_decay": "attention.bias.time_decay",
    "att.time_first": "attention.bias.time_first",
    "ffn.key": "feed_forward.up",
    "ffn.value": "feed_forward.down",
    "ffn.receptance": "feed_forward.receptance",
}
AUTHOR_BY_TRANSFORMERS = {
    "rwkv.": "",
    "embeddings.weight": "emb.weight",
    "pre_ln": "ln0",
    "attention.": "att.",
    "feed_forward.": "ffn.",
    "time_mix_key": "time_mix_k",
    "time_mix_value": "time_mix_v",
    "time_mix_receptance": "time_mix_r",
}
# Of each token shift, in the order of its rows.
MIXES = {"att": ("attention.shift.mix", "kvr"), "ffn": ("feed_forward.shift.mix", "kr")}
CHAT_TEMPLATE = (
    "{% set names = {'user': 'User', 'assistant': 'Assistant', 'system': 'System', 'developer': 'System'} %}"
    "{% for message in messages %}"  # an empty line ends a turn, so none may be within one
    "{{ names[message.role] }}: {{ message.content | trim | replace('\r\n', '\n') | replace('\n\n', '\n') }}"
    "\n\n{% endfor %}Assistant:"
)


def convert(source: Path, out: Path, tokenizer: Path | None = None) -> AFTForCausalLM:
    """Write the checkpoint folder `out`; a World model also gets the roles of its chats.

    source: a folder as transformers writes it, or a .pth file; tokenizer: its file or folder, if not that of source.
    Raises CheckpointError and TokenizationError for anything that is not RWKV-4, and for an `out` that holds files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} must be a new folder or an empty one.")
    tensors, norm_eps = from_folder(source) if source.is_dir() else from_pth(source)
    words = load_tokenizer(tokenizer or (source if source.is_dir() else source.parent))
    model = model_of(tensors, norm_eps, source)
    words.fit(model.config.vocab_size)
    save_checkpoint(out, model, words)
    _copy_chat_template(source, out, words)
    return model


def from_folder(folder: Path) -> tuple[Named, float]:
    """Tensors by the author's names, and the epsilon of the norms."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != "rwkv":
        raise CheckpointError(f'{folder / "config.json"} must have "model_type": "rwkv", the name of RWKV-4 there.')
    if files := sorted(folder.glob("*.safetensors")):
        named = {name: tensor for file in files for name, tensor in load_tensors(file).items()}
    elif files := sorted(folder.glob("pytorch_model*.bin")):
        named = {name: tensor for file in files for name, tensor in load_pickled(file).items()}
    else:
        raise CheckpointError(f"{folder} has neither .safetensors files nor pytorch_model.bin.")
    if config.get("tie_word_embeddings"):
        named.pop("head.weight", None)

    def renamed(name: str) -> str:
        for theirs, authors in AUTHOR_BY_TRANSFORMERS.items():
            name = name.replace(theirs, authors)
        return name

    norm_eps = config.get("layer_norm_epsilon", 1e-5)
    if not isinstance(norm_eps, int | float):
        raise CheckpointError(f"{folder / 'config.json'}: layer_norm_epsilon must be a number, not {norm_eps!r}.")
    return {renamed(name): tensor for name, tensor in named.items()}, float(norm_eps)


def from_pth(path: Path) -> tuple[Named, float]:
    """As `from_folder`."""
    return load_pickled(path), 1e-5


def load_pickled(path: Path) -> Named:
    """Tensors by their names. Nothing is executed; raises CheckpointError for a file that holds anything else."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} is not a file of tensors: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise CheckpointError(f"{path} must hold tensors by their names, and nothing else.")
    return loaded


def model_of(tensors: Named, norm_eps: float, source: Path) -> AFTForCausalLM:
    """The model of tensors with the author's names. Without a head of its own the model has that of the embedding."""
    try:
        tensors = {"head.weight": tensors["emb.weight"], **tensors}
        vocab_size, d_model = tensors["emb.weight"].shape
        d_ff = tensors["blocks.0.ffn.key.weight"].shape[0]
        dtypes = {tensor.dtype for tensor in tensors.values()}
        config = AFTConfig(
            variant="rwkv4",
            vocab_size=vocab_size,
            d_model=d_model,
            n_layer=1 + max(int(number) for name in tensors for number in re.findall(r"^blocks\.(\d+)\.", name)),
            d_ff=d_ff,
            tie_embeddings=torch.equal(tensors["head.weight"], tensors["emb.weight"]),
            norm_eps=norm_eps,
            dtype=str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32",  # type: ignore[arg-type]
        )
        dtype = getattr(torch, config.dtype)
        renamed = {name: tensor.to(dtype).contiguous() for name, tensor in _renamed(tensors)}
    except KeyError as error:
        raise CheckpointError(f"{source} lacks the tensor {error.args[0]!r} of RWKV-4.") from error
    except (ValueError, IndexError, RuntimeError, ConfigError) as error:
        raise CheckpointError(f"{source} is not an RWKV-4 model: {error}") from error
    model = AFTForCausalLM.empty(config)
    if config.tie_embeddings:
        del renamed["head.weight"]
    check_tensors(renamed, model.state_dict(), source)
    model.load_state_dict(renamed, assign=True)
    return model.eval().requires_grad_(False)


def _renamed(tensors: Named) -> Iterator[tuple[str, Tensor]]:
    """The tensors by our names; what is not known keeps its name."""
    for name, tensor in tensors.items():
        shift = re.fullmatch(r"blocks\.(\d+)\.(att|ffn)\.time_mix_([kvr])", name)
        if shift is None:
            shape = (-1,) if "time_" in name else tensor.shape
            yield _ours(name), tensor.reshape(shape)
            continue
        block, part, which = shift.groups()
        ours, order = MIXES[part]
        if which == order[0]:
            rows = [tensors[f"blocks.{block}.{part}.time_mix_{letter}"] for letter in order]
            yield f"blocks.{block}.{ours}", torch.stack([row.flatten() for row in rows])


def _ours(name: str) -> str:
    for theirs, ours in OURS_BY_AUTHOR.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
        block = re.fullmatch(rf"(blocks\.\d+\.){re.escape(theirs)}(.*)", name)
        if block:
            return block[1] + ours + block[2]
    return name


def _copy_chat_template(source: Path, out: Path, tokenizer: Tokenizer) -> None:
    """From a folder that has one; World models were taught these roles."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (source / name).is_file() and (name.endswith(".jinja") or _has_chat_template(source / name)):
            shutil.copyfile(source / name, out / name)
            return
    if isinstance(tokenizer, WorldTokenizer):
        (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _has_chat_template(path: Path) -> bool:
    try:
        described = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return isinstance(described, dict) and isinstance(described.get("chat_template"), str)
