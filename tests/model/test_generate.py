from __future__ import annotations

import dataclasses

import torch

from model.generate import generate
from model.sampling import GREEDY, SamplingParams
from tests.conftest import Ids, random_model, tiny_config

WORDS = Ids(400, 1)


def test_greedy_equals_taking_the_best_of_a_fresh_forward_each_time() -> None:
    model = random_model(tiny_config())
    ids = [5, 6, 7]
    for _ in range(30):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert list(generate(model, ids[:3], dataclasses.replace(GREEDY, max_tokens=30), WORDS)) == ids[3:]


def test_ends_with_the_end_of_text() -> None:
    model = random_model(tiny_config())
    params = SamplingParams(temperature=5.0, max_tokens=10_000)
    tokens = list(generate(model, [5], params, WORDS))
    assert len(tokens) < 10_000
    assert tokens.index(WORDS.end_of_text_id) == len(tokens) - 1
    longer = list(generate(model, [5], dataclasses.replace(params, ignore_eos=True, max_tokens=len(tokens) + 5), WORDS))
    assert longer[: len(tokens)] == tokens
    assert len(longer) == len(tokens) + 5


def test_reads_no_token_that_it_need_not() -> None:
    model = random_model(tiny_config("local", max_positions=8))
    params = dataclasses.replace(GREEDY, max_tokens=6)
    assert len(list(generate(model, [5, 6, 7], params, WORDS))) == 6  # the last one is never read: 8 positions do
