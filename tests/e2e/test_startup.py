"""What is left of the start of a server."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Server


def children(pid: int) -> set[int]:
    """Processes whose parent it is, zombies too."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid:
            found.add(int(stat.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_process_that_compiles_is_waited_for(checkpoint: Path) -> None:
    with Server("--model", str(checkpoint)) as server:
        deadline = time.monotonic() + 60  # it may take longer than the server's own start
        while left := children(server.process.pid):
            assert time.monotonic() < deadline, f"{left} are still there"
            time.sleep(0.1)
