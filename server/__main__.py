"""`aft`, and `python -m server`, which is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).parent.parent  # where `model` is found, wherever this is started
COMPILE = [sys.executable, "-m", "model.backends.native.compiler"]


def main() -> None:
    open_standard_streams()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, leave)
    # The first process of a container has no default handlers: without one, it could not be stopped before it serves.
    signal.signal(signal.SIGTERM, leave)
    if "serve" in sys.argv[1:2]:
        # While this process imports PyTorch. Ctrl-C is meant for this one only.
        compiler = subprocess.Popen(COMPILE, cwd=ROOT, process_group=0)
        threading.Thread(target=compiler.wait, daemon=True).start()  # or it would remain as a zombie
    from server.commands.main import main as run

    run()


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """Without a traceback, whatever is being imported or done."""
    sys.exit(128 + number)


def open_standard_streams() -> None:
    """Those that are closed, on nothing: the next file that is opened would be taken for one, and written into."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


if __name__ == "__main__":
    main()
