from __future__ import annotations

import torch

from model.generate import generate
from model.sampling import Sampling
from tests.conftest import random_model, tiny_config

END = 1


def test_greedy_equals_taking_the_best_of_a_fresh_forward_each_time() -> None:
    model = random_model(tiny_config())
    ids = [5, 6, 7]
    for _ in range(30):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert list(generate(model, ids[:3], Sampling(), 30, END)) == ids[3:]


def test_ends_with_the_end_of_text() -> None:
    model = random_model(tiny_config())
    tokens = list(generate(model, [5], Sampling(do_sample=True, temperature=5.0), 10_000, END))
    assert len(tokens) < 10_000
    assert tokens.index(END) == len(tokens) - 1


def test_reads_no_token_that_it_need_not() -> None:
    model = random_model(tiny_config("local", max_positions=8))
    assert len(list(generate(model, [5, 6, 7], Sampling(), 6, END))) == 6  # the last one is never read: 8 positions do
