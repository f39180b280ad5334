from __future__ import annotations

import math
from unittest import mock

import pytest
import torch

from model import Tokenizer
from model.tokenizer import HuggingFaceTokenizer
from model.training.evaluate import bits_per_character
from tests.conftest import STORIES, byte_level_tokenizer, random_model, tiny_config

BYTE_LEVEL = HuggingFaceTokenizer(byte_level_tokenizer(400).to_str().encode())


@pytest.mark.parametrize("starts_texts", [True, False])
def test_bits_per_character_are_those_of_each_text_read_alone(starts_texts: bool, tokenizer: Tokenizer) -> None:
    """Padding, order and batch size do not matter; the end of text is not counted."""
    tokenizer = tokenizer if starts_texts else BYTE_LEVEL
    assert tokenizer.starts_texts == starts_texts
    model = random_model(tiny_config())
    nats = 0.0
    for story in STORIES:
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(story)]
        log_probabilities = model(torch.tensor([ids]))[0][0].log_softmax(-1)
        nats -= sum(float(log_probabilities[i, ids[i + 1]]) for i in range(len(ids) - 1))
    expected = nats / math.log(2) / len("".join(STORIES))
    for batch_size, chunk in ((1, 512), (2, 512), (16, 512), (2, 7)):
        with mock.patch("model.training.evaluate.CHUNK", chunk):
            actual = bits_per_character(model, tokenizer, STORIES, batch_size=batch_size)
        assert actual == pytest.approx(expected, rel=1e-5)
