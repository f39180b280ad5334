"""Prompts of words that are soon read."""

from __future__ import annotations

import random

WORDS = [
    *("one", "two", "three", "little", "red", "fox", "bird", "tree", "house", "ran", "saw", "said"),
    *("happy", "sad", "big", "small", "day", "night", "sun", "moon"),
]


def words(seed: int, n: int) -> str:
    """`n` words by chance, the same ones for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=n))
