"""`aft train` as a user runs it: from text to a checkpoint folder, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import load_checkpoint
from model.training.data import PackedBatches, encode_documents, read_documents
from model.training.evaluate import bits_per_character
from model.training.progress import plot_history
from model.training.trainer import Loss
from tests.conftest import STORIES

SETTINGS = [
    *("--vocab-size", "380", "--d-model", "16", "--n-layer", "1", "--n-head", "2", "--window", "4"),
    *("--batch-size", "4", "--context", "16", "--steps", "6", "--warmup-steps", "2"),
    *("--evaluate-every", "3", "--checkpoint-every", "3"),
]


def run(*arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    command = [*launcher, "-m", "server", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_text_in_checkpoint_out_and_on(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run("--data", f"{text}:2", "--validation", str(text), "--out", str(out), *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "step 6" in done.stdout
    assert "bits/character" in done.stdout
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.model", "loss.png", "training_log.jsonl"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = load_checkpoint(out)
    reported = json.loads((out / "training_log.jsonl").read_text().splitlines()[-1])["validation"]
    assert bits_per_character(model, tokenizer, STORIES) == pytest.approx(reported, rel=1e-4)

    again = run("--data", f"{text}:2", "--validation", str(text), "--out", str(out), *SETTINGS, "--resume")
    assert again.returncode == 0, again.stderr
    assert "step" not in again.stdout  # there was nothing left to do


def test_a_run_may_start_from_a_checkpoint(text: Path, tmp_path: Path) -> None:
    """Its first loss is that checkpoint's; shape and tokenizer are the checkpoint's too."""
    first, second = tmp_path / "first", tmp_path / "second"
    settings = ["--learning-rate", "0.02", *SETTINGS]
    assert run("--data", str(text), "--out", str(first), *settings).returncode == 0
    fresh = losses(first)[0]
    short = ["--batch-size", "4", "--context", "16", "--steps", "1", "--warmup-steps", "0"]
    assert run("--data", str(text), "--out", str(second), "--init", str(first), *short).returncode == 0
    assert losses(second)[0] < fresh - 0.05
    (start, words), (end, same_words) = load_checkpoint(first), load_checkpoint(second)
    assert words.content == same_words.content
    assert start.config == end.config
    batch = PackedBatches([(encode_documents(read_documents(text), words), 1.0)], batch_size=4, context=16, seed=0)
    assert losses(second)[0] == pytest.approx(float(Loss(start)(torch.from_numpy(batch.batch(0)).long())), rel=1e-5)


def test_two_processes_give_the_losses_of_one(text: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("--data", str(text), "--out", str(one), *SETTINGS).returncode == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = run("--data", str(text), "--out", str(two), *SETTINGS, launcher=torchrun)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], "error: "),
        (["--data", "x.txt:-1"], "error: data must be PATH or PATH:REPEATS"),
        (["--data", "x.txt", "--steps", "0"], "error: steps must be from 1 to 2147483647, not 0."),
        (
            ["--data", "TEXT", "--validation", "TEXT", "--variant", "full", *SETTINGS, "--max-positions", "16"],
            "tokens of a validation document, not 16.",
        ),
        (["--data", "TEXT", "--init", "x", "--d-model", "8"], "error: d_model is that of the checkpoint"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments: list[str], message: str, text: Path, tmp_path: Path) -> None:
    arguments = [str(text) if argument == "TEXT" else argument for argument in arguments]
    done = run(*arguments, "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_matplotlib_there_is_no_picture_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot_history(tmp_path / "loss.png", [])
    assert not list(tmp_path.iterdir())
