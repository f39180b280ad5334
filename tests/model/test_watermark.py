from __future__ import annotations

import random

import pytest
import torch

from model.sampling import Sampler, SamplingParams, sample
from model.sampling.watermark import DELTA, GAMMA, green_list, z_score
from tests.conftest import Ids


def test_the_green_list_is_half_of_the_vocabulary_and_depends_on_the_token_before() -> None:
    lists = [green_list(previous, 400) for previous in range(20)]
    assert all(int(green.sum()) == GAMMA * 400 for green in lists)
    assert len({tuple(green.tolist()) for green in lists}) == 20
    assert torch.equal(green_list(5, 400), lists[5])


def test_green_tokens_get_delta_more() -> None:
    sampler = Sampler(SamplingParams(watermark=True), [3, 7], Ids(400, 1))
    logits = torch.zeros(400)
    sampler.adjust(logits)
    assert torch.equal(logits, DELTA * green_list(7, 400))
    (token_id,) = sample(torch.zeros(1, 400), [sampler])
    assert isinstance(token_id, int)
    logits = torch.zeros(400)
    sampler.adjust(logits)
    assert torch.equal(logits, DELTA * green_list(token_id, 400))


def test_the_score_counts_green_tokens() -> None:
    green, ids = [5], [5]
    for _ in range(50):
        green.append(int(green_list(green[-1], 400).nonzero()[0]))
        ids.append(random.Random(len(ids)).randrange(400))
    assert z_score(green, 400) == pytest.approx(50**0.5)
    assert abs(z_score(ids, 400)) < 3.5
    assert z_score([5], 400) == 0
