from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.sampling import GREEDY, Grammar, Sampler, SamplingError, SamplingParams, sample
from tests.conftest import Ids

LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 2.0])
END = 3


def sampler(params: SamplingParams, prompt: tuple[int, ...] = (), vocab_size: int = 5, index: int = 0) -> Sampler:
    return Sampler(params, prompt, Ids(vocab_size, END), index)


def draws(n: int, *, prompt: tuple[int, ...] = (), logits: Tensor = LOGITS, **fields: object) -> Counter[int]:
    """Of n first tokens, each drawn by a sampler of its own in one batch."""
    params = [SamplingParams(**(fields | {"seed": i})) for i in range(n)]  # type: ignore[arg-type]
    ids = sample(logits.expand(n, -1), [sampler(p, prompt) for p in params])
    return Counter(token_id for token_id in ids if isinstance(token_id, int))


def test_temperature_0_takes_the_first_of_the_most_likely() -> None:
    assert draws(3, temperature=0.0) == {1: 3}


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
        ({"top_k": 4, "top_p": 0.395}, {1}),
        ({"min_p": 0.3}, {1, 4, 2}),
        ({"min_p": 1.0}, {1, 4}),
        ({"temperature": 1e-30}, {1, 4}),
        ({"banned_token_ids": (1, 4)}, {0, 2, 3}),
        ({"allowed_token_ids": (0, 3)}, {0, 3}),
        ({"logit_bias": {0: 100.0}}, {0}),
        ({"logit_bias": {1: -100.0, 4: -100.0}}, {0, 2, 3}),
        ({"min_tokens": 1}, {0, 1, 2, 4}),
        ({"min_tokens": 1, "stop_token_ids": (1, 2)}, {0, 4}),
        ({"min_tokens": 1, "ignore_eos": True}, {0, 1, 2, 3, 4}),
    ],
)
def test_filters_leave_only_what_they_should(fields: dict[str, object], possible: set[int]) -> None:
    assert set(draws(2000, **fields)) == possible  # type: ignore[arg-type]


def test_typical_p_keeps_what_is_nearest_to_the_expected_information() -> None:
    """Of probabilities 0.6, 0.2 and twice 0.1 the entropy is 1.09 nats; 0.2 (1.61) is nearer to it than 0.1 (2.30)."""
    logits = torch.tensor([0.6, 0.2, 0.1, 0.1]).log()
    params = SamplingParams(typical_p=0.7)
    ids = sample(logits.expand(2000, -1), [sampler(params, vocab_size=4, index=i) for i in range(2000)])
    assert set(ids) == {0, 1}


def test_repetition_penalty_makes_tokens_of_prompt_and_text_less_likely() -> None:
    logits = torch.tensor([[1.0, 0.9, -0.5, -9.0, -0.4]])
    one = sampler(SamplingParams(temperature=0, repetition_penalty=2.0), prompt=(0,))
    assert sample(logits, [one]) == [1]  # 1.0 / 2 is below 0.9
    assert sample(logits, [one]) == [0]  # 0.9 / 2 is below 1.0 / 2
    one = sampler(SamplingParams(temperature=0, repetition_penalty=2.0), prompt=(4, 0, 1))
    assert sample(torch.tensor([[-1.0, -2.0, -0.5, -9.0, -0.4]]), [one]) == [2]  # -0.4 * 2 is below -0.5


def test_frequency_and_presence_penalties_count_the_text_only() -> None:
    logits = torch.tensor([[1.0, 0.5, -9.0, -9.0, -9.0]])
    one = sampler(SamplingParams(temperature=0, frequency_penalty=0.3), prompt=(0, 0, 0))
    assert [sample(logits, [one])[0] for _ in range(5)] == [0, 0, 1, 0, 1]
    one = sampler(SamplingParams(temperature=0, presence_penalty=0.3), prompt=(0,))
    assert [sample(logits, [one])[0] for _ in range(4)] == [0, 0, 0, 0]
    one = sampler(SamplingParams(temperature=0, presence_penalty=0.8), prompt=(0,))
    assert [sample(logits, [one])[0] for _ in range(3)] == [0, 1, 0]


def test_min_tokens_counts() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 5.0, 0.0]])
    one = sampler(SamplingParams(temperature=0, min_tokens=2))
    assert [sample(logits, [one])[0] for _ in range(3)] == [0, 0, END]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 3.0]),
    top_k=st.none() | st.integers(1, 30),
    top_p=st.floats(0.1, 1.0),
    typical_p=st.sampled_from([1.0, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    banned_token_ids=st.sampled_from([(), (1, 2)]),
    seed=st.integers(0, 2**64 - 1),
)


@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 99))
def test_a_row_does_not_depend_on_the_others(params: list[SamplingParams], seed: int) -> None:
    logits = 3 * torch.randn(len(params), 20, generator=torch.Generator().manual_seed(seed))
    together = [Sampler(p, (1,), Ids(20, END)) for p in params]
    alone = [Sampler(p, (1,), Ids(20, END)) for p in params]
    before = logits.clone()
    for _ in range(3):
        batch = sample(logits, together)
        assert batch == [sample(logits[i : i + 1], [one])[0] for i, one in enumerate(alone)]
    assert torch.equal(logits, before)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.floats(1e-30, 1e30),
    st.floats(1e-12, 1.0),
    st.integers(1, 30),
    st.floats(1e-12, 1.0),
)
def test_any_finite_logits_give_a_token(
    logits: list[float], temperature: float, top_p: float, top_k: int, typical_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, typical_p=typical_p, min_p=0.5)
    (token_id,) = sample(torch.tensor([logits]), [sampler(params, vocab_size=len(logits))])
    assert isinstance(token_id, int)
    assert 0 <= token_id < len(logits)


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e-38},
        {"repetition_penalty": 1e30},
        {"frequency_penalty": -1e30},
        {"presence_penalty": 1e30, "temperature": 1e-30},
        {"logit_bias": {0: 1e30, 1: -1e30}},
    ],
)
def test_extreme_penalties_still_give_tokens(fields: dict[str, object]) -> None:
    one = sampler(SamplingParams(**fields), prompt=(0, 1, 2, 3, 4))  # type: ignore[arg-type]
    for _ in range(20):
        (token_id,) = sample(LOGITS.unsqueeze(0), [one])
        assert token_id in range(5)


