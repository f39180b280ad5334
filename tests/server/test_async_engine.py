from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from model import Tokenizer
from model.errors import ModelError
from model.sampling import Grammar, SamplingParams
from server.engine import AsyncEngine, EngineConfig, LLMEngine, RequestStream
from server.engine.async_engine import LONG_PROMPT, MAX_FAILURES
from server.errors import (
    EngineDeadError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    ServerError,
    ShuttingDownError,
    SlowReaderError,
)
from tests.conftest import random_model, tiny_config

FIVE = SamplingParams(temperature=0, max_tokens=5)
ENDLESS = SamplingParams(temperature=0, max_tokens=10**6, ignore_eos=True)


@contextmanager
def running(tokenizer: Tokenizer, **options: Any) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(LLMEngine(random_model(tiny_config()), tokenizer, EngineConfig(**options)))
    yield engine
    engine.stop(timeout=60)


def in_engine(tokenizer: Tokenizer, main: Callable[[AsyncEngine], Coroutine[Any, Any, None]], **options: Any) -> None:
    with running(tokenizer, **options) as engine:
        asyncio.run(started(engine, main))
        assert engine.num_requests == 0
    assert engine._engine.scheduler.n_free_slots == engine._engine.pool.n_slots


async def ids(stream: RequestStream) -> list[int]:
    try:
        return [output.token.token_id async for output in stream if output.token]
    finally:
        stream.close()


async def generate(
    engine: AsyncEngine, params: SamplingParams = FIVE, prompt: str = "the fox", **options: Any
) -> list[int]:
    return await ids(await engine.submit(prompt, params, **options))


