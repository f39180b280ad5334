from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from model import LanguageModel, SentencePieceTokenizer
from model.generate import generate
from model.sampling import Grammar, SamplingError, SamplingParams
from model.sampling.adjust import Bias
from server.engine import EngineConfig, FinishReason, LLMEngine, Request, RequestOutput
from server.engine.structured_output import GrammarCompiler
from server.engine.token_processor import log_normalizers
from server.errors import GenerationError, InvalidRequestError
from tests.conftest import STORIES, VARIANTS, Variant, random_model, tiny_config

WORDS = SentencePieceTokenizer.train(STORIES * 3, vocab_size=400)
MODELS: dict[Variant, LanguageModel] = {variant: random_model(tiny_config(variant)) for variant in VARIANTS}
MODEL = MODELS["conv"]
SMALL = EngineConfig(max_num_seqs=4, chunk_size=8)


def request(name: str = "a", n_prompt: int = 3, **fields: object) -> Request:
    params = SamplingParams(**({"temperature": 0.0} | fields))  # type: ignore[arg-type]
    return Request(name, prompt_ids=[1, *range(10, 10 + n_prompt)], params=params)


def run(engine: LLMEngine, *requests: Request) -> dict[tuple[str, int], list[RequestOutput]]:
    """Outputs by request and text."""
    for one in requests:
        engine.add_request(one)
    results: dict[tuple[str, int], list[RequestOutput]] = defaultdict(list)
    while engine.has_work:
        for output in engine.step():
            results[output.request_id, output.index].append(output)
    assert_idle(engine)
    assert all(one.read_state is None for one in requests), "a state outlives its request"
    return results


def assert_idle(engine: LLMEngine) -> None:
    assert engine.scheduler.n_free_slots == engine.pool.n_slots
    assert len(engine.pool) == 0
    assert not list(engine._requests())


def token_ids(outputs: list[RequestOutput]) -> list[int]:
    return [output.token.token_id for output in outputs if output.token]


def text(outputs: list[RequestOutput]) -> str:
    return "".join(output.token.text for output in outputs if output.token and not output.token.special)


def alone(one: Request, model: LanguageModel = MODEL, index: int = 0) -> list[int]:
    params = dataclasses.replace(one.params, seed=one.params.seed + index)
    return list(generate(model, one.prompt_ids, params, WORDS))


