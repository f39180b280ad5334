from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.sampling import Sampler, Sampling, log_probability

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 2.0])


def draws(n: int, **fields: object) -> Counter[int]:
    sampler = Sampler(Sampling(do_sample=True, **fields))  # type: ignore[arg-type]
    return Counter(sampler.next_token(LOGITS) for _ in range(n))


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    assert Sampler(Sampling()).next_token(LOGITS) == 1


def test_frequencies_follow_the_probabilities() -> None:
    counts, expected = draws(20_000, temperature=2.0), (LOGITS / 2).softmax(0)
    for token_id, probability in enumerate(expected.tolist()):
        assert counts[token_id] / 20_000 == pytest.approx(probability, abs=0.015)


@pytest.mark.parametrize(
    ("fields", "possible"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 4, 2}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-9}, {1}),
        ({"top_p": 0.5}, {1, 4}),
        ({"top_p": 0.9}, {1, 4, 2}),
        ({"top_k": 2, "top_p": 0.99}, {1, 4}),
        ({"temperature": 1e-30}, {1, 4}),
    ],
)
def test_filters_leave_only_the_likely_tokens(fields: dict[str, object], possible: set[int]) -> None:
    assert set(draws(2000, **fields)) == possible


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.floats(1e-30, 1e30),
    st.floats(1e-12, 1.0),
    st.integers(1, 30),
)
def test_any_finite_logits_give_a_token(logits: list[float], temperature: float, top_p: float, top_k: int) -> None:
    sampler = Sampler(Sampling(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k))
    assert 0 <= sampler.next_token(torch.tensor(logits)) < len(logits)


def test_a_seed_fixes_the_draws() -> None:
    assert draws(50, seed=7) == draws(50, seed=7)
    first, second = (Sampler(Sampling(do_sample=True, seed=seed)) for seed in (1, 2))
    assert [first.next_token(LOGITS) for _ in range(20)] != [second.next_token(LOGITS) for _ in range(20)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Sampler(Sampling()).next_token(torch.tensor([0.0, bad]))


def test_log_probability_is_the_models_own() -> None:
    assert log_probability(LOGITS, 2) == pytest.approx(float(LOGITS.log_softmax(0)[2]))
