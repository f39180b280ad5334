from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from model.backends.choose import make_runner
from model.backends.native import compiler
from model.backends.native.calls import AddGated, Norm
from model.backends.native.compiler import Library, library
from tests.conftest import random_model, tiny_config

PROGRAM = [sys.executable, "-m", "model.backends.native.compiler"]


@pytest.fixture
def fresh_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled yet; the folder where it will be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield tmp_path / "aft"
    library.cache_clear()


def compiled() -> Library:
    kernels = library()
    assert kernels is not None
    return kernels


def compiler_that(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_library_is_compiled_once_and_kept(fresh_library: Path) -> None:
    for _ in range(2):
        library.cache_clear()
        compiled()
        (kept,) = fresh_library.glob("*.so")
    assert {path.name for path in fresh_library.iterdir()} == {kept.name, "lock"}


@pytest.mark.usefixtures("fresh_library")
def test_a_user_without_a_home_has_kernels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    with mock.patch("pathlib.Path.home", side_effect=RuntimeError("Could not determine home directory.")):
        assert library() is not None


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    script = compiler_that(tmp_path, f'echo >> {calls}\nsleep 0.3\nexec cc "$@"')
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CC": script}
    for process in [subprocess.Popen(PROGRAM, env=environment) for _ in range(3)]:
        assert process.wait() == 0
    assert len(calls.read_text()) == 1
    assert len(list((tmp_path / "aft").glob("*.so"))) == 1


def test_what_compiles_does_not_import_pytorch() -> None:
    script = "import sys; import model.backends.native.compiler, model.errors; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert "model.backends.native.compiler" in modules
    assert "torch" not in modules


@torch.inference_mode()
def outputs() -> list[Tensor]:
    """What a small model gives for a batch and for a prompt, and the states after them, by two threads."""
    model, before = random_model(tiny_config("local", d_model=90, n_head=3, d_ff=77)), torch.get_num_threads()
    torch.set_num_threads(2)
    states = model.init_state(3)
    runner = make_runner(model, states, 64)
    torch.set_num_threads(before)
    logits = [runner.step_([token_id, 7, 300]).clone() for token_id in range(20)]
    read, state = runner.read(list(range(50)), None, 50)
    return [*logits, read, *state.tensors(), *states.tensors()]


def test_a_compiler_without_openmp_gives_the_same_bits(
    fresh_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = outputs()
    assert compiled().is_parallel
    library.cache_clear()
    refuses = "echo \"clang: error: unsupported option '-fopenmp'\" >&2; exit 1"
    script = f'case "$*" in *-fopenmp*) {refuses};; esac\nexec cc "$@"'
    monkeypatch.setenv("CC", compiler_that(tmp_path, script))
    with caplog.at_level(logging.WARNING):
        found = outputs()
    assert not compiled().is_parallel
    assert len(list(fresh_library.glob("*.so"))) == 2
    assert "one thread" in caplog.text
    assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("fresh_library")
def test_other_errors_of_a_compiler_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = tmp_path / "calls"
    script = compiler_that(
        tmp_path, f"echo >> {calls}\necho 'fatal error: math.h: compilation terminated.' >&2; exit 1"
    )
    monkeypatch.setenv("CC", script)
    with caplog.at_level(logging.WARNING):
        assert library() is None
    assert "math.h" in caplog.text
    assert len(calls.read_text()) == 1


@pytest.mark.usefixtures("fresh_library")
def test_another_constant_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiler._digest([])
    changed = {**compiler.CONSTANTS, "KEY_BLOCK": "32"}
    with mock.patch.object(compiler, "_kept", side_effect=OSError("not compiled")) as kept:
        library()
        monkeypatch.setattr(compiler, "CONSTANTS", changed)
        library.cache_clear()
        library()
    (_, first), (_, second) = (call.args for call in kept.call_args_list)
    assert compiler._digest(first) != compiler._digest(second)
    with mock.patch.object(compiler, "SOURCES", compiler.SOURCES.parent):
        assert compiler._digest([]) != before


def test_a_program_runs_its_calls_in_order_and_keeps_their_tensors() -> None:
    kernels, x, gate = compiled(), torch.randn(5, 33), torch.randn(5, 33)
    out = torch.zeros(5, 33)
    expected = torch.nn.functional.layer_norm(x, (33,)) + torch.sigmoid(gate) * x

    def written() -> compiler.Tasks:
        weight, bias = torch.ones(33), torch.zeros(33)
        return kernels.tasks([Norm(x, weight, bias, 1e-5, out), AddGated(gate, x, out)])

    program = written()
    torch.full((10_000,), float("nan"))  # takes memory that was given back
    program.run(5, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_library_says_what_it_has() -> None:
    kernels = compiled()
    assert kernels.has("aft")
    assert not kernels.has("linear_int4")

    class Unknown(Norm):
        function = "unknown"

    row = torch.zeros(1, 4)
    with pytest.raises(AttributeError, match="unknown"):
        kernels.tasks([Unknown(row, row, row, 1e-5, row)])
