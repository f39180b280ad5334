"""RWKV-4 as transformers computes it, from checkpoints as transformers and its author write them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from jinja2 import Template
from torch import Tensor
from transformers import RwkvConfig, RwkvForCausalLM

from model import LanguageModel, load_checkpoint, save_checkpoint
from model.backends.choose import make_runner
from model.backends.eager import EagerRunner
from model.convert import convert
from model.errors import CheckpointError, TokenizationError
from model.families.rwkv4 import AUTHOR_BY_TRANSFORMERS
from model.generate import generate
from model.sampling import GREEDY
from model.tokenizer import HuggingFaceTokenizer
from tests.conftest import Ids, byte_level_tokenizer, random_model, tiny_config
from tests.model.test_tokenizer import WORLD_VOCABULARY

# Width, blocks, inner width, tied embeddings.
SHAPES = [(32, 2, 64, False), (48, 3, 200, True), (130, 2, 77, False)]
VOCAB_SIZE = 400


def theirs(shape: tuple[int, int, int, bool] = SHAPES[0]) -> RwkvForCausalLM:
    """Parameters large enough that decays, bonuses and mixes all matter."""
    width, n_layer, inner, tied = shape
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        num_hidden_layers=n_layer,
        intermediate_size=inner,
        tie_word_embeddings=tied,
        rescale_every=0,  # halves the stream for float16, and with it what the norms' epsilon means
    )
    model = RwkvForCausalLM(config)
    model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if "time_decay" in name:
            parameter.uniform_(-8, 1)
        elif "time_mix" in name:
            parameter.uniform_(0, 1)
        elif "ln" not in name:
            parameter.normal_(std=0.15)
    return model


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = byte_level_tokenizer(VOCAB_SIZE - 1, "<|padding|>")
    words.normalizer = tokenizers.normalizers.NFC()
    words.add_tokens([tokenizers.AddedToken("    ", normalized=False)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words.save(str(path))
    return path


def converted(model: RwkvForCausalLM, tokenizer_file: Path, folder: Path) -> LanguageModel:
    model.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours", tokenizer_file)
    return load_checkpoint(folder / "ours")[0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_logits_equal_those_of_transformers(
    shape: tuple[int, int, int, bool], tokenizer_file: Path, tmp_path: Path
) -> None:
    """Whole, in chunks, in steps, and by the kernels."""
    model = theirs(shape)
    ours = converted(model, tokenizer_file, tmp_path)
    ids = torch.randint(VOCAB_SIZE, (2, 150), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    assert relative_error(ours(ids)[0], expected) < 1e-4
    parts, state = [], None
    for start, end in ((0, 1), (1, 40), (40, 150)):
        logits, state = ours(ids[:, start:end], state)
        parts.append(logits)
    assert relative_error(torch.cat(parts, 1), expected) < 1e-4
    stepped = ours.init_state(2)
    for t in range(150):
        assert relative_error(ours.step_(ids[:, t], stepped), expected[:, t]) < 1e-4
    slots = ours.init_state(2)
    runner = make_runner(ours, slots, 256)
    assert runner.is_batch_invariant
    logits, _ = runner.read(ids[0].tolist(), None, 150)
    assert relative_error(logits, expected[0]) < 1e-4


@torch.inference_mode()
def test_generated_tokens_are_those_of_transformers(tokenizer_file: Path, tmp_path: Path) -> None:
    model = theirs(SHAPES[1])
    ours = converted(model, tokenizer_file, tmp_path)
    prompt, n = [5, 6, 7], 200
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
    )
    params = dataclasses.replace(GREEDY, max_tokens=n, ignore_eos=True)
    assert list(generate(ours, prompt, params, Ids(ours.config.vocab_size, 0))) == expected[0, 3:].tolist()


@torch.inference_mode()
def test_a_state_carried_over_10000_tokens_equals_that_of_transformers(tokenizer_file: Path, tmp_path: Path) -> None:
    model = theirs()
    ours = converted(model, tokenizer_file, tmp_path)
    ids = torch.randint(VOCAB_SIZE, (1, 10_000), generator=torch.Generator().manual_seed(0))
    expected = model(ids, use_cache=True)
    _, state = ours(ids[:, :-100])
    slots = ours.init_state(1)
    for reader in (make_runner(ours, slots, 10_000), EagerRunner(ours, slots)):
        logits, _ = reader.read(ids[0].tolist(), None, 1)
        assert relative_error(logits[0], expected.logits[0, -1]) < 1e-4
    for t in range(9_900, 10_000):
        logits = ours.step_(ids[:, t], state)
    assert relative_error(logits, expected.logits[:, -1]) < 1e-4


def by_authors_names(model: RwkvForCausalLM) -> dict[str, Tensor]:
    named = {}
    for name, tensor in model.state_dict().items():
        for old, new in AUTHOR_BY_TRANSFORMERS.items():
            name = name.replace(old, new)
        named[name] = tensor.clone()
    return named


def test_a_pth_file_gives_the_same_checkpoint(tokenizer_file: Path, tmp_path: Path) -> None:
    model = theirs(SHAPES[2])
    ours = converted(model, tokenizer_file, tmp_path)
    torch.save(by_authors_names(model), tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "again", tokenizer_file)
    again, words = load_checkpoint(tmp_path / "again")
    assert again.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert isinstance(words, HuggingFaceTokenizer)
    assert words.vocab_size == VOCAB_SIZE


def test_weights_keep_their_dtype(tokenizer_file: Path, tmp_path: Path) -> None:
    named = {name: tensor.bfloat16() for name, tensor in by_authors_names(theirs()).items()}
    torch.save(named, tmp_path / "model.pth")
    assert convert(tmp_path / "model.pth", tmp_path / "ours", tokenizer_file).config.dtype == "bfloat16"


def test_a_world_model_knows_the_roles_of_a_chat(tmp_path: Path) -> None:
    torch.save(by_authors_names(theirs()), tmp_path / "model.pth")
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text(WORLD_VOCABULARY, encoding="utf-8")
    convert(tmp_path / "model.pth", tmp_path / "ours")
    _, words = load_checkpoint(tmp_path / "ours")
    assert words.decode(words.encode("Hello, world")) == "Hello, world"
    template = (tmp_path / "ours" / "chat_template.jinja").read_text()
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi\n\nAssistant: no\n"}]
    rendered = Template(template).render(messages=messages)
    assert rendered == "System: Be brief.\n\nUser: Hi\nAssistant: no\n\nAssistant:"


def test_a_world_model_of_transformers_knows_them_too(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "rwkv_vocab_v20230424.txt").write_text(WORLD_VOCABULARY, encoding="utf-8")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"tokenizer_class": "RWKVWorldTokenizer"}')
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert "Assistant:" in (tmp_path / "ours" / "chat_template.jinja").read_text()
    assert not (tmp_path / "ours" / "tokenizer_config.json").exists()


def test_what_cannot_be_converted_is_explained(tokenizer_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    for source, sentence in (
        (tmp_path / "model.gguf", "is a GGUF file"),
        (Path("RWKV/rwkv-4"), "hf download RWKV/rwkv-4"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            convert(source, tmp_path / "ours", tokenizer_file)


def test_named_chat_templates_come_along(tokenizer_file: Path, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "theirs")
    described = '{"chat_template": [{"name": "default", "template": "a"}]}'
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(described)
    convert(tmp_path / "theirs", tmp_path / "ours", tokenizer_file)
    assert (tmp_path / "ours" / "tokenizer_config.json").read_text() == described


def test_a_template_that_is_damaged_is_found_before_anything_is_written(tokenizer_file: Path, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        convert(tmp_path / "theirs", tmp_path / "ours", tokenizer_file)
    assert not (tmp_path / "ours").exists()


def test_files_that_are_there_are_not_overwritten(tokenizer_file: Path, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "theirs")
    before = {file: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    with pytest.raises(CheckpointError, match="must be a new folder or an empty one"):
        convert(tmp_path / "theirs", tmp_path / "theirs", tokenizer_file)
    assert {file: file.read_bytes() for file in (tmp_path / "theirs").iterdir()} == before


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_no_pickle_is_executed(tokenizer_file: Path, tmp_path: Path) -> None:
    torch.save({"emb.weight": Harmful(tmp_path / "touched")}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="is not a file of tensors"):
        convert(tmp_path / "model.pth", tmp_path / "ours", tokenizer_file)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harmful(tmp_path / "touched")))
    with pytest.raises(CheckpointError, match="is not a file of tensors"):
        convert(tmp_path / "plain.pth", tmp_path / "ours", tokenizer_file)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.ffn.key.weight": None}, "lacks the tensor 'blocks.0.ffn.key.weight'"),
        ({"blocks.0.att.output.weight": None}, "lacks the tensor 'blocks.0.attention.out.weight'"),
        ({"blocks.0.att.time_mix_v": None}, "lacks the tensor 'blocks.0.att.time_mix_v'"),
        ({"blocks.0.att.gate.weight": torch.ones(2)}, "a tensor 'blocks.0.att.gate.weight' that the model does not"),
        ({"blocks.0.att.time_decay": torch.ones(2, 16)}, None),
        ({"blocks.0.att.time_decay": torch.ones(2, 15)}, "bias.time_decay' is"),
        ({"blocks.0.att.time_decay": torch.full((32,), float("nan"))}, "holds NaN"),
        ({"blocks.0.att.time_mix_v": torch.zeros(1, 1, 31)}, "is not a model of rwkv4"),
        ({"blocks.0.ffn.key.weight": torch.tensor(1.0)}, "is not a model of rwkv4"),
        ({"blocks.99999999999999999999999.x": torch.ones(1)}, "3 blocks must have the numbers from 0 to 2, not 99999"),
        ({"embedding.weight": torch.ones(400, 32)}, "two of its tensors have the name 'embedding.weight'"),
        ({"norm.weight": torch.ones(32)}, "two of its tensors have the name 'norm.weight'"),
        (
            {"blocks.0.att.key.weight": torch.ones(32, 32).int()},
            "key.weight' must be one of float32, bfloat16, float16,",
        ),
        ({"blocks.0.att.key.weight": torch.ones(32, 32).bool()}, "not torch.bool"),
        ({"blocks.0.att.key.weight": torch.ones(32, 32).to(torch.complex64)}, "not torch.complex64"),
        ({"blocks.0.att.key.weight": torch.ones(32, 32).double()}, "not torch.float64"),
        (
            {"blocks.0.att.key.weight": torch.ones(32, 32).to("meta")},
            "'blocks.0.att.key.weight' must be a dense tensor",
        ),
        ({"blocks.0.att.key.weight": torch.ones(32, 32).to_sparse()}, "must be a dense tensor"),
        ({"blocks.0.ln1.weight": torch.ones(1).expand(2**40)}, "must be a dense tensor with all its numbers"),
        ({"blocks.3.ln1.weight": torch.ones(32)}, "3 blocks must have the numbers from 0 to 2, not 3"),
        ({"blocks.01.ln1.weight": torch.ones(32)}, "3 blocks must have the numbers from 0 to 2, not 01"),
    ],
)
def test_other_tensors_are_refused_by_name(
    change: dict[str, Tensor | None], message: str | None, tokenizer_file: Path, tmp_path: Path
) -> None:
    named = by_authors_names(theirs()) | change
    torch.save({name: tensor for name, tensor in named.items() if tensor is not None}, tmp_path / "model.pth")
    if message is None:
        convert(tmp_path / "model.pth", tmp_path / "ours", tokenizer_file)
        return
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert(tmp_path / "model.pth", tmp_path / "ours", tokenizer_file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.ones(1)}, "must hold tensors by their names"),
        ([torch.ones(1)], "must hold tensors by their names"),
        ({"step": 3}, "'step' must be a dense tensor"),
        ({"emb": {"weight": torch.ones(1)}}, "'emb' must be a dense tensor"),
        ({"a": torch.ones(1)}, "holds no model of a family that can be converted"),
        ({"blocks.0.att.r_k": torch.ones(1)}, "this is a model of RWKV-7; of RWKV only RWKV-4"),
        ({"blocks.0.att.time_maa_x": torch.ones(1)}, "this is a model of RWKV-6"),
    ],
)
def test_a_pth_file_of_anything_else_is_refused(
    content: object, message: str, tokenizer_file: Path, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "model.pth", tmp_path / "ours", tokenizer_file)


def test_a_damaged_pth_file_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    """Whatever PyTorch's reader raises: here of its dozen a KeyError and an IndexError."""
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pth")
    whole = (tmp_path / "model.pth").read_bytes()
    start = whole.index(b"\x80\x02}")  # of the pickle in it
    for damage in (b"\x80\x02j", b"\x80\x02s"):
        (tmp_path / "model.pth").write_bytes(whole[:start] + damage + whole[start + len(damage) :])
        with pytest.raises(CheckpointError, match="is not a file of tensors"):
            convert(tmp_path / "model.pth", tmp_path / "ours", tokenizer_file)


