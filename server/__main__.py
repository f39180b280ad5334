"""`aft`, and `python -m server`, which is the same."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "model" / "native" / "library.py"


def main() -> None:
    # The first process of a container has no default handlers: without one, it could not be stopped before it serves.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if "serve" in sys.argv[1:2]:
        subprocess.Popen([sys.executable, KERNELS])  # while this process imports PyTorch
    from server.commands.main import main as run

    run()


if __name__ == "__main__":
    main()
