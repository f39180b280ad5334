from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import SentencePieceTokenizer, Tokenizer, load_checkpoint, save_checkpoint
from model.errors import CheckpointError
from tests.conftest import STORIES, VARIANTS, Variant, random_model, tiny_config


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(variant: Variant, dtype: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    positions = {} if variant == "rwkv4" else {"position_embeddings": True}
    model = random_model(tiny_config(variant, dtype=dtype, **positions))
    save_checkpoint(tmp_path, model, tokenizer)
    loaded, loaded_tokenizer = load_checkpoint(tmp_path)
    assert loaded.config == model.config
    assert loaded_tokenizer.content == tokenizer.content
    assert not loaded.training
    tokens = torch.arange(100).unsqueeze(0)
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    for_others = {"tokenizer.json", "tokenizer_config.json"}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.model"} | for_others
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model.config.family
    assert all(path.stat().st_mode & 0o044 for path in tmp_path.iterdir()), "other users must be able to read it"


def test_a_chat_template_outlives_the_next_save(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "a"}')
    save_checkpoint(tmp_path, random_model(tiny_config()), tokenizer)
    assert (tmp_path / "tokenizer_config.json").read_text() == '{"chat_template": "a"}'


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_named(name: str, damaged: Path) -> None:
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}"):
        load_checkpoint(damaged)


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("blocks.1.attention.qkv.bias"), "lacks the tensor 'blocks.1.attention.qkv.bias'"),
        (lambda t: t.update(extra=torch.zeros(1)), "has a tensor 'extra' that the model does not know"),
        (lambda t: t.update({"norm.bias": torch.zeros(15)}), r"'norm.bias' is torch.float32 \[15\], but .* \[16\]"),
        (lambda t: t.update({"norm.bias": torch.zeros(16).half()}), "'norm.bias' is torch.float16"),
        (lambda t: t["norm.bias"].fill_(float("nan")), "'norm.bias' holds NaN or infinity"),
        (lambda t: t["norm.weight"][3].fill_(float("inf")), "'norm.weight' holds NaN or infinity"),
    ],
)
def test_a_bad_tensor_is_named(edit: Callable[[dict[str, Tensor]], object], message: str, damaged: Path) -> None:
    edit_tensors(damaged, edit)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(damaged)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("{}/model.gguf", "{}/model.gguf is a GGUF file, which llama.cpp runs"),
        ("{}/model.pth", "{}/model.pth is a file, but a checkpoint is a folder: `aft convert` makes one"),
        ("{}/nowhere", "There is no {}/nowhere."),
        ("RWKV/rwkv-4-169m", "run `hf download RWKV/rwkv-4-169m --local-dir rwkv-4-169m` first"),
    ],
)
def test_a_path_that_is_no_folder_is_explained(path: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    torch.save({}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=re.escape(sentence.format(tmp_path))):
        load_checkpoint(path.format(tmp_path))


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_weights_are_refused(length: int, damaged: Path) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or not a safetensors file"):
        load_checkpoint(damaged)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"model_type": ["aft"]}', '"model_type" must be one of aft, rwkv4'),
        ('{"model_type": "llama"}', 'this is a "llama" model; only aft and rwkv4 can be run here: llama.cpp and vLLM'),
        ('{"model_type": "rwkv"}', 'this is a "rwkv" model of Hugging Face transformers: run `aft convert` first'),
        ('{"model_type": "aft", "layers": 3}', "Unknown configuration field 'layers'"),
        ('{"model_type": "aft", "variant": "conv"}', "'d_model' is missing"),
    ],
)
def test_a_bad_configuration_is_explained(content: str, message: str, damaged: Path) -> None:
    (damaged / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(damaged)


@pytest.mark.parametrize(
    ("field", "value"), [("n_layer", 10**9), ("d_ff", 10**30), ("d_model", 2**62), ("n_layer", 3), ("d_ff", 33)]
)
def test_a_size_that_the_weights_do_not_have_is_explained(field: str, value: int, damaged: Path) -> None:
    """Before as much as that is made."""
    fields = json.loads((damaged / "config.json").read_text()) | {field: value}
    (damaged / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=rf"{field} must be a whole number|lacks the tensor|asks for"):
        load_checkpoint(damaged)


def test_a_bad_tokenizer_is_explained(damaged: Path) -> None:
    (damaged / "tokenizer.model").write_bytes(SentencePieceTokenizer.train(STORIES, vocab_size=380).content)
    with pytest.raises(CheckpointError, match="has 380 tokens, but vocab_size is 400"):
        load_checkpoint(damaged)
    (damaged / "tokenizer.model").write_bytes(b"\x80\x04K\x01.")  # a pickle, say
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        load_checkpoint(damaged)


def test_loading_does_not_import_pytorchs_compiler(checkpoint: Path) -> None:
    """It takes a second, of the few that a server has to start."""
    script = f"import sys; from model import load_checkpoint; load_checkpoint({str(checkpoint)!r}); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert "model.checkpoint" in modules
    assert "torch._dynamo" not in modules