def test_other_folders_are_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        convert(source, tmp_path / "ours", tokenizer_file)
    others: list[object] = [{"model_type": []}, {"model_type": {}}, []]
    for other in others:
        (source / "config.json").write_text(json.dumps(other))
        with pytest.raises(CheckpointError, match='must have "model_type": "rwkv"'):
            convert(source, tmp_path / "ours", tokenizer_file)
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match='this is a "gpt2" model; only "rwkv" can be converted'):
        convert(source, tmp_path / "ours", tokenizer_file)
    (source / "config.json").write_text('{"model_type": "rwkv4"}')
    with pytest.raises(CheckpointError, match="is a checkpoint of rwkv4 already"):
        convert(source, tmp_path / "ours", tokenizer_file)
    (source / "config.json").write_text(json.dumps({"model_type": "rwkv"}))
    with pytest.raises(CheckpointError, match=r"has neither .safetensors files nor"):
        convert(source, tmp_path / "ours", tokenizer_file)
    torch.save({"head.weight": torch.zeros(3, 4)}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'emb.weight'"):
        convert(source, tmp_path / "ours", tokenizer_file)
    torch.save(theirs().state_dict(), source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps({"model_type": "rwkv", "layer_norm_epsilon": None}))
    with pytest.raises(CheckpointError, match="layer_norm_epsilon must be a number between 0 and 1, not None"):
        convert(source, tmp_path / "ours", tokenizer_file)
    (source / "config.json").write_text(json.dumps({"model_type": "rwkv", "layer_norm_epsilon": 10**400}))
    with pytest.raises(CheckpointError, match="layer_norm_epsilon must be a number between 0 and 1, not 1000"):
        convert(source, tmp_path / "ours", tokenizer_file)
    (source / "config.json").write_text(json.dumps({"model_type": "rwkv", "tie_word_embeddings": "false"}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings must be true or false, not 'false'"):
        convert(source, tmp_path / "ours", tokenizer_file)
    (source / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        convert(source, tmp_path / "ours", tokenizer_file)
    (source / "config.json").write_text(json.dumps({"model_type": "rwkv"}))
    convert(source, tmp_path / "of_bin", tokenizer_file)
    theirs().save_pretrained(source)
    shutil.copyfile(source / "model.safetensors", source / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"has the tensor '.*' in model.safetensors and in another file"):
        convert(source, tmp_path / "ours", tokenizer_file)
    (source / "model.fp16.safetensors").unlink()
    with pytest.raises(TokenizationError, match=r"must have one of tokenizer.model, tokenizer.json"):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_untied_embeddings_and_the_state_survive_a_round_trip(tokenizer_file: Path, tmp_path: Path) -> None:
    model = random_model(tiny_config("rwkv4", tie_embeddings=False))
    save_checkpoint(tmp_path, model, HuggingFaceTokenizer(tokenizer_file.read_bytes()))
    loaded, _ = load_checkpoint(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    logits, state = model(ids)
    assert torch.equal(loaded(ids)[0], logits)
    assert {layer.shifted.shape for layer in state.layers} == {(1, 2, 16)}
