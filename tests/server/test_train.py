"""`aft train`, in this process: what it does not write over, how it is stopped, and what it says."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from model import load_checkpoint
from model.errors import ModelError
from model.training.trainer import Trainer
from server.commands.main import app

SETTINGS = [
    *("--vocab-size", "380", "--d-model", "16", "--n-layer", "1", "--n-head", "2", "--window", "4"),
    *("--batch-size", "4", "--context", "16", "--steps", "6", "--warmup-steps", "2", "--checkpoint-every", "4"),
]


def train(text: Path, out: Path, *more: str) -> Any:
    """The status."""
    with mock.patch("server.commands.train.use_threads"):  # which all tests share
        return app(["train", "--data", str(text), "--out", str(out), *SETTINGS, *more], standalone_mode=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_is_written_over_only_if_that_is_asked_for(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "keep"
    assert not train(text, out)
    before = contents(out)
    with pytest.raises(ModelError) as error:
        train(text, out, "--seed", "5")
    assert str(error.value) == f"{out} holds a checkpoint of step 6; --resume, another --out, or --overwrite."
    assert contents(out) == before
    with pytest.raises(ModelError, match="resume and overwrite exclude each other"):
        train(text, out, "--resume", "--overwrite")

    (out / "tokenizer.json").write_text("another model's")
    (out / "notes").write_text("mine")
    assert not train(text, out, "--seed", "5", "--overwrite")
    after = contents(out)
    assert after["model.safetensors"] != before["model.safetensors"]
    assert after.keys() == {*before, "notes"}
    load_checkpoint(out)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "training_log.jsonl"])
def test_a_checkpoint_without_the_state_of_a_run_is_one_too(name: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("anything")
    with pytest.raises(ModelError) as error:
        train(text, tmp_path / "out")
    assert str(error.value) == f"{tmp_path / 'out'} holds {name}; another --out, or --overwrite."
    assert contents(tmp_path / "out") == {name: b"anything"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_goes_on(
    number: signal.Signals, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert not train(text, whole)
    step, handler = Trainer._train_step, signal.getsignal(number)

    def interrupted(self: Trainer) -> Any:
        if self.step == 1:
            signal.raise_signal(number)
        return step(self)

    with mock.patch.object(Trainer, "_train_step", interrupted):
        assert train(text, parts) == 128 + number
    assert signal.getsignal(number) is handler
    told = capsys.readouterr().out
    assert "stopping after this step; once more ends the run at once" in told
    assert f"stopped at step 2 of 6; its checkpoint is in {parts}, and the same command with --resume goes on" in told
    load_checkpoint(parts)
    assert not train(text, parts, "--resume")
    assert contents(parts)["model.safetensors"] == contents(whole)["model.safetensors"]
    assert contents(parts)["training_log.jsonl"] == contents(whole)["training_log.jsonl"]


def test_without_a_terminal_there_are_lines(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("model.training.progress.SECONDS_BETWEEN_LINES", 1e9):
        train(text, tmp_path / "one")
    assert capsys.readouterr().out.count("step ") == 1, "at once"
    with mock.patch("model.training.progress.SECONDS_BETWEEN_LINES", -1.0):
        train(text, tmp_path / "all")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 6
    last = json.loads((tmp_path / "all" / "training_log.jsonl").read_text().splitlines()[-1])
    assert lines[-1].startswith(f"step 6 of 6  tokens 384  loss {last['loss']:.3f}  ")
    assert "nan" not in "".join(lines)


def test_a_picture_that_is_not_drawn_is_told(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.dict("sys.modules", {"matplotlib": None}):
        train(text, tmp_path / "out")
    assert "There is no loss.png: it needs matplotlib." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "more", "sentence"),
    [
        (b"", [], "TEXT holds no text."),
        (b"\n<|endoftext|>\n\n", [], "TEXT holds no text."),
        (b"ab\xff", [], "TEXT must be text in UTF-8: 'utf-8' codec can't decode byte 0xff in position 2"),
        (b"hello there", ["--vocab-size", "1000000"], "vocab_size = 1000000 is none for these texts: at most 2"),
        (None, ["--batch-size", str(2**31 - 1), "--context", "64"], "batch_size and context must be less than 2147"),
        (None, ["--batch-size", str(2**31)], "batch_size must be from 1 to 2147483647, not 2147483648."),
        (None, ["--learning-rate", "1e38"], "learning_rate must be positive and at most 1000, not 1e+38."),
        (None, ["--threads", "100000"], "threads must be from 1 to 1024, not 100000."),
        (None, ["--out", "TEXT"], "out must be a folder, which TEXT is not."),
    ],
)
def test_mistakes_are_sentences_and_leave_nothing(
    content: bytes | None, more: list[str], sentence: str, text: Path, tmp_path: Path
) -> None:
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(Exception) as error:  # noqa: PT011 - the sentence says which
        train(text, tmp_path / "out", *(word.replace("TEXT", str(text)) for word in more))
    assert str(error.value).startswith(sentence.replace("TEXT", str(text)))
    assert list(tmp_path.iterdir()) == [text]
