from __future__ import annotations

from pathlib import Path

import pytest

from model import load_checkpoint
from model.generate import generate
from server.engine import LLM, Completion, EngineConfig, Grammar, SamplingParams, TokenOutput, best
from server.errors import InvalidRequestError

PROMPTS = ["the fox", "a bird", "", "Ann had"]


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(checkpoint, EngineConfig(max_num_seqs=3, chunk_size=4))


def test_texts_come_in_the_order_of_their_prompts(llm: LLM, checkpoint: Path) -> None:
    model, tokenizer = load_checkpoint(checkpoint)
    each = [SamplingParams(max_tokens=20 - 4 * i, temperature=float(i), seed=i) for i in range(4)]
    results = llm.generate(PROMPTS, each)
    for prompt, params, result in zip(PROMPTS, each, results, strict=True):
        ids = list(generate(model, tokenizer.encode_text(prompt), params, tokenizer))
        assert result.prompt == prompt
        assert [completion.token_ids for completion in result.completions] == [ids]
        assert result.completions[0].text == tokenizer.decode(ids)
        assert result.error is None


def test_prompts_may_be_token_ids_and_parameters_common(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0)
    by_text, by_ids = (llm.generate([p], params)[0] for p in ("the fox", llm.tokenizer.encode_text("the fox")))
    assert by_text.completions == by_ids.completions


def test_the_best_of_several_are_returned(llm: LLM) -> None:
    (result,) = llm.generate(["the fox"], SamplingParams(n=2, best_of=3, temperature=2.0, max_tokens=8))
    (everything,) = llm.generate(["the fox"], SamplingParams(n=3, temperature=2.0, max_tokens=8))
    assert [completion.index for completion in everything.completions] == [0, 1, 2]
    ranked = sorted(everything.completions, key=lambda completion: -completion.mean_logprob)
    assert [completion.token_ids for completion in result.completions] == [c.token_ids for c in ranked[:2]]


def test_best_ranks_by_the_mean() -> None:
    def completion(index: int, *logprobs: float) -> Completion:
        return Completion(index, [TokenOutput(0, "", logprob, False) for logprob in logprobs])

    candidates = [completion(0, -1.0), completion(1, -0.5, -0.7, -0.6), completion(2)]
    assert [c.index for c in best(candidates, 2)] == [1, 0]


def test_a_bad_prompt_has_an_error_and_the_others_their_texts(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=2), SamplingParams(grammar=Grammar("regex", "(")), SamplingParams(max_tokens=2)]
    results = llm.generate(["a", "b", "\ud800"], params)
    assert results[0].completions[0].finish_reason == "length"
    assert "unclosed group" in str(results[1].error)
    assert "lone surrogate" in str(results[2].error)
    with pytest.raises(ValueError, match="There are 1 prompts, but 3 parameters"):
        llm.generate(["a"], params)


def test_leaving_the_stream_frees_the_slots(llm: LLM) -> None:
    stream = llm.stream(
        ["a", "b", "c"], [SamplingParams(max_tokens=1), *[SamplingParams(max_tokens=10**6, ignore_eos=True)] * 2]
    )
    next(stream)
    with pytest.raises(RuntimeError, match="Another stream of this LLM is not done"):
        llm.generate(["d"], SamplingParams())
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work


def test_tokens_are_those_of_one_text(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3)
    (result,) = llm.generate(["the fox"], params)
    assert list(llm.tokens("the fox", params)) == result.completions[0].tokens
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        next(llm.tokens("a", SamplingParams(grammar=Grammar("regex", "("))))
    assert list(llm.tokens("the fox", params)) == result.completions[0].tokens  # and nothing was left of that


@pytest.mark.parametrize("params", [SamplingParams(n=2), SamplingParams(best_of=3)])
def test_tokens_of_several_texts_are_refused(llm: LLM, params: SamplingParams) -> None:
    with pytest.raises(InvalidRequestError, match=f"n and best_of must be 1 .*, not {params.n_generated}"):
        next(llm.tokens("the fox", params))
    assert not llm.engine.has_work


def test_one_stream_at_a_time(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, temperature=1.0, seed=3)
    (expected,) = llm.generate(["the fox"], params)
    for outer in (llm.stream(["a", "b", "c"], SamplingParams(max_tokens=1)), llm.tokens("a", SamplingParams())):
        next(outer)
        for inner in (llm.tokens("the fox", params), llm.stream(["the fox"], params)):
            with pytest.raises(RuntimeError, match="Another stream of this LLM is not done"):
                next(inner)
        outer.close()  # type: ignore[union-attr]
        assert [token.token_id for token in llm.tokens("the fox", params)] == expected.completions[0].token_ids


def test_a_stream_is_open_between_its_requests(llm: LLM) -> None:
    """Also where the engine has no work, because the next prompts are not yet in it."""
    stream = llm.stream(["\ud800", "a"], SamplingParams(max_tokens=1))
    next(stream)
    assert not llm.engine.has_work
    with pytest.raises(RuntimeError, match="Another stream of this LLM is not done"):
        next(llm.tokens("b", SamplingParams(max_tokens=1)))
    assert next(stream)[0] == 1


def test_what_was_aborted_is_not_waited_for(llm: LLM) -> None:
    endless = SamplingParams(max_tokens=10**5, temperature=1.0, ignore_eos=True)
    stream = llm.stream(["a", "b"], [SamplingParams(max_tokens=1), endless])
    for texts, request_id in ((stream, "1"), (llm.tokens("a", endless), "0")):
        next(texts)
        llm.engine.abort_request(request_id)
        with pytest.raises(RuntimeError, match="no work left"):
            next(texts)
        assert not llm.engine.has_work
