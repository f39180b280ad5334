from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import Tokenizer
from model.errors import ConfigError
from model.training.data import PackedBatches, Source, encode_documents, read_documents


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\n\nstill one\n<|endoftext|>\ntwo\n", ["one\n\nstill one", "two"]),
        ("one\n<|endoftext|>\n<|endoftext|>\n\n<|endoftext|>", ["one"]),
        ("<|endoftext|>\none", ["one"]),
        ("not a line: <|endoftext|>\n", ["not a line: <|endoftext|>"]),
        ("", []),
    ],
)
def test_documents_are_separated_by_lines(text: str, documents: list[str], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text)
    assert read_documents(path) == documents


def test_a_file_that_is_not_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"one \xff")
    with pytest.raises(ConfigError, match=r"text.txt must be text in UTF-8: .* position 4"):
        read_documents(tmp_path / "text.txt")


def test_every_document_stands_between_ends(tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text_id
    a, b = tokenizer.encode("the fox"), tokenizer.encode("bird")
    assert encode_documents(["the fox", "bird"], tokenizer).tolist() == [end, *a, end, *b, end]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a/b.txt", Source(Path("a/b.txt"))),
        ("a.txt:2.5", Source(Path("a.txt"), 2.5)),
        ("c:d.txt:3", Source(Path("c:d.txt"), 3.0)),
    ],
)
def test_source_is_a_path_with_repeats(text: str, source: Source) -> None:
    assert Source.parse(text) == source


@pytest.mark.parametrize("text", ["a.txt:", "a.txt:0", "a.txt:-1", "a.txt:inf", "a.txt:nan", "a.txt:often"])
def test_bad_repeats_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"PATH or PATH:REPEATS with a positive number, not 'a\.txt:"):
        Source.parse(text)


def batches(repeats: tuple[float, float] = (2.0, 0.5), seed: int = 0, batch_size: int = 3) -> PackedBatches:
    streams = [(np.arange(1000, dtype=np.int32), repeats[0]), (np.arange(5000, 7000, dtype=np.int32), repeats[1])]
    return PackedBatches(streams, batch_size=batch_size, context=10, seed=seed)


def test_windows_are_runs_of_a_stream() -> None:
    for step in range(100):
        batch = batches().batch(step)
        assert batch.shape == (3, 11)
        assert (np.diff(batch, axis=1) == 1).all()


def test_a_pass_reads_each_stream_as_often_as_it_should() -> None:
    data = batches(batch_size=1)
    seen = Counter(int(token) for step in range(data.windows_per_pass) for token in data.batch(step)[0, :-1])
    counts = np.array([seen[token] for token in range(30, 970)])
    assert (counts == 2).all()  # away from the ends, where the phase matters
    second = [seen[token] for token in range(5000, 7000)]
    assert max(second) == 1
    assert sum(second) == pytest.approx(1000, abs=30)


@given(step=st.integers(0, 5000), seed=st.integers(0, 2**32))
def test_a_batch_depends_on_seed_and_step_alone(step: int, seed: int) -> None:
    walked = batches(seed=seed)
    walked.batch(0)
    walked.batch(step + 700)
    assert (walked.batch(step) == batches(seed=seed).batch(step)).all()


def test_passes_and_seeds_differ() -> None:
    one_pass = batches(batch_size=1).windows_per_pass
    first = [int(batches(batch_size=1).batch(i)[0, 0]) for i in range(50)]
    assert first != [int(batches(batch_size=1).batch(one_pass + i)[0, 0]) for i in range(50)]
    assert first != [int(batches(batch_size=1, seed=1).batch(i)[0, 0]) for i in range(50)]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no window of context \+ 1 = 11 tokens"):
        PackedBatches([(np.arange(11, dtype=np.int32), 1.0)], batch_size=1, context=10, seed=0)
