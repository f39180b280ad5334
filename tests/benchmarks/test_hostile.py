"""The soak in small: nothing that hostile clients do is seen by others, ends the server, or stays without an answer.

How long ordinary clients waited is not asserted here; `python -m benchmarks.hostile` tells it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.hostile.attacker import ATTACKS, LeakError, UnansweredError
from benchmarks.hostile.files import file_of, taken_apart
from benchmarks.hostile.soak import soak
from model import load_checkpoint
from server.engine import LLMEngine
from server.engine.snapshot import Snapshot

# They take a minute each where the server is right.
LEFT_OUT = {
    *("body slow", "headers slow", "connections silent", "streams unread", "streams read slowly", "prompt long"),
    *("body of unknown keys", "tokenize long", "detokenize long", "wide by allowed ids", "wide by length"),
    "wide by logprobs",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the attacker has an address of his own, 127.0.0.2")
def test_hostile_clients_are_kept_apart(checkpoint: Path) -> None:
    names = [name for name in ATTACKS if name not in LEFT_OUT]
    report = soak(600, 6, names, ["--model", str(checkpoint), "--threads", "1"], rounds=1)
    assert report.deaths == []
    assert report.of(LeakError.__name__) + report.seen.differences == []
    assert report.of(UnansweredError.__name__) == []
    assert report.left_behind == ""
    assert {one.name for one in report.attempts} == set(names)


def test_a_crafted_file_has_a_right_checksum(checkpoint: Path) -> None:
    """Else all of them would be refused for that."""
    model, tokenizer = load_checkpoint(checkpoint)
    files = LLMEngine(model, tokenizer).state_files
    good = files.write(Snapshot(model.init_state(1), None, b""), [5])
    again = file_of(*taken_apart(good))
    assert files.read(again)[1] == (5,)