class EngineMachine(RuleBasedStateMachine):
    """Any schedule of arrivals, steps, cancellations, owners and prefix hits gives the tokens of each request alone:
    greedy ones those of `generate`, others those of an engine of its own.
    """

    @initialize(
        variant=st.sampled_from(VARIANTS), n_slots=st.integers(1, 5), chunk=st.integers(1, 9), cache=st.booleans()
    )
    def start(self, variant: Variant, n_slots: int, chunk: int, cache: bool) -> None:
        self.model, self.now = MODELS[variant], 0.0
        config = EngineConfig(max_num_seqs=n_slots, chunk_size=chunk, prefix_cache_bytes=2**20 if cache else 0)
        self.engine = LLMEngine(self.model, WORDS, config, clock=lambda: self.now)
        self.live: dict[str, Request] = {}
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.ended: set[tuple[str, int]] = set()
        self.expected: dict[tuple[str, int], list[int]] = {}
        self.n_requests = 0

    @rule(
        n_prompt=st.integers(1, 30),
        letter=st.integers(10, 11),
        max_tokens=st.integers(0, 12),
        temperature=st.sampled_from([0.0, 0.0, 1.0, 4.0]),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        owner=st.sampled_from("AB"),
    )
    def arrive(
        self, n_prompt: int, letter: int, max_tokens: int, temperature: float, n: int, priority: int, owner: str
    ) -> None:
        """Prompts are runs of one of two tokens, so that most of them share prefixes."""
        params = SamplingParams(
            n=min(n, self.engine.pool.n_slots), max_tokens=max_tokens, temperature=temperature, seed=self.n_requests
        )
        name, self.n_requests = f"{self.n_requests}", self.n_requests + 1
        one = Request(name, [1, *[letter] * n_prompt], params, priority=priority, owner=owner)
        self.engine.add_request(one)
        self.live[name] = one

    @rule(n_steps=st.integers(1, 6))
    def steps(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.now += 0.5
            for output in self.engine.step():
                self.receive(output)

    @rule(which=st.integers(0, 30))
    def cancel(self, which: int) -> None:
        name = f"{which}"
        if self.live.pop(name, None):
            self.engine.abort_request(name)

    def receive(self, output: RequestOutput) -> None:
        one = self.live[output.request_id]  # nothing comes from what was cancelled or has ended
        assert output.error is None
        key = output.request_id, output.index
        assert key not in self.ended
        if output.token:
            self.tokens[key].append(output.token.token_id)
        expected = self.alone(one, output.index)
        assert self.tokens[key] == expected[: len(self.tokens[key])]
        if output.finish_reason:
            assert self.tokens[key] == expected
            self.ended.add(key)
            if all((output.request_id, i) in self.ended for i in range(one.params.n)):
                del self.live[output.request_id]

    def alone(self, one: Request, index: int) -> list[int]:
        key = one.request_id, index
        if key not in self.expected and one.params.temperature == 0:
            self.expected[key] = alone(one, self.model, index)
        elif key not in self.expected:
            # Drawing at the edge of two tokens depends on the last bit, which kernels and PyTorch round differently.
            engine = LLMEngine(self.model, WORDS, EngineConfig(max_num_seqs=one.params.n, prefix_cache_bytes=0))
            results = run(engine, Request(one.request_id, one.prompt_ids, one.params))
            self.expected |= {(one.request_id, i): token_ids(results[one.request_id, i]) for i in range(one.params.n)}
        return self.expected[key]

    @invariant()
    def slots_are_accounted_for(self) -> None:
        engine = self.engine
        assert engine.scheduler.n_free_slots + engine.scheduler.num_reading + engine.num_running == engine.pool.n_slots
        assert len(engine.pool) == engine.num_running

    def teardown(self) -> None:
        """All that is left ends, soon."""
        if hasattr(self, "engine"):
            for _ in range(2000):
                if not self.engine.has_work:
                    break
                for output in self.engine.step():
                    self.receive(output)
            assert not self.live
            assert_idle(self.engine)


TestAnySchedule = EngineMachine.TestCase


@pytest.mark.parametrize("variant", VARIANTS)
def test_drawn_tokens_are_those_of_generate(variant: Variant) -> None:
    """In one batch; with these seeds no draw is at the edge of two tokens."""
    model = MODELS[variant]
    several = [request(f"{i}", n=2, temperature=(1.0, 4.0)[i % 2], seed=10 * i, max_tokens=12) for i in range(4)]
    results = run(LLMEngine(model, WORDS), *several)
    for one in several:
        for index in range(2):
            assert token_ids(results[one.request_id, index]) == alone(one, model, index)


TestAnySchedule.settings = settings(max_examples=60, stateful_step_count=25)


def test_ends_with_its_length_or_the_end_of_text() -> None:
    results = run(
        LLMEngine(MODEL, WORDS),
        request("long", max_tokens=7),
        request("ends", max_tokens=10_000, temperature=5.0),
        request("none", max_tokens=0),
    )
    long, ends = results["long", 0], results["ends", 0]
    assert [output.finish_reason for output in long] == [None] * 6 + [FinishReason.LENGTH]
    assert text(long) == WORDS.decode(token_ids(long))
    assert ends[-1].finish_reason is FinishReason.END_OF_TEXT
    assert ends[-1].token is not None
    assert (ends[-1].token.special, ends[-1].token.text) == (True, "<|endoftext|>")
    assert not any(output.token.special for output in ends[:-1] if output.token)
    assert results["none", 0] == [RequestOutput("none", finish_reason=FinishReason.LENGTH)]


@pytest.mark.parametrize("include_stop", [False, True])
def test_stop_string_ends_the_text(include_stop: bool) -> None:
    free = WORDS.decode(alone(request(max_tokens=40)))
    stop = free[10:14]
    outputs = run(LLMEngine(MODEL, WORDS), request(max_tokens=40, stop=(stop, "never"), include_stop=include_stop))
    assert outputs["a", 0][-1].finish_reason is FinishReason.STOP_SEQUENCE
    assert text(outputs["a", 0]) == free[: free.index(stop)] + (stop if include_stop else "")


def test_stop_token_ends_the_text_and_is_no_part_of_it() -> None:
    free = alone(request(max_tokens=40, temperature=2.0))
    stop = next(token_id for i, token_id in enumerate(free) if i >= 5 and token_id not in free[:i])
    outputs = run(LLMEngine(MODEL, WORDS), request(max_tokens=40, temperature=2.0, stop_token_ids=(stop,)))["a", 0]
    assert token_ids(outputs) == free[: free.index(stop) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP_SEQUENCE
    assert text(outputs) == WORDS.decode(free[: free.index(stop)])


def test_text_held_back_for_a_stop_string_is_sent_when_the_text_ends() -> None:
    """The model says "a", then ends; the stop string begins with "a"."""
    (letter,) = WORDS.encode("a")
    bias = {letter: 1000.0}
    one = request(stop=("ab",), logit_bias=bias, frequency_penalty=2000.0, allowed_token_ids=(letter, 1))
    outputs = run(LLMEngine(MODEL, WORDS), one)["a", 0]
    assert [output.token.text for output in outputs if output.token] == ["", "a"]
    assert text(outputs) == "a"


def test_several_texts_are_forked_from_one_reading() -> None:
    engine = LLMEngine(MODEL, WORDS)
    with mock.patch.object(engine.runner, "read", wraps=engine.runner.read) as read:
        one = request(n_prompt=20, n=2, best_of=5, temperature=1.5, seed=3, max_tokens=9)
        results = run(engine, one)
    assert read.call_count == 1
    assert {index for _, index in results} == set(range(5))
    for index in range(5):
        assert token_ids(results["a", index]) == alone(one, index=index)


def test_a_prompt_that_shares_a_prefix_is_read_from_there() -> None:
    """From the end of a prompt, the end of a text and the end of a chunk, and what is reused is told."""
    engine = LLMEngine(MODEL, WORDS, SMALL)
    first = request("first", n_prompt=20, max_tokens=6)
    answer = token_ids(run(engine, first)["first", 0])
    again = request("again", n_prompt=20, max_tokens=6)
    next_turn = Request("next turn", [*first.prompt_ids, *answer, 50, 51], again.params)
    branch = Request("branch", [*first.prompt_ids[:18], 90], again.params)
    salted = dataclasses.replace(again, request_id="salted", cache_salt="other")
    results = run(engine, again, next_turn, branch, salted)
    assert again.num_cached_tokens == 21
    assert next_turn.num_cached_tokens == 21 + 5  # the last token of the answer was never read
    assert branch.num_cached_tokens == 16
    assert salted.num_cached_tokens == 0
    for one in (again, next_turn, branch, salted):
        assert token_ids(results[one.request_id, 0]) == alone(one)


def test_log_probabilities_are_the_models() -> None:
    one = request(n_prompt=20, max_tokens=40, temperature=0.5, top_k=3, logprobs=4, prompt_logprobs=2)
    outputs = run(LLMEngine(MODEL, WORDS, SMALL), one)["a", 0]
    ids = [*one.prompt_ids, *token_ids(outputs)]
    expected = MODEL(torch.tensor([ids]))[0][0].log_softmax(-1)
    for i, output in enumerate(outputs, 20):
        assert output.token is not None
        assert output.token.logprob == pytest.approx(float(expected[i, ids[i + 1]]), abs=1e-4)
        assert output.token.top_logprobs is not None
        assert (output.token.token_id, output.token.logprob) in output.token.top_logprobs
        top = expected[i].topk(4)
        assert [token_id for token_id, _ in output.token.top_logprobs] == top.indices.tolist()
        assert [logprob for _, logprob in output.token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert one.prompt_logprobs[0] is None
    assert len(one.prompt_logprobs) == 21
    for i, entry in enumerate(one.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.token_id == ids[i + 1]
        assert entry.logprob == pytest.approx(float(expected[i, ids[i + 1]]), abs=1e-4)
        assert len(entry.top_logprobs) == 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_invariance_is_bitwise(variant: Variant) -> None:
    """Tokens and log-probabilities, alone and in a full batch, with and without prefix hits: equal to the last bit."""
    config = EngineConfig(max_num_seqs=32, chunk_size=8, batch_invariant=True)
    model = MODELS[variant]

    def requests() -> list[Request]:
        sampled = {"temperature": 1.0, "logprobs": 5, "max_tokens": 12}
        return [request(f"{i}", n_prompt=1 + i % 23, seed=i, **sampled) for i in range(40)]

    solo = {one.request_id: run(LLMEngine(model, WORDS, config), one)[one.request_id, 0] for one in requests()}
    engine = LLMEngine(model, WORDS, config)
    for _ in range(2):  # the second time, every prompt is in the cache
        together = requests()
        results = run(engine, *together)
        assert {name: results[name, 0] for name in solo} == solo
    assert all(one.num_cached_tokens == one.num_prompt_tokens for one in together)


def test_batch_invariance_outlives_the_positions_of_unused_rows() -> None:
    """Rows that nobody uses are decoded too, but must not run out of positions."""
    config = EngineConfig(max_num_seqs=3, chunk_size=8, batch_invariant=True)
    engine = LLMEngine(random_model(tiny_config("local", max_positions=32)), WORDS, config)
    for i in range(10):
        results = run(engine, request(f"{i}", max_tokens=20, ignore_eos=True))
        assert len(token_ids(results[f"{i}", 0])) == 20


def test_a_request_that_fails_as_its_texts_start_leaves_nothing_behind() -> None:
    engine = LLMEngine(MODEL, WORDS, SMALL)
    with mock.patch("server.engine.llm_engine.Detokenizer", side_effect=RuntimeError("no text")):
        results = run(engine, request("fails", n=2))  # checks that the engine is idle
    assert isinstance(results["fails", 0][0].error, GenerationError)
    one = request("next", n_prompt=20, max_tokens=10)
    assert token_ids(run(engine, one)["next", 0]) == alone(one)


def test_held_back_text_is_not_lost_to_a_special_token() -> None:
    """With ignore_eos, end of text is the last token by length, while "h" may still become a stop string."""
    (letter,) = WORDS.encode("h")
    one = request(
        ignore_eos=True,
        max_tokens=2,
        stop=("he said",),
        frequency_penalty=2000.0,
        logit_bias={letter: 1000.0, 1: 500.0},
        allowed_token_ids=(letter, 1),
    )
    outputs = run(LLMEngine(MODEL, WORDS), one)["a", 0]
    assert token_ids(outputs) == [letter, 1]
    assert text(outputs) == "h"


def test_a_full_batch_takes_turns_fairly() -> None:
    """A long prompt is read in chunks between the tokens of others, and short prompts pass it."""
    engine = LLMEngine(MODEL, WORDS, SMALL)
    engine.add_request(request("decoding", max_tokens=60))
    engine.step()
    engine.add_request(request("long", n_prompt=120, max_tokens=1))
    engine.add_request(request("short", max_tokens=1))
    order = []
    for _ in range(40):
        outputs = engine.step()
        assert "decoding" in {output.request_id for output in outputs}  # a token in every step
        order += [output.request_id for output in outputs if output.request_id != "decoding"]
    assert order == ["short", "long"]


@pytest.mark.parametrize("fails", ["step_", "read"])
def test_what_fails_ends_what_it_was_done_for_and_nothing_else(fails: str, caplog: pytest.LogCaptureFixture) -> None:
    """Decoding ends what decodes, reading what reads; what waits had no part in either."""
    engine = LLMEngine(MODEL, WORDS, SMALL)
    decoding = request("decoding", max_tokens=30, n=2, temperature=1.0)
    engine.add_request(decoding)
    engine.step()
    reading = request("reading", n_prompt=30, max_tokens=10)
    waiting = [request(f"{i}", n_prompt=20, max_tokens=5) for i in range(3)]
    for one in (reading, *waiting):
        engine.add_request(one)
    with mock.patch.object(engine.runner, fails, side_effect=RuntimeError("broken")), caplog.at_level(logging.ERROR):
        failed = {output.request_id: output for output in engine.step() if output.error}
    assert list(failed) == (["decoding"] if fails == "step_" else ["reading", "0"])  # the others have no slot
    assert engine.num_failures == len(failed)
    assert all(isinstance(output.error, GenerationError) for output in failed.values())
    assert "broken" in caplog.text
    results = run(engine)
    for one in (reading, *waiting):
        assert one.request_id in failed or token_ids(results[one.request_id, 0]) == alone(one)
    again = request("again", n_prompt=25, max_tokens=6)
    assert token_ids(run(engine, again)["again", 0]) == alone(again)
    assert engine.num_failures == 0


def test_failures_count_until_the_same_goes_well() -> None:
    """A prompt that is read heals nothing while every step that decodes fails."""
    engine = LLMEngine(MODEL, WORDS, SMALL)
    with mock.patch.object(engine.runner, "step_", side_effect=RuntimeError("broken")):
        for i in range(4):
            results = run(engine, request(f"{i}"))
            assert isinstance(results[f"{i}", 0][-1].error, GenerationError)
            assert engine.num_failures == i + 1
    run(engine, request("invalid", allowed_token_ids=(5,), banned_token_ids=(5,)))  # its own fault
    run(engine, request("good"))
    assert engine.num_failures == 0


def test_a_request_of_many_texts_starts_them_as_slots_come_free() -> None:
    engine = LLMEngine(MODEL, WORDS, SMALL)
    endless = request("endless", max_tokens=40, ignore_eos=True)
    wide = request("wide", n_prompt=20, n=4, temperature=1.5, seed=3, max_tokens=9)
    small = request("small", max_tokens=5)
    with mock.patch.object(engine.runner, "read", wraps=engine.runner.read) as read:
        results = run(engine, endless, wide, small)
    assert read.call_count == 1 + 3 + 1
    for index in range(4):
        assert token_ids(results["wide", index]) == alone(wide, index=index)
    assert token_ids(results["small", 0]) == alone(small)


def test_masks_are_made_once_for_all_texts_of_a_request() -> None:
    one = request(n=4, temperature=1.0, allowed_token_ids=tuple(range(300)), logit_bias={7: 1.0}, max_tokens=3)
    with mock.patch("model.sampling.adjust.Bias", wraps=Bias) as made:
        results = run(LLMEngine(MODEL, WORDS, SMALL), one)
    assert made.call_count == 1
    assert len(results) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_of_a_prompt_are_those_of_decoding(variant: Variant, dtype: str) -> None:
    """To the last bit: of the texts of a batch, and of the same tokens read as one prompt each, together again."""
    config = EngineConfig(max_num_seqs=8, chunk_size=8, quantize=dtype)
    engine = LLMEngine(MODELS[variant], WORDS, config)
    if not engine.runner.is_batch_invariant:
        pytest.skip("there are no compiled kernels here")
    asked = [
        request(f"{i}", n_prompt=3 + i, n=2, temperature=1.0, seed=i, max_tokens=25, logprobs=3, ignore_eos=True)
        for i in range(3)
    ]
    generated = run(engine, *asked)
    read = {
        (one.request_id, i): Request(
            f"{one.request_id} {i}",
            [*one.prompt_ids, *token_ids(generated[one.request_id, i])],
            SamplingParams(max_tokens=0, prompt_logprobs=3),
        )
        for one in asked
        for i in range(2)
    }
    run(engine, *read.values())
    for key, prompt in read.items():
        told = [(known.token_id, known.logprob, known.top_logprobs) for known in prompt.prompt_logprobs[-25:] if known]
        tokens = [output.token for output in generated[key] if output.token]
        assert told == [(token.token_id, token.logprob, token.top_logprobs) for token in tokens]


@pytest.mark.parametrize("vocab_size", [400, 2**15, 50_277])
def test_normalizers_do_not_depend_on_the_batch(vocab_size: int) -> None:
    """With several threads, between which PyTorch divides long sums."""
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(0))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = log_normalizers(logits)
        assert torch.equal(together, torch.cat([log_normalizers(row[None]) for row in logits]))
        assert torch.equal(together[:5], log_normalizers(logits[:5]))
    finally:
        torch.set_num_threads(n_threads)


def test_no_stop_string_counts_before_min_tokens() -> None:
    free = run(LLMEngine(MODEL, WORDS), request(max_tokens=40, ignore_eos=True))["a", 0]
    texts = [output.token.text for output in free if output.token]
    stop = (texts[2], texts[20])
    first = next(i for i in range(10, 40) if any(string in "".join(texts[10 : i + 1]) for string in stop))
    one = request(max_tokens=40, ignore_eos=True, stop=stop, min_tokens=10)
    outputs = run(LLMEngine(MODEL, WORDS), one)["a", 0]
    assert len(token_ids(outputs)) == first + 1
    assert outputs[-1].finish_reason is FinishReason.STOP_SEQUENCE
    assert stop[0] in text(outputs)  # where it came too early


def poisoned_grammar() -> Request:
    one = request("poisoned", max_tokens=50)
    one.matcher = GrammarCompiler(WORDS, 60).compile(Grammar("regex", "[a-z ]*"))
    broken = mock.Mock(wraps=one.matcher)
    broken.copy.return_value.is_complete = False
    broken.copy.return_value.adjust.side_effect = [None, RuntimeError("poison")]
    one.matcher = broken
    return one


def test_a_grammar_that_fails_ends_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    healthy = [request(f"{i}", max_tokens=20) for i in range(3)]
    with caplog.at_level(logging.ERROR):
        results = run(LLMEngine(MODEL, WORDS), healthy[0], poisoned_grammar(), *healthy[1:])
    assert "poison" in caplog.text
    *tokens, error = results["poisoned", 0]
    assert len(tokens) == 1
    assert isinstance(error.error, GenerationError)
    assert str(error.error) == "Generation failed in the server."  # the client is not told of our inside
    for one in healthy:
        assert token_ids(results[one.request_id, 0]) == alone(one)


@pytest.mark.parametrize("n_poisoned", [1, 3])
def test_logits_that_are_not_finite_end_their_own_request_only(n_poisoned: int) -> None:
    """Token 399 becomes poison: whatever reads it has NaN logits from there on."""
    model = random_model(tiny_config(tie_embeddings=False))
    model.embedding.weight.data[399] = float("nan")
    healthy = [request(f"{i}", max_tokens=20, banned_token_ids=(399,)) for i in range(3)]
    expected = [alone(one, model) for one in healthy]
    in_prompt = Request("prompt", [1, 399], healthy[0].params)
    later = request("later", n=n_poisoned, max_tokens=20)
    engine = LLMEngine(model, WORDS)
    for one in (healthy[0], in_prompt, later, *healthy[1:]):
        engine.add_request(one)
    first = engine.step()
    for sequence in engine._running:
        if sequence.request is later and sequence.index == 0:
            sequence.token_ids[-1] = 399
    results = run(engine)
    for output in first:
        results[output.request_id, output.index].insert(0, output)
    assert [type(output.error) for output in results["prompt", 0]] == [GenerationError]
    assert [type(output.error) for output in results["later", 0]] == [type(None), GenerationError]
    for one, ids in zip(healthy, expected, strict=True):
        assert token_ids(results[one.request_id, 0]) == ids


def test_a_request_with_no_token_left_to_choose_fails_alone() -> None:
    results = run(LLMEngine(MODEL, WORDS), request("none", allowed_token_ids=(5,), banned_token_ids=(5,)), request("b"))
    assert isinstance(results["none", 0][0].error, GenerationError)
    assert token_ids(results["b", 0]) == alone(request())


def test_grammar_constrains_the_text() -> None:
    one = request(max_tokens=100, temperature=3.0)
    one.matcher = GrammarCompiler(WORDS, 60).compile(Grammar("regex", "(ab|cd){3}"))
    outputs = run(LLMEngine(MODEL, WORDS), one)["a", 0]
    assert len(text(outputs)) == 6
    assert {text(outputs)[i : i + 2] for i in (0, 2, 4)} <= {"ab", "cd"}
    assert outputs[-1].finish_reason is FinishReason.END_OF_TEXT


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Request("a", []), "at least one token"),
        (Request("a", [1, 400]), "token ids from 0 to 399"),
        (Request("a", [-1]), "token ids from 0 to 399"),
        (Request("a", [2**40]), "token ids from 0 to 399"),
        (request(n=5), "n and best_of must be at most 4, .* not 5"),
        (request(logit_bias={400: 1.0}), "logit_bias must hold token ids from 0 to 399, not 400"),
    ],
)
def test_requests_that_can_never_run_are_refused(one: Request, message: str) -> None:
    with pytest.raises((InvalidRequestError, SamplingError), match=message):
        LLMEngine(MODEL, WORDS, SMALL).add_request(one)


def test_a_request_that_would_run_past_the_positions_is_refused() -> None:
    engine = LLMEngine(random_model(tiny_config("local", max_positions=64)), WORDS)
    with pytest.raises(InvalidRequestError, match=r"64 tokens, but a prompt of 54 tokens and 12 new ones make 66"):
        engine.add_request(request("too long", n_prompt=53, max_tokens=12))
    assert len(run(engine, request("fits", n_prompt=53, max_tokens=10))["fits", 0]) == 10
