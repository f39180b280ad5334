from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_missing_checkpoint_is_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "serve", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: Checkpoint folder {tmp_path} has no file config.json.\n"