def test_a_seed_fixes_the_draws_and_each_text_has_its_own() -> None:
    def text(seed: int, index: int) -> list[object]:
        one = sampler(SamplingParams(seed=seed), index=index)
        return [sample(LOGITS.unsqueeze(0), [one])[0] for _ in range(30)]

    assert text(7, 0) == text(7, 0)
    assert text(7, 0) != text(7, 1)
    assert text(7, 1) == text(8, 0)


def test_no_token_left_is_an_error_of_that_row_alone() -> None:
    none_left = sampler(SamplingParams(allowed_token_ids=(1,), banned_token_ids=(1,)))
    result = sample(LOGITS.expand(2, -1), [none_left, sampler(GREEDY)])
    assert isinstance(result[0], SamplingError)
    assert result[1] == 1


@pytest.mark.parametrize(
    ("fields", "n_steps"),
    [
        ({"temperature": 0.5, "top_k": 3, "stop_token_ids": (1,)}, 0),
        ({"repetition_penalty": 1.5}, 1),
        ({"frequency_penalty": 1.0, "presence_penalty": 1.0}, 1),
        ({"logit_bias": {1: 1.0}, "allowed_token_ids": (1,), "banned_token_ids": (2,)}, 1),
        ({"watermark": True}, 1),
        ({"min_tokens": 1}, 1),
        ({"repetition_penalty": 1.5, "presence_penalty": 1.0, "allowed_token_ids": (1,), "min_tokens": 1}, 4),
    ],
)
def test_only_steps_that_are_asked_for_are_taken(fields: dict[str, object], n_steps: int) -> None:
    assert len(sampler(SamplingParams(**fields)).steps) == n_steps  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.0, "presence_penalty": 1.0},
        {"logit_bias": {1: 1.0, 3: -2.0}, "allowed_token_ids": (1, 2, 3), "banned_token_ids": (2,)},
        {"watermark": True},
        {"min_tokens": 3, "stop_token_ids": (1, 2)},
    ],
)
def test_a_fork_is_a_sampler_of_its_own(fields: dict[str, object]) -> None:
    """Whatever others of the same request have chosen meanwhile."""
    params = SamplingParams(seed=5, **fields)  # type: ignore[arg-type]
    made, others, expected = sampler(params), [], []
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    for index in range(3):
        forked, alone = made.fork(index), sampler(params, index=index)
        others += [sample(row[None], [forked]) for row in logits]
        expected += [sample(row[None], [alone]) for row in logits]
    assert others == expected


def test_what_is_the_same_for_all_texts_is_made_once() -> None:
    made = sampler(SamplingParams(allowed_token_ids=(1, 2)))
    assert made.fork(1).steps[0] is made.steps[0]


def test_ids_given_again_and_again_count_once() -> None:
    params = SamplingParams(allowed_token_ids=(5, 4) * 10_000, banned_token_ids=(3,) * 10_000)
    assert params.allowed_token_ids == (5, 4)
    assert params.banned_token_ids == (3,)


class Only:
    """A step of the caller's: allows only one token, the next one each time. Fails at token 2."""

    def __init__(self, fails_to: str) -> None:
        self._fails_to, self._token_id = fails_to, 0

    def adjust(self, logits: Tensor) -> None:
        logits[torch.arange(5) != self._token_id] = -math.inf
        if self._token_id == 2 and self._fails_to == "adjust":
            raise ValueError("two")

    def observe(self, token_id: int) -> None:
        assert token_id == self._token_id
        if token_id == 2 and self._fails_to == "observe":
            raise ValueError("two")
        self._token_id += 1

    def copy(self) -> Only:
        raise AssertionError("this test has one text")


@pytest.mark.parametrize("fails_to", ["adjust", "observe"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_step_raises_is_the_result_of_its_row_alone(fails_to: str, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=1.5)
    rows = [sampler(params), Sampler(params, (), Ids(5, END), first=[Only(fails_to)]), sampler(params, index=2)]
    alone = [sampler(params), sampler(params, index=2)]
    for expected in (0, 1, 2):
        before, token_id, after = sample(LOGITS.expand(3, -1), rows)
        assert [before, after] == sample(LOGITS.expand(2, -1), alone)
        assert token_id == expected or (expected == 2 and isinstance(token_id, ValueError))
    assert isinstance(token_id, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("best_of", 0),
        ("max_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("typical_p", 0.0),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e39),
        ("frequency_penalty", math.nan),
        ("presence_penalty", math.inf),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 1e39}),
        ("allowed_token_ids", ()),
        ("stop", ("a", "")),
        ("seed", 2**64),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(SamplingError, match=rf"^{field} must be "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"])
def test_token_ids_must_exist(field: str) -> None:
    ids: object = {5: 1.0} if field == "logit_bias" else (5,)
    params = SamplingParams(**{field: ids})  # type: ignore[arg-type]
    params.check_vocabulary(6)
    with pytest.raises(SamplingError, match=f"{field} must hold token ids from 0 to 4, not 5"):
        params.check_vocabulary(5)


def test_grammar_kinds() -> None:
    with pytest.raises(SamplingError, match="not 'lark'"):
        Grammar("lark", "")