def test_many_requests_at_once(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        results = await asyncio.gather(*(generate(engine) for _ in range(10)))
        assert len(results[0]) == 5
        assert all(result == results[0] for result in results)

    in_engine(tokenizer, main, max_num_seqs=4)


def test_text_is_preceded_by_its_start_and_can_be_truncated(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        for text in ("the fox", "the fox " * LONG_PROMPT):
            stream = await engine.submit(text, FIVE)
            assert stream.request.prompt_ids == [tokenizer.end_of_text_id, *tokenizer.encode(text)]
            stream.close()
        ids = tokenizer.encode("the red fox")
        for n, expected in (
            (1, [tokenizer.end_of_text_id]),
            (3, [tokenizer.end_of_text_id, *ids[-2:]]),  # in all, as vLLM counts
            (len(ids) + 1, [tokenizer.end_of_text_id, *ids]),
        ):
            assert await engine.encode("the red fox", truncate=n) == expected
        assert await engine.encode("the red fox", truncate=2, add_special_tokens=False) == ids[-2:]
        assert await engine.encode([7, 8, 9], truncate=2) == [8, 9]
        stream = await engine.submit([7, 8], FIVE)
        assert stream.request.prompt_ids == [7, 8]
        stream.close()

    in_engine(tokenizer, main)


def test_closing_frees_the_slot_within_a_step(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        stream = await engine.submit("the fox", ENDLESS)
        await anext(aiter(stream))
        stream.close()
        stream.close()  # again, without effect
        assert len(await generate(engine)) == 5

    in_engine(tokenizer, main, max_num_seqs=1)


def test_a_full_queue_refuses_before_any_work(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        streams = [await engine.submit("the fox", ENDLESS) for _ in range(3)]
        with (
            mock.patch.object(tokenizer, "encode", side_effect=AssertionError("tokenised")),
            pytest.raises(OverloadedError, match="3 requests run or wait already"),
        ):
            await generate(engine)
        for stream in streams:
            stream.close()
        assert len(await generate(engine)) == 5

    in_engine(tokenizer, main, max_num_seqs=1, max_queue_length=2)


def test_places_are_taken_before_requests_are_made_and_come_back(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequestError, match="at most 3 prompts, not 4"):
            engine.admit(4)
        with engine.admit(2) as admission:
            with pytest.raises(OverloadedError, match="2 requests run or wait already"):
                engine.admit(2)
            stream = await engine.submit("the fox", ENDLESS, admission=admission)
            with engine.admit(), pytest.raises(OverloadedError, match="3 requests run or wait already"):
                engine.admit()
        with engine.admit(2), pytest.raises(OverloadedError):  # the place that no request took is free again
            engine.admit()
        stream.close()
        with engine.admit(3):
            pass

    in_engine(tokenizer, main, max_num_seqs=1, max_queue_length=2)


def test_times_count_from_before_any_work(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        began: list[float] = []
        encode, compile_ = tokenizer.encode, engine._grammars.compile

        def slowly(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def step(what: Any) -> Any:
                began.append(time.monotonic())
                time.sleep(0.02)
                return work(what)

            return step

        params = SamplingParams(max_tokens=3, grammar=Grammar("regex", "[a-z]*"))
        with (
            mock.patch.object(tokenizer, "encode", slowly(encode)),
            mock.patch.object(engine._grammars, "compile", slowly(compile_)),
        ):
            stream = await engine.submit("the fox", params, timeout=60)
        async for _ in stream:
            pass
        stream.close()
        request = stream.request
        assert len(began) == 2
        assert request.arrived_at <= began[0]
        assert request.admitted_at is not None
        assert request.admitted_at - request.arrived_at >= 0.04
        assert stream.first_token_at is not None
        assert stream.first_token_at - request.arrived_at >= 0.04

    in_engine(tokenizer, main)


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], FIVE, InvalidRequestError),
        ("\ud800", FIVE, ModelError),
        ("a", SamplingParams(n=33), InvalidRequestError),
        ("a", SamplingParams(grammar=Grammar("regex", "(")), InvalidRequestError),
        ("a", SamplingParams(grammar=Grammar("json_schema", "{")), InvalidRequestError),
    ],
)
def test_a_refused_request_takes_no_place(
    prompt: str | list[int], params: SamplingParams, error: type[Exception], tokenizer: Tokenizer
) -> None:
    async def main(engine: AsyncEngine) -> None:
        with pytest.raises(error):
            await engine.submit(prompt, params)

    in_engine(tokenizer, main)


def test_a_request_past_its_deadline_ends_with_an_error(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        with pytest.raises(RequestTimeoutError):
            await generate(engine, ENDLESS, timeout=0.05)

    in_engine(tokenizer, main)


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        with (
            mock.patch.object(engine._engine, "step", side_effect=RuntimeError("broken")),
            pytest.raises(GenerationError, match=r"^Generation failed in the server\.$"),
        ):
            await generate(engine)
        assert len(await generate(engine)) == 5

    in_engine(tokenizer, main)


def test_several_texts_end_one_by_one(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        params = SamplingParams(n=3, max_tokens=200, temperature=4.0, seed=2)
        stream = await engine.submit("the fox", params)
        ended = [output.index async for output in stream if output.finish_reason]
        assert sorted(ended) == [0, 1, 2]
        stream.close()

    in_engine(tokenizer, main)


def test_draining_lets_running_requests_end_and_takes_no_more(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        running = await engine.submit("the fox", SamplingParams(temperature=0, max_tokens=300, ignore_eos=True))
        draining = asyncio.create_task(engine.drain(timeout=600))
        await asyncio.sleep(0)  # drains, for as long as the running one has not been read
        assert not engine.is_ready
        with pytest.raises(ShuttingDownError):
            await generate(engine)
        assert not draining.done()
        assert len(await ids(running)) == 300
        await draining
        engine.stop()

    in_engine(tokenizer, main)


@mock.patch("server.engine.request_stream.MAX_UNREAD", 10**6)  # however long the end takes
def test_stopping_ends_what_is_still_there(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        stream = await engine.submit("the fox", ENDLESS)
        outputs = aiter(stream)
        await anext(outputs)
        await engine.drain(timeout=0.05)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(ServerError, match="shutting down"):
            async for _ in outputs:
                pass
        stream.close()

    in_engine(tokenizer, main)


class Broken(BaseException):
    """Nothing that anybody would catch."""


def test_an_engine_that_died_says_so_and_lets_nobody_wait(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        running = await engine.submit("the fox", ENDLESS)
        await running.read()
        waiting = await engine.submit("the fox", FIVE)
        with mock.patch.object(engine._engine, "add_request", side_effect=Broken):
            last = await engine.submit("the fox", FIVE)
            for stream in (running, waiting, last):
                with pytest.raises(EngineDeadError, match="until the server is restarted"):
                    await ids(stream)
        assert engine.problem is not None
        assert not engine.is_ready
        with pytest.raises(EngineDeadError, match="until the server is restarted"):
            await generate(engine)
        assert engine.num_requests == 0

    with running(tokenizer, max_num_seqs=1) as engine:
        asyncio.run(started(engine, main))


async def started(engine: AsyncEngine, main: Callable[[AsyncEngine], Coroutine[Any, Any, None]]) -> None:
    engine.start()
    await asyncio.wait_for(main(engine), timeout=300)


def test_a_request_that_cannot_be_added_ends_alone(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        other = await engine.submit("the fox", ENDLESS)
        await other.read()
        with (
            mock.patch.object(engine._engine, "add_request", side_effect=RuntimeError("broken")),
            pytest.raises(GenerationError, match=r"^Generation failed in the server\.$"),
        ):
            await generate(engine)
        await other.read()
        other.close()
        assert len(await generate(engine)) == 5
        assert engine.problem is None

    in_engine(tokenizer, main)


def test_a_request_that_cannot_be_dropped_is_dropped_later(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        lost, other = [await engine.submit("the fox", ENDLESS) for _ in range(2)]
        await lost.read()
        drop = engine._engine.abort_request
        with mock.patch.object(engine._engine, "abort_request", side_effect=[RuntimeError("broken")]) as failing:
            lost.close()
            while not failing.called:
                await other.read()
            failing.side_effect = drop
            while engine._engine.scheduler.n_free_slots < 1:
                await other.read()
        other.close()
        assert len(await generate(engine)) == 5

    in_engine(tokenizer, main, max_num_seqs=2)


def test_a_text_never_goes_on_with_a_hole(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        streams = [await engine.submit("the fox", ENDLESS) for _ in range(3)]
        for stream in streams:
            await stream.read()
        deliver = engine._deliver
        lost: list[RequestStream] = []

        def once(outputs: list[tuple[RequestStream, Any]], now: float) -> None:
            if not lost:
                lost.extend(stream for stream, _ in outputs)
                raise Broken
            deliver(outputs, now)

        with mock.patch.object(engine, "_deliver", once):
            while not lost:
                await asyncio.sleep(0)
            for stream in streams:
                if stream in lost:
                    with pytest.raises(GenerationError):
                        await ids(stream)
                stream.close()
        assert len(await generate(engine)) == 5

    in_engine(tokenizer, main)


def test_an_observer_that_fails_ends_nothing(tokenizer: Tokenizer) -> None:
    broken = mock.Mock(**{f"on_{what}.side_effect": RuntimeError("broken") for what in ("token", "close", "look_up")})

    async def main(engine: AsyncEngine) -> None:
        engine._observer = broken
        assert len(await generate(engine)) == 5
        assert engine.problem is None

    in_engine(tokenizer, main)
    assert broken.on_token.call_count == 5
    assert broken.on_close.call_count == 1


def test_a_step_that_hangs_shows_and_holds_up_no_deadline(tokenizer: Tokenizer) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def step() -> list[Any]:
        if hangs.is_set():
            goes_on.wait()
        return []

    async def main(engine: AsyncEngine) -> None:
        with mock.patch.object(engine._engine, "step", step):
            others = [await engine.submit("the fox", FIVE) for _ in range(2)]
            late = [asyncio.create_task(generate(engine, timeout=0.1)) for _ in range(5)]
            await asyncio.sleep(0)
            assert engine.num_requests == 7
            hangs.set()
            for text in late:
                with pytest.raises(RequestTimeoutError):
                    await text
            while engine.problem is None:
                await asyncio.sleep(0.01)
            assert engine.problem == "The engine has not ended its step in 0.05 seconds."
            assert not engine.is_ready
            with pytest.raises(EngineDeadError, match="has not ended its step"):
                await generate(engine)
            await asyncio.to_thread(engine.stop, timeout=0.01)  # returns
            for stream in others:
                with pytest.raises(ShuttingDownError):
                    await ids(stream)
            goes_on.set()

    in_engine(tokenizer, main, step_timeout=0.05)


def test_a_step_that_ends_at_last_makes_all_well_again(tokenizer: Tokenizer) -> None:
    goes_on = threading.Event()

    async def main(engine: AsyncEngine) -> None:
        step = engine._engine.step

        def hanging() -> list[Any]:
            goes_on.wait()
            return step()

        with mock.patch.object(engine._engine, "step", hanging):
            stream = await engine.submit("the fox", FIVE)
            while engine.problem is None:
                await asyncio.sleep(0.01)
            goes_on.set()
            assert len(await ids(stream)) == 5
        while engine.problem is not None:
            await asyncio.sleep(0.01)

    in_engine(tokenizer, main, step_timeout=0.05)


def test_failing_again_and_again_shows_until_something_goes_well(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        with mock.patch.object(engine._engine.runner, "step_", side_effect=RuntimeError("broken")):
            for n in range(1, MAX_FAILURES + 1):
                assert engine.is_ready
                with pytest.raises(GenerationError):
                    await generate(engine)
                assert engine._engine.num_failures == n
        assert engine.problem == "The engine has failed 3 times in a row."
        assert not engine.is_ready
        assert len(await generate(engine)) == 5  # taken all the same
        assert engine.is_ready

    in_engine(tokenizer, main)


def test_what_waits_survives_a_step_that_fails(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        runs = await engine.submit("the fox", ENDLESS)
        await runs.read()
        waiting = [asyncio.create_task(generate(engine)) for _ in range(2)]
        step, failing = engine._engine.step, [RuntimeError("broken")]

        def once() -> list[Any]:
            if engine._engine.scheduler.num_waiting == 2 and failing:
                raise failing.pop()
            return step()

        with mock.patch.object(engine._engine, "step", once), pytest.raises(GenerationError):
            async for _ in runs:
                pass
        runs.close()
        assert [len(text) for text in await asyncio.gather(*waiting)] == [5, 5]

    in_engine(tokenizer, main, max_num_seqs=1)


def test_a_key_leaves_places_and_slots_to_others(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        config = EngineConfig(max_num_seqs=4, max_queue_length=4)
        engine = AsyncEngine(LLMEngine(random_model(tiny_config()), tokenizer, config), n_owners=2)
        engine.start()
        with engine.admit(6, "A") as admission:
            streams = [await engine.submit("the fox", ENDLESS, admission=admission) for _ in range(6)]
        with pytest.raises(OverloadedError, match="6 requests of this API key run or wait already, and at most 6 may"):
            engine.admit(1, "A")
        with pytest.raises(InvalidRequestError, match="at most 6 prompts, not 7"):
            engine.admit(7, "B")
        with engine.admit(1, "B") as admission:  # and a slot is free for it, whatever the others do
            assert len(await ids(await engine.submit("the fox", FIVE, admission=admission))) == 5
        for stream in streams:
            stream.close()
        with engine.admit(6, "A"):
            pass
        await asyncio.to_thread(engine.stop, timeout=60)
        assert engine._engine.scheduler.n_free_slots == 4

    asyncio.run(main())


def test_a_stream_that_is_closed_while_it_is_read_has_no_more(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        stream = await engine.submit("the fox", ENDLESS)
        await stream.read()
        reading = asyncio.create_task(stream.read())
        stream.close()
        await reading
        assert await stream.read() == []

    in_engine(tokenizer, main)


def test_ended_streams_that_nobody_reads_are_bounded_in_sum(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=4)
        with mock.patch("server.engine.request_stream.MAX_UNREAD_IN_ALL", 130):  # a text is of 10 tokens and 40 others
            streams = [await engine.submit("the fox", params) for _ in range(4)]
            while any(stream.num_unfinished and not stream.error for stream in streams):
                await asyncio.sleep(0.01)
        assert engine._unread.total <= 130
        lost = [stream for stream in streams if stream.error]
        assert lost
        for stream in streams:
            if stream in lost:
                with pytest.raises(SlowReaderError, match="no room to keep it"):
                    await ids(stream)
            else:
                assert len(await ids(stream)) == 10
        assert engine._unread.total == 0

    in_engine(tokenizer, main, max_num_seqs=4)


def test_a_text_too_long_for_any_tokens_is_refused_unread(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        longest = max(map(len, tokenizer.token_bytes))
        with (
            mock.patch.object(tokenizer, "encode", side_effect=AssertionError("tokenised")),
            pytest.raises(InvalidRequestError, match=r"length is 100 tokens, but a prompt of .* has at least 101"),
        ):
            await engine.submit("x" * (100 * longest + 1), FIVE)
        text = "the fox " * 1000
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))

    in_engine(tokenizer, main, max_model_len=100)


def test_long_prompts_take_no_threads_of_others(tokenizer: Tokenizer) -> None:
    goes_on = threading.Event()

    async def main(engine: AsyncEngine) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        encode = tokenizer.encode

        def hanging(text: str) -> list[int]:
            if len(text) > LONG_PROMPT:
                goes_on.wait()
            return encode(text)

        with mock.patch.object(tokenizer, "encode", hanging):
            late = [asyncio.create_task(generate(engine, prompt="x" * 5000, timeout=0.1)) for _ in range(8)]
            done = await asyncio.gather(*late, return_exceptions=True)
            assert all(isinstance(error, RequestTimeoutError) for error in done)
            assert await asyncio.to_thread(lambda: "free") == "free"
            assert len(await generate(engine)) == 5
            goes_on.set()

    in_engine(tokenizer, main)


# A product of automata, which would take hours.
SLOW = Grammar.json_schema({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(1, 15)]})


def test_slow_grammars_take_no_threads_of_others_and_end_with_the_engine(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        known = Grammar("regex", "a*")
        await generate(engine, SamplingParams(grammar=known))
        slow = [asyncio.create_task(generate(engine, SamplingParams(grammar=SLOW))) for _ in range(3)]
        while len(engine._grammars.processes._busy) < 2:
            await asyncio.sleep(0.01)
        long = await engine.encode("the fox " * LONG_PROMPT)
        assert len(long) > LONG_PROMPT
        await generate(engine, SamplingParams(grammar=known))
        assert not any(task.done() for task in slow)
        await engine.drain(0)
        for task in slow:
            with pytest.raises(ShuttingDownError):
                await task

    in_engine(tokenizer, main, grammar_timeout=10**6)


def test_who_waits_for_slow_grammars_of_others_is_told_to_come_back(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        turn = engine._grammars.processes._turn
        async with turn, turn:
            with pytest.raises(OverloadedError, match=r"^grammar waited 0\.01 seconds for others"):
                await generate(engine, SamplingParams(grammar=Grammar("regex", "a")))

    in_engine(tokenizer, main, grammar_timeout=0.01)


def test_a_reader_far_behind_loses_its_request(tokenizer: Tokenizer) -> None:
    async def main(engine: AsyncEngine) -> None:
        with mock.patch("server.engine.request_stream.MAX_UNREAD", 50):
            slow = await engine.submit("the fox", ENDLESS)
            while engine.num_requests:
                await asyncio.sleep(0.01)
        assert len(await slow.read()) == 51  # nothing that was kept is lost
        with pytest.raises(SlowReaderError, match="left 50 tokens"):
            await slow.read()
        slow.close()
        assert len(await generate(engine)) == 5

    in_engine(tokenizer, main, max_num_seqs=1)


def test_an_observer_is_told_of_every_token_and_end(tokenizer: Tokenizer) -> None:
    told: list[object] = []

    class Recorder:
        def on_token(self, stream: RequestStream, interval: float | None) -> None:
            told.append(interval is None)

        def on_close(self, stream: RequestStream) -> None:
            told.append(stream.finish_reasons)

        def on_look_up(self, n_wanted: int, n_found: int) -> None:
            raise AssertionError("there is no store")

        def on_step(self, n_tokens: int) -> None:
            n_decoded_and_read.append(n_tokens)

    n_decoded_and_read: list[int] = []
    engine = AsyncEngine(LLMEngine(random_model(tiny_config()), tokenizer), Recorder())

    async def main() -> None:
        engine.start()
        await generate(engine)
        abandoned = await engine.submit("the fox", ENDLESS)
        await abandoned.read()
        abandoned.close()
        await asyncio.to_thread(engine.stop)

    asyncio.run(main())
    assert told[:6] == [True, False, False, False, False, ["length"]]
    assert told[6] is True
    assert [] in told[7:]
    assert n_decoded_and_read[1:5] == [1, 1, 1, 1]
