"""The folder in which compiled kernels are kept, with kernels that do nothing and are compiled at once."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from model.backends.native import compiler
from model.backends.native.compiler import Library, library
from tests.model.test_compiler import compiler_that

SOURCE = """
#include <stdint.h>
int64_t panel_width(void) { return 8; }
int64_t is_parallel(void) { return 1; }
void run(void) {}
"""
COMPILE = """
import sys, pathlib
from model.backends.native import compiler
compiler.SOURCES = pathlib.Path(sys.argv[1])
compiler.compile_ahead()
"""


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "kernels.c").write_text(SOURCE)
    monkeypatch.setattr(compiler, "SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    yield folder
    library.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where they are kept."""
    return tmp_path / "aft"


def compiled() -> Path:
    """The only library that is kept, found or made."""
    library.cache_clear()
    assert library() is not None
    (kept,) = (Path(os.environ["XDG_CACHE_HOME"]) / "aft").glob("*.so")
    return kept


def test_others_can_write_nothing_that_is_kept(folder: Path, sources: Path) -> None:
    """Whatever the umask is, and in folders that were there."""
    folder.mkdir()
    folder.chmod(0o777)
    for home in (folder.parent, folder / "a" / "b"):
        environment = {**os.environ, "XDG_CACHE_HOME": str(home)}
        subprocess.run([sys.executable, "-c", COMPILE, sources], check=True, env=environment, umask=0)
        (kept,) = (home / "aft").glob("*.so")
        modes = [path.stat().st_mode & 0o777 for path in (home / "aft", kept, home / "aft" / "lock")]
        assert modes == [0o700, 0o755, 0o600]
    assert folder.joinpath("a").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_loaded(what: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept, of = compiled(), compiler._is_ours
    library.cache_clear()
    before, not_ours = kept.stat().st_ino, (folder if what == "folder" else kept).stat().st_ino
    with (
        mock.patch.object(compiler, "_is_ours", lambda status: status.st_ino != not_ours and of(status)),
        mock.patch.object(compiler, "Library", wraps=Library) as loaded,
        caplog.at_level(logging.WARNING),
    ):
        assert library() is not None
    (path,) = loaded.call_args.args
    if what == "folder":
        assert "belongs to another user" in caplog.text
        assert not path.is_relative_to(folder.parent)
        assert not path.parent.exists()
    else:
        assert path.stat().st_ino != before


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_library_that_others_could_write_is_compiled_again(mode: int) -> None:
    kept = compiled()
    kept.chmod(mode)
    before = kept.stat().st_ino
    assert compiled().stat().st_ino != before


@pytest.mark.parametrize("damage", ["cut", "empty", "without our functions", "of another system"])
def test_a_damaged_library_is_compiled_again(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = compiled()
    content = kept.read_bytes()
    kept.unlink()  # the one that this process has loaded
    if damage == "without our functions":
        subprocess.run(["cc", "-shared", "-x", "c", os.devnull, "-o", str(kept)], check=True)
    elif damage == "of another system":
        other = b"\x7fELF\x02 of another system"
        kept = kept.with_name(f"{kept.stem.rpartition('-')[0]}-{compiler._digest_of(other)}.so")
        kept.write_bytes(other)
    else:
        kept.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    with caplog.at_level(logging.WARNING):
        again = compiled()
    assert not caplog.text
    assert again.stem.rpartition("-")[2] == compiler._digest_of(again.read_bytes())
    with mock.patch.object(compiler, "_compile", side_effect=AssertionError("compiled once more")):
        compiled()


def test_what_was_left_by_an_interrupted_compilation_is_removed(folder: Path) -> None:
    (folder / "tmpabc").mkdir(parents=True)
    (folder / "tmpabc" / "kernels.so").touch()
    compiled()
    assert {path.suffix for path in folder.iterdir()} == {".so", ""}
    assert not (folder / "tmpabc").exists()


def test_a_lock_that_is_held_for_ever_ends_in_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    monkeypatch.setattr(compiler, "LOCK_SECONDS", 0.1)
    with (folder / "lock").open("w") as held, caplog.at_level(logging.WARNING):
        fcntl.flock(held, fcntl.LOCK_EX)
        assert library() is not None
    assert "lock has been locked for 0.1 seconds" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_a_compiler_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setenv("CC", compiler_that(tmp_path, f"sleep 600 &\necho $! > {pid}.new\nmv {pid}.new {pid}\nwait"))
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 1.0)
    with caplog.at_level(logging.WARNING):
        assert library() is None
    assert "was not done after 1.0 seconds" in caplog.text
    while pid.exists() and runs(pid.read_text().strip()):
        time.sleep(0.01)


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("false", "false ended with status 1."),
        ("sh -c 'kill -9 $$'", "sh ended with status -9."),
        ("'gcc", 'CC = "\'gcc" is not a command: No closing quotation.'),
        ("true", "No such file or directory"),
        ("no-such-compiler -O1", "No such file or directory: 'no-such-compiler'"),
    ],
)
def test_a_compiler_that_fails_is_a_sentence(
    command: str, sentence: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", command)
    with caplog.at_level(logging.WARNING):
        assert library() is None
    assert sentence in caplog.text


def test_a_compiler_may_have_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -Wall")
    assert library() is not None
