from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.sanitized import PLANTED


def test_kernels_touch_no_memory_but_their_own_and_do_nothing_undefined(tmp_path: Path) -> None:
    """Of all variants and formats, odd sizes and hostile states, as each vector width of this machine compiles them."""
    gcc = shutil.which("gcc")
    asked = [gcc, "-print-file-name=libasan.so"] if gcc else ["echo"]
    runtime = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("needs gcc and its libasan")
    options = {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=0"}
    cache = {"CC": "gcc", "XDG_CACHE_HOME": str(tmp_path), "LD_PRELOAD": str(runtime)}
    command = [sys.executable, "-m", "tests.model.sanitized"]
    done = subprocess.run(command, env=os.environ | options | cache, capture_output=True, text=True, timeout=1800)
    found, _, planted = done.stderr.partition(PLANTED)
    assert not found.strip(), found[:4000]
    assert "heap-buffer-overflow" in planted
    assert "signed integer overflow" in planted
