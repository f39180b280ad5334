"""Replicas: what is refused before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest

from server import threads
from server.commands.main import app
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
    ):
        assert refusal(*arguments) == sentence


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.deploy.replicas", None)
    assert refusal("--ray") == "ray needs Ray Serve: pip install 'ray[serve]'."


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
