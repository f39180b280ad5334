"""How many threads, and that they are set before a model is loaded: its kernels are made for that many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from model.errors import CheckpointError
from server import threads
from server.assemble import assemble
from server.commands.main import app
from server.config import ServerConfig
from server.errors import ConfigurationError


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("9000000 100000", 64), ("max 100000", 64)],
)
def test_a_container_has_the_threads_that_its_quota_pays_for(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "CPU_QUOTA", tmp_path / "cpu.max")
    with mock.patch("torch.get_num_threads", return_value=64):
        assert threads.available_cores() == 64
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert threads.available_cores() == cores


def generate(folder: Path, *options: str) -> Any:
    return app(["generate", "--model", str(folder), *options], standalone_mode=False)


def batch(folder: Path, *options: str) -> Any:
    (folder / "in.jsonl").write_text("")
    files = (str(folder / "in.jsonl"), str(folder / "out.jsonl"))
    with mock.patch("server.assemble.configure_logging"), mock.patch("sys.setswitchinterval"):
        return app(["batch", *files, "--model", str(folder), *options], standalone_mode=False)


def serve(folder: Path, *options: str) -> Any:
    with mock.patch("server.assemble.configure_logging"), mock.patch("sys.setswitchinterval"):
        return assemble(ServerConfig(model=folder, threads=int(options[1]) if options else None))


@pytest.mark.parametrize("start", [generate, batch, serve])
def test_they_are_set_before_a_model_is_loaded(start: Callable[..., Any], tmp_path: Path) -> None:
    for options, expected in ((["--threads", "3"], 3), ([], threads.available_cores())):
        with mock.patch("torch.set_num_threads") as set_num_threads:
            with pytest.raises(CheckpointError, match="has no file"):
                start(tmp_path, *options)
            set_num_threads.assert_called_once_with(expected)


@pytest.mark.parametrize("start", [generate, batch, serve])
def test_no_thread_is_too_few(start: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="threads must be from 1 to 1024, not 0"):
        start(tmp_path, "--threads", "0")


@pytest.mark.parametrize(("start", "load"), [(generate, "generate.load_llm"), (batch, "batch.assemble")])
def test_commands_without_a_server_quantise_too(start: Callable[..., Any], load: str, tmp_path: Path) -> None:
    configs = []
    for options in ([], ["--quantize", "int8"]):
        with mock.patch(f"server.commands.{load}", side_effect=CheckpointError("enough")) as loaded:
            with pytest.raises(CheckpointError, match="enough"):
                start(tmp_path, *options)
            configs.append(loaded.call_args.args[0].engine.quantize)
    assert configs == [None, "int8"]
