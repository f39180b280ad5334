from __future__ import annotations

from collections import defaultdict
from unittest import mock

import pytest
import torch

from model import AFTForCausalLM, Tokenizer
from model.config import Variant
from model.generate import generate
from model.sampling import Sampling
from server.engine import FinishReason, LLMEngine, Request, TokenOutput
from server.errors import GenerationError, InvalidRequestError, OverloadedError
from tests.conftest import VARIANTS, random_model, tiny_config


def request(name: str, n_prompt: int = 3, **fields: object) -> Request:
    return Request(name, prompt_ids=[1, *range(10, 10 + n_prompt)], **fields)  # type: ignore[arg-type]


def run(engine: LLMEngine, arrivals: dict[int, list[Request]] | None = None) -> dict[str, list[TokenOutput]]:
    """Step until all is done; arrivals[i] are added before step i."""
    arrivals = dict(arrivals or {})
    results: dict[str, list[TokenOutput]] = defaultdict(list)
    step = 0
    while engine.has_work or arrivals:
        for arriving in arrivals.pop(step, []):
            engine.add_request(arriving)
        for name, output in engine.step():
            assert isinstance(output, TokenOutput)
            results[name].append(output)
        step += 1
    return results


def alone(model: AFTForCausalLM, tokenizer: Tokenizer, one: Request) -> list[int]:
    return list(generate(model, one.prompt_ids, one.sampling, one.max_new_tokens, tokenizer.end_of_text_id))


@pytest.mark.parametrize("variant", VARIANTS)
def test_requests_that_come_and_go_get_the_tokens_they_would_get_alone(variant: Variant, tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config(variant))
    engine = LLMEngine(model, tokenizer, max_num_seqs=3)
    sampled = Sampling(do_sample=True, temperature=1.5, top_k=50, top_p=0.95, seed=5)
    requests = [
        request(f"{i}", n_prompt=1 + 7 * i, max_new_tokens=5 + 3 * i, sampling=sampled if i % 2 else Sampling())
        for i in range(8)
    ]
    results = run(engine, {0: requests[:2], 1: requests[2:5], 9: requests[5:]})
    for one in requests:
        assert [output.token_id for output in results[one.request_id]] == alone(model, tokenizer, one)


def test_text_and_reason_of_an_end(tokenizer: Tokenizer) -> None:
    engine = LLMEngine(random_model(tiny_config()), tokenizer)
    engine.add_request(request("long", max_new_tokens=7))
    engine.add_request(request("ends", max_new_tokens=10_000, sampling=Sampling(do_sample=True, temperature=5.0)))
    results = run(engine)
    long, ends = results["long"], results["ends"]
    assert len(long) == 7
    assert [output.finish_reason for output in long] == [None] * 6 + [FinishReason.LENGTH]
    assert "".join(output.text for output in long) == tokenizer.decode([output.token_id for output in long])
    assert ends[-1].finish_reason is FinishReason.END_OF_TEXT
    assert (ends[-1].special, ends[-1].text) == (True, "<|endoftext|>")
    assert not any(output.special for output in ends[:-1])


def test_stop_string_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config())
    free = tokenizer.decode(alone(model, tokenizer, request("", max_new_tokens=40)))
    stop = free[10:14]
    engine = LLMEngine(model, tokenizer)
    engine.add_request(request("a", max_new_tokens=40, stop=(stop, "never")))
    outputs = run(engine)["a"]
    assert outputs[-1].finish_reason is FinishReason.STOP_SEQUENCE
    assert "".join(output.text for output in outputs) == free[: free.index(stop)]


def test_text_held_back_for_a_stop_string_is_sent_when_the_text_ends(tokenizer: Tokenizer) -> None:
    """The model is made to say "a", then end; the stop string begins with "a"."""
    letter = tokenizer.encode("a")[0]
    engine = LLMEngine(random_model(tiny_config()), tokenizer)
    one = request("a", stop=("ab",))
    with mock.patch.object(one.sampler, "next_token", side_effect=[letter, tokenizer.end_of_text_id]):
        engine.add_request(one)
        outputs = run(engine)["a"]
    assert [output.text for output in outputs] == ["", "a"]
    assert not outputs[-1].special


def test_aborted_requests_leave_the_others_alone(tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config())
    engine = LLMEngine(model, tokenizer, max_num_seqs=2)
    requests = [request(name, n_prompt=n, max_new_tokens=12) for n, name in enumerate("abc", 1)]
    for one in requests:
        engine.add_request(one)
    results: dict[str, list[int]] = defaultdict(list)
    for step in range(100):
        if step == 3:
            engine.abort_request("a")
        for name, output in engine.step():
            assert isinstance(output, TokenOutput)
            results[name].append(output.token_id)
    assert len(results["a"]) == 3
    assert results["b"] == alone(model, tokenizer, requests[1])
    assert results["c"] == alone(model, tokenizer, requests[2])
    engine.add_request(request("waiting"))
    engine.abort_request("waiting")
    assert not engine.has_work


def test_a_full_queue_refuses_at_once(tokenizer: Tokenizer) -> None:
    engine = LLMEngine(random_model(tiny_config()), tokenizer, max_queue_length=2)
    engine.add_request(request("a"))
    engine.add_request(request("b"))
    with pytest.raises(OverloadedError, match="2 requests are waiting"):
        engine.add_request(request("c"))


def test_a_request_that_would_run_past_the_positions_is_refused(tokenizer: Tokenizer) -> None:
    engine = LLMEngine(random_model(tiny_config("local", max_positions=64)), tokenizer)
    engine.add_request(request("fits", n_prompt=53, max_new_tokens=10))
    with pytest.raises(InvalidRequestError, match=r"54 tokens and max_new_tokens of 11 make 65, .* at most 64 tokens"):
        engine.add_request(request("too long", n_prompt=53, max_new_tokens=11))
    assert len(run(engine)["fits"]) == 10


def test_logits_that_are_not_finite_end_one_request_only(tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config())
    engine = LLMEngine(model, tokenizer)
    model.embedding.weight.data[11] = float("nan")  # only "poisoned" reads token 11; its logit is NaN for all
    logits = model.logits
    with mock.patch.object(model, "logits", side_effect=lambda hidden: logits(hidden)[..., :11]):
        engine.add_request(request("healthy", n_prompt=1))
        engine.add_request(request("poisoned", n_prompt=2))
        outputs = dict(engine.step())
        assert isinstance(outputs["poisoned"], GenerationError)
        assert isinstance(outputs["healthy"], TokenOutput)
        assert len(run(engine)["healthy"]) == 99


def test_log_probabilities_are_the_models(tokenizer: Tokenizer) -> None:
    model = random_model(tiny_config())
    engine = LLMEngine(model, tokenizer)
    one = request("a", max_new_tokens=5, sampling=Sampling(do_sample=True, temperature=0.5, top_k=3))
    engine.add_request(one)
    outputs = run(engine)["a"]
    ids = [*one.prompt_ids, *(output.token_id for output in outputs)]
    log_probabilities = model(torch.tensor([ids]))[0][0].log_softmax(-1)
    for i, output in enumerate(outputs, len(one.prompt_ids)):
        assert output.logprob == pytest.approx(float(log_probabilities[i - 1, ids[i]]), abs=1e-4)
