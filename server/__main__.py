"""`aft`, and `python -m server`, which is the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent  # where `model` is found, wherever this is started
COMPILE = [sys.executable, "-m", "model.backends.native.compiler"]


def main() -> None:
    # The first process of a container has no default handlers: without one, it could not be stopped before it serves.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if "serve" in sys.argv[1:2]:
        compiler = subprocess.Popen(COMPILE, cwd=ROOT)  # while this process imports PyTorch
        threading.Thread(target=compiler.wait, daemon=True).start()  # or it would remain as a zombie
    from server.commands.main import main as run

    run()


if __name__ == "__main__":
    main()
