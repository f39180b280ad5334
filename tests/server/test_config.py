"""Settings of a server: what is refused before anything starts, and what is known by then."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import typer

from model import LanguageModel, Tokenizer, save_checkpoint
from server.api.config import APIConfig
from server.assemble import state_bytes
from server.commands.bench import BenchError
from server.commands.main import app
from server.commands.train import choose_device
from server.config import ServerConfig, server_config
from server.device import find_device
from server.engine import EngineConfig, LLMEngine
from server.errors import ConfigurationError

STORE = ["--store", "sessions.sqlite"]


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigurationError) as error:
        app(["serve", *arguments], standalone_mode=False)
    return str(error.value)


def test_mistakes_are_a_sentence() -> None:
    for arguments, sentence in (
        (["--ray", "--replicas", "0"], "replicas must be at least 1, not 0."),
        (["--ray", "--replicas", "2", "--max-replicas", "1"], "max_replicas must be at least replicas = 2, not 1."),
        (["--ray", "--replicas", "2"], "store must be given for several replicas, which share it."),
        (["--ray", "--max-replicas", "2"], "store must be given for several replicas, which share it."),
        (["--replicas", "2", *STORE], "replicas and max_replicas need --ray."),
        (["--replicas", "2"], "replicas and max_replicas need --ray."),
        (["--max-replicas", "2"], "replicas and max_replicas need --ray."),
    ):
        assert refusal(*arguments) == sentence


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("threads", str(10**30), "from 1 to 1024"),
        ("chunk-size", str(10**12), "from 1 to 65536"),
        ("max-sessions", str(10**30), "from 1 to 2147483647"),
        ("session-ttl", "inf", "positive and at most 1000000000"),
        ("request-timeout", "inf", "positive and at most 1000000000"),
        ("grammar-timeout", "1e+30", "positive and at most 1000000000"),
        ("drain-timeout", "nan", "from 0 to 1000000000"),
        ("drain-timeout", "-1.0", "from 0 to 1000000000"),
        ("max-num-seqs", str(10**30), "from 1 to 65536"),
    ],
)
def test_a_number_that_nothing_can_count_is_a_sentence(option: str, value: str, sentence: str) -> None:
    assert refusal(f"--{option}", value) == f"{option.replace('-', '_')} must be {sentence}, not {value}."


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://[::1", "127.0.0.1:8000", "nonsense", "https://a"])
def test_bench_asks_a_server_over_http_only(url: str) -> None:
    with pytest.raises(BenchError) as error:
        app(["bench", "--url", url], standalone_mode=False)
    assert str(error.value).startswith(f"url must be http://HOST:PORT, not {url!r}")


@pytest.mark.parametrize("device", ["foo", "", "cuda", "cuda:1", "meta", "mps", "mkldnn", "privateuseone", "auto"])
def test_a_device_that_is_not_here_is_a_sentence(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    sentence = f"device must be cpu on this machine, not {device!r}."
    if device.startswith("cuda"):
        sentence += " This PyTorch was built without CUDA; https://pytorch.org/get-started/locally has the others."
    assert refusal("--device", device) == sentence
    for command in (["generate"], ["batch", os.devnull, str(tmp_path / "out")]):
        with pytest.raises(ConfigurationError) as error:
            app([*command, "--device", device], standalone_mode=False)
        assert str(error.value) == sentence
    if device != "auto":
        with pytest.raises(ConfigurationError) as error:
            choose_device(device)
        assert str(error.value) == sentence


def test_the_devices_that_are_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [find_device(name) for name in ("cpu", "cuda", "cuda:1")] == [
        torch.device(name) for name in ("cpu", "cuda", "cuda:1")
    ]
    with pytest.raises(ConfigurationError, match="device must be cpu or cuda or cuda:0 or cuda:1 on this machine"):
        find_device("cuda:2")


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.deploy.replicas", None)
    assert refusal("--ray") == "ray needs Ray Serve: pip install 'ray[serve]'."


def config_of(*arguments: str) -> ServerConfig:
    command = typer.Typer()
    command.command()(server_config)
    config: ServerConfig = command(arguments, standalone_mode=False)
    return config


def test_a_config_holds_in_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in that of another process, which does not read the file of keys."""
    (tmp_path / "keys").write_text("one\n\n two \n")
    monkeypatch.chdir(tmp_path)
    config = config_of(
        "--model", "mine", *STORE, "--api-keys", "zero", "--api-key-file", "keys", "--max-body-size", "3"
    )
    assert (config.model, config.store) == (tmp_path / "mine", str(tmp_path / "sessions.sqlite"))
    assert config.api == APIConfig(model_name="mine", api_keys=("zero", "one", "two"), max_body_size=3 * 2**20)
    config = config_of("--served-model-name", "theirs", "--store", "redis://host")
    assert (config.api.model_name, config.api.api_keys, config.store) == ("theirs", (), "redis://host")


def test_no_key_where_keys_are_asked_for_is_refused() -> None:
    """Or an empty variable of a script would open the server."""
    assert refusal("--api-keys", "").startswith("api_keys and api_key_file hold no key")


@pytest.mark.parametrize("n_states", [1, 2, 100])
def test_an_engine_has_the_slots_that_its_config_tells(
    n_states: int, network: LanguageModel, tokenizer: Tokenizer
) -> None:
    size = network.init_state(1).nbytes
    config = EngineConfig(max_num_seqs=3, state_memory=n_states * size + 1, max_queue_length=5)
    n_slots = LLMEngine(network, tokenizer, config).pool.n_slots
    assert n_slots == config.n_slots(size) == min(3, n_states)
    assert config.capacity(size) == n_slots + 5
    with pytest.raises(ConfigurationError, match=f"state_memory must be at least 1 MiB, for the {size} bytes"):
        EngineConfig(state_memory=size - 1).n_slots(size)


def test_the_bytes_of_a_state_are_known_without_weights(
    network: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert state_bytes(tmp_path) is None
    save_checkpoint(tmp_path, network, tokenizer)
    (tmp_path / "model.safetensors").unlink()
    assert state_bytes(tmp_path) == network.init_state(1).nbytes
