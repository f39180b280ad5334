from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.engine.detokenizer import Detokenizer


def pieces(data: bytes, cuts: list[int], stop: list[str]) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(stop)
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    texts = [detokenizer.append(data[start:end]) for start, end in itertools.pairwise(bounds)]
    return [*texts, detokenizer.finish()], detokenizer


def first_stop(text: str, stop: list[str], first_end: int = 0) -> int | None:
    """Where the first stop string to be complete begins, of those that end at `first_end` or later."""
    for end in range(first_end, len(text) + 1):
        starts = [end - len(string) for string in stop if text[:end].endswith(string)]
        if starts:
            return min(starts)
    return None


CUTS = st.lists(st.integers(0, 60), max_size=30)


@given(text=st.text(max_size=30), cuts=CUTS)
def test_any_cut_of_the_bytes_gives_the_text(text: str, cuts: list[int]) -> None:
    texts, _ = pieces(text.encode(), cuts, [])
    assert "".join(texts) == text


@given(data=st.binary(max_size=30), cuts=CUTS)
def test_bytes_that_are_not_utf8_decode_as_if_whole(data: bytes, cuts: list[int]) -> None:
    texts, _ = pieces(data, cuts, [])
    assert "".join(texts) == data.decode(errors="replace")


@given(text=st.text("abé", max_size=30), cuts=CUTS, stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
@example(text="aab", cuts=[1, 2], stop=["ab"])
@example(text="ab", cuts=[1], stop=["abb"])
@example(text="abé", cuts=[], stop=["abé", "b"])
def test_text_ends_before_the_first_stop_string(text: str, cuts: list[int], stop: list[str]) -> None:
    texts, detokenizer = pieces(text.encode(), cuts, stop)
    end = first_stop(text, stop)
    assert "".join(texts) == text[:end]
    assert (detokenizer.stopped_by is None) == (end is None)


@given(
    tokens=st.lists(st.text("ab", max_size=3), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 12),
)
@example(tokens=["x", "ab", "z"], stop=["ab", "xabz"], min_tokens=2)
@example(tokens=["a", "b", "b", "ab"], stop=["ab"], min_tokens=2)
def test_a_stop_string_counts_from_min_tokens_on(tokens: list[str], stop: list[str], min_tokens: int) -> None:
    """One that is complete with a later token, wherever it begins."""
    detokenizer, text = Detokenizer(stop, min_tokens=min_tokens), "".join(tokens)
    sent = "".join(detokenizer.append(token.encode()) for token in tokens) + detokenizer.finish()
    n_early = len("".join(tokens[:min_tokens]))
    ends = [end for end in range(n_early + 1, len(text) + 1) if any(text[:end].endswith(string) for string in stop)]
    expected = text if not ends else text[: first_stop(text, stop, ends[0])]
    assert sent == expected
    assert (detokenizer.stopped_by is not None) == bool(ends)


@given(text=st.text("abé", max_size=30), stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(stop)
    sent = ""
    for i, character in enumerate(text):
        sent += detokenizer.append(character.encode())
        if detokenizer.stopped_by is not None:
            return
        held = text[len(sent) : i + 1]
        assert held == "" or any(string.startswith(held) for string in stop)


@pytest.mark.parametrize(("data", "expected"), [(b"\xf0\x9f\x98", ["", "\ufffd"]), (b"a\xc3", ["a", "\ufffd"])])
def test_half_a_character_at_the_end_is_not_lost(data: bytes, expected: list[str]) -> None:
    assert pieces(data, [], [])[0] == expected
